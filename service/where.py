"""Where the work of a command is done: here, or by the service that ``moeplan --server URL`` names.

The commands that can have it done elsewhere ask here, and only here. What comes back is the same.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..spec.errors import MoeplanError

if TYPE_CHECKING:
    from ..planner.budget import Budget
    from ..planner.export import Export
    from ..planner.place.explain import Explanation
    from ..spec.model import Model
    from ..spec.placement import Placement
    from ..spec.plan import Plan
    from ..spec.trace import Trace
    from .client import Client

ELSEWHERE = ("solve", "place", "explain", "export")
"""Commands that a service can do."""
_server: list["Client"] = []


def choose(url: str | None, token_file: Path | None, command: str | None) -> None:
    """From now on work is done there; None: here. Raises MoeplanError for commands that cannot be, and bad URLs."""
    _server.clear()
    if url is None:
        if token_file is not None:
            raise MoeplanError("moeplan --token-file goes with --server, which says where the work is done")
        return
    if command is not None and command not in ELSEWHERE:
        raise MoeplanError(f"--server: {command} works on this machine; a service does {', '.join(ELSEWHERE)}")
    from .client import Client
    from .jobs.settings import read_token

    _server.append(Client(url, read_token(token_file)))


def only_here(what: str) -> None:
    """Raises MoeplanError where a service was named for what none can do yet."""
    if _server:
        raise MoeplanError(f"--server: {what} works on this machine only, leave --server out")


def solve(budget: "Budget", seconds: float, *, here: Callable[[], "Plan"], **asked: Any) -> "Plan":
    """A plan; here: how it is made on this machine. asked: what ``Client.solve`` takes."""
    if not _server:
        return here()
    return _server[0].solve(**asked, time_limit=seconds, on_event=budget.on_event, stop=budget.stop)


def place(budget: "Budget", seconds: float, *, here: Callable[[], "Placement"], **asked: Any) -> "Placement":
    """The same of a placement and ``Client.place``."""
    if not _server:
        return here()
    return _server[0].place(**asked, time_limit=seconds, on_event=budget.on_event, stop=budget.stop)


def export(
    placement: "Placement", engine: str, model: "Model", trace: "Trace | None", paths: Mapping[str, str]
) -> "Export":
    """An engine's files. paths: at which the engine will find them, by name."""
    if not _server:
        from ..planner.export import export as make

        loads = trace.expert_counts if trace else None
        return make(placement, engine, model, loads=loads, path_of=lambda name: paths.get(name, name))
    return _server[0].export(placement, engine, model, trace=trace, paths=dict(paths))


def explain(placement: "Placement", trace: "Trace", seed: int) -> "Explanation":
    if not _server:
        from ..planner.place.explain import explain as why

        return why(placement, trace, seed=seed)
    return _server[0].explain(placement, trace, seed=seed)

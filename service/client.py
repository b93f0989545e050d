"""``moeplan.Client``: the functions of the library, done by a service.

    from moeplan import Client

    client = Client("http://127.0.0.1:8321")
    placement = client.place("trace.npz", devices=8, hosts=2)

Documents are given as objects or paths and sent once: the service knows them by their content. Every function raises
``MoeplanError``, in one line. What fails on the way is tried again: the same question is one job.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from ..spec.cluster import Cluster
from ..spec.errors import MoeplanError
from ..spec.model import DType, Model
from ..spec.placement import Movement, Objective, Placement, Shares
from ..spec.plan import Plan
from ..spec.trace import Trace
from ..spec.workload import Workload
from .arguments import document, model_of, optional
from .connection import Connection

if TYPE_CHECKING:
    from ..planner.export import Export
    from ..planner.place.explain import Explanation

OnEvent = Callable[[dict[str, Any]], None]


class Client:
    """Of one service."""

    def __init__(self, url: str = "http://127.0.0.1:8321", token: str | None = None, *, patience: float = 60.0) -> None:
        """token: by default MOEPLAN_TOKEN. patience: seconds for which a service that does not answer is asked again.

        Raises MoeplanError for what is no URL.
        """
        self.connection = Connection(url, token, patience)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.connection.close()

    def solve(
        self,
        model: str | Model,
        cluster: Cluster | str | Path,
        workload: Workload | str = "decode:16@512",
        trace: Trace | str | Path | None = None,
        *,
        strategy: str | None = None,
        placement: Placement | str | Path | None = None,
        even: bool = False,
        by_batch: bool = False,
        dtype: DType | None = None,
        memory_bytes: int | None = None,
        seed: int = 0,
        time_limit: float = 60.0,
        on_event: OnEvent | None = None,
        stop: Event | None = None,
    ) -> Plan:
        """See ``moeplan.solve``."""
        question = {
            "kind": "solve",
            "model": self._model(model, executed=True),
            "cluster": self._document("cluster", cluster, Cluster),
            "workload": str(workload),
            "trace": self._trace("trace", trace),
            "strategy": strategy,
            "placement": self._document("placement", placement, Placement),
            "even": even,
            "by_batch": by_batch,
            "dtype": dtype,
            "memory_bytes": memory_bytes,
            "seed": seed,
            "time_limit": time_limit,
        }
        plan = Plan.parse(self._answer(question, on_event, stop), "the service's plan")
        return plan.model_copy(update={"routing": plan.routing.model_copy(update={"path": _path(trace)})})

    def place(
        self,
        trace: Trace | str | Path,
        *,
        devices: int | None = None,
        hosts: int | None = None,
        slots: int | None = None,
        slots_per_device: Sequence[int] | None = None,
        equal_slots: bool = False,
        cluster: Cluster | str | Path | None = None,
        model: str | Model | None = None,
        workload: Workload | str | None = None,
        dtype: DType | None = None,
        fit: tuple[float, float] = (0.0, 1.0),
        objective: Objective = "latency",
        movement: Movement = "coherent",
        shares: Shares = "even",
        groups: int = 1,
        balance_cap: float | None = None,
        previous: Placement | str | Path | None = None,
        previous_path: str = "",
        max_moves: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        time_limit: float = 20.0,
        on_event: OnEvent | None = None,
        stop: Event | None = None,
    ) -> Placement:
        """See ``moeplan.place``. previous_path: what the placement calls ``previous``, where that is a document."""
        question = {
            "kind": "place",
            "trace": self._trace("trace", trace),
            "devices": devices,
            "hosts": hosts,
            "slots": slots,
            "slots_per_device": None if slots_per_device is None else list(slots_per_device),
            "equal_slots": equal_slots,
            "cluster": self._document("cluster", cluster, Cluster),
            "model": self._model(model, executed=cluster is not None),
            "workload": None if workload is None else str(workload),
            "dtype": dtype,
            "fit": list(fit),
            "objective": objective,
            "movement": movement,
            "shares": shares,
            "groups": groups,
            "balance_cap": balance_cap,
            "previous": self._document("previous", previous, Placement),
            "max_moves": max_moves,
            "steps": steps,
            "seed": seed,
            "time_limit": time_limit,
        }
        placed = Placement.parse(self._answer(question, on_event, stop), "the service's placement")
        changes: dict[str, Any] = {"trace": placed.trace.model_copy(update={"path": _path(trace)})}
        if placed.moves is not None:
            changes["moves"] = placed.moves.model_copy(update={"previous": previous_path or _path(previous)})
        return placed.model_copy(update=changes)

    def explain(
        self,
        placement: Placement | str | Path,
        trace: Trace | str | Path | None = None,
        *,
        seed: int = 0,
        on_event: OnEvent | None = None,
    ) -> "Explanation":
        """Why a placement is what it is; without a trace, by the one that it was fitted on, if the service has it."""
        from pydantic import TypeAdapter

        from ..planner.place.explain import Explanation

        question = {
            "kind": "explain",
            "placement": self._document("placement", placement, Placement),
            "trace": self._trace("trace", trace),
            "seed": seed,
        }
        found = json.loads(self._answer(question, on_event, None))
        return TypeAdapter(Explanation).validate_python(found["explanation"])

    def export(
        self,
        placement: Placement | str | Path,
        to: str,
        model: str | Model,
        *,
        trace: Trace | str | Path | None = None,
        paths: dict[str, str] | None = None,
        on_event: OnEvent | None = None,
    ) -> "Export":
        """A placement as an engine's files, by name. paths: at which the engine will find them, by name."""
        from ..planner.export import Export

        question = {
            "kind": "export",
            "placement": self._document("placement", placement, Placement),
            "to": to,
            "model": self._model(model, executed=False),
            "trace": self._trace("trace", trace),
            "paths": paths or {},
        }
        found = json.loads(self._answer(question, on_event, None))
        return Export(**found | {"beside": tuple(found["beside"])})

    def jobs(self) -> list[dict[str, Any]]:
        """The latest jobs of the service, as its ``/v1/jobs`` tells them."""
        found: list[dict[str, Any]] = self.connection.get("/v1/jobs", "jobs")["jobs"]
        return found

    def cancel(self, job: str) -> dict[str, Any]:
        """End a job with the best found so far; what is known of it then."""
        return self.connection.cancel(job)

    def _answer(self, question: dict[str, Any], on_event: OnEvent | None, stop: Event | None) -> str:
        given = {name: value for name, value in question.items() if value is not None}
        job = self.connection.ask(given)
        over = self.connection.follow(job["id"], on_event, stop)
        if over["result"] is None:
            raise MoeplanError(over["error"] or "the job was cancelled before anything was found")
        return self.connection.result(over["id"])

    def _document(self, name: str, value: Any, kind: type[Cluster] | type[Placement]) -> str | None:
        """The digest of a document that the service has then."""
        found, _ = optional(name, value, kind)
        if found is None:
            return None
        where = Path(_path(value) or f"{name}.json").name
        collection = "clusters" if kind is Cluster else "placements"
        return self.connection.send(collection, found.to_json().encode(), where)

    def _trace(self, name: str, value: Trace | str | Path | None) -> str | None:
        if value is None:
            return None
        if isinstance(value, Trace):
            import tempfile

            with tempfile.TemporaryDirectory(prefix="moeplan-") as folder:
                return self.connection.send_file("traces", value.write(Path(folder) / "trace.npz"))
        document(name, value, Trace)  # wrong files are refused here, under their own name
        return self.connection.send_file("traces", Path(value))

    def _model(self, value: str | Model | None, executed: bool) -> str | None:
        """A catalogue name as it is, any other model as a document."""
        from ..spec.catalogue import catalogue

        if value is None or (isinstance(value, str) and value.strip().lower() in catalogue()):
            return value
        model = model_of(value, executed=executed)
        where = f"{model.name.replace('/', '-')}.json"
        return self.connection.send("models", model.to_json().encode(), where)


def _path(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else ""

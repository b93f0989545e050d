"""One job's work, in a worker: documents are read from files, the library is called, the answer is a text of JSON.

An answer is what the command of the same name writes or prints with ``--json``.
"""

import json
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

from ...spec.cluster import Cluster
from ...spec.errors import MoeplanError
from ...spec.model import Model
from ...spec.placement import Placement
from ...spec.trace import Trace
from .files import renamed

OnEvent = Callable[[dict[str, Any]], None]
Paths = dict[str, Path]


def execute(request: dict[str, Any], paths: Paths, on_event: OnEvent, stop: Event) -> str:
    """The answer to a checked request. paths: of each document that it names, by field. Raises MoeplanError."""
    asked = {name: value for name, value in request.items() if name != "kind"}
    try:
        return _DOING[request["kind"]](asked, paths, on_event, stop)
    except MoeplanError as error:
        raise type(error)(_named(str(error), paths)) from None


def _named(text: str, paths: Paths) -> str:
    """A message that names documents by their field, not by where they lie here."""
    for name, path in paths.items():
        text = renamed(text, path, name)
    return text


def _place(asked: dict[str, Any], paths: Paths, on_event: OnEvent, stop: Event) -> str:
    from ..library import place

    given = asked | {
        "trace": Trace.read(paths["trace"]),
        "model": _model(asked, paths),
        "cluster": Cluster.read(paths["cluster"]) if "cluster" in paths else None,
        "previous": Placement.read(paths["previous"]) if "previous" in paths else None,
        "fit": tuple(asked["fit"]),
    }
    found = place(**given, on_event=on_event, stop=stop)
    _tell_proof(found.solver, on_event)
    return found.to_json()


def _solve(asked: dict[str, Any], paths: Paths, on_event: OnEvent, stop: Event) -> str:
    from ..library import solve

    given = asked | {
        "model": _model(asked, paths),
        "cluster": Cluster.read(paths["cluster"]),
        "trace": Trace.read(paths["trace"]) if "trace" in paths else None,
        "placement": Placement.read(paths["placement"]) if "placement" in paths else None,
    }
    found = solve(**given, on_event=on_event, stop=stop)
    _tell_proof(found.solver, on_event)
    return found.to_json()


def _explain(asked: dict[str, Any], paths: Paths, on_event: OnEvent, stop: Event) -> str:
    from ...planner.place.explain import explain

    placement = Placement.read(paths["placement"])
    found = explain(placement, Trace.read(paths["trace"]), seed=asked["seed"])
    return json.dumps({"explanation": found.to_dict()}, allow_nan=False) + "\n"


def _export(asked: dict[str, Any], paths: Paths, on_event: OnEvent, stop: Event) -> str:
    from dataclasses import asdict

    from ...planner.export import engine_named, export
    from ...spec.catalogue import load_model

    named = _model(asked, paths)
    assert named is not None
    found: dict[str, str] = asked["paths"]
    engine, model = engine_named(asked["to"]), load_model(named) if isinstance(named, str) else named
    loads = Trace.read(paths["trace"]).expert_counts if "trace" in paths else None
    made = export(
        Placement.read(paths["placement"]), engine.name, model, loads=loads, path_of=lambda name: found.get(name, name)
    )
    return json.dumps(asdict(made), allow_nan=False) + "\n"


def _model(asked: dict[str, Any], paths: Paths) -> str | Model | None:
    return Model.read(paths["model"]) if "model" in paths else asked.get("model")


def _tell_proof(solver: Any, on_event: OnEvent) -> None:
    """The last word on how good the answer is."""
    on_event({"what": solver.status, "incumbent": solver.objective, "bound": solver.bound, "gap": solver.gap})


_DOING: dict[str, Callable[[dict[str, Any], Paths, OnEvent, Event], str]] = {
    "place": _place,
    "solve": _solve,
    "explain": _explain,
    "export": _export,
}

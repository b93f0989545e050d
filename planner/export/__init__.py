"""Export: a placement as the file that a serving or training engine loads, checked by the engine's own rules.

    exported = export(placement, "sglang", model)     files, launch flags, and what is lost, as text
    validate("sglang", Path("location.json"), model, ranks=8)
    slots = read_back("sglang", text, 8, model)        [layers with experts][ranks][slots]: experts

A new engine is one file beside this one and one entry in ``ENGINES``.
"""

import difflib
from pathlib import Path

import numpy as np

from ...spec.document import read_text, show
from ...spec.engines import engine_name
from ...spec.errors import DocumentError, MoeplanError
from ...spec.model import Model
from ...spec.placement import Placement
from . import deepspeed, megatron, sglang, tensorrt_llm, vllm, vllm_ascend
from .common import Engine, Export, PathOf, Slots, Target, check_fit, common_notes, same
from .families import notes_of

__all__ = ["ENGINES", "Engine", "Export", "Slots", "engine_named", "export", "read_back", "same", "validate"]

ENGINES: dict[str, Engine] = {
    module.ENGINE.name: module.ENGINE for module in (sglang, tensorrt_llm, vllm, vllm_ascend, megatron, deepspeed)
}


def engine_named(name: str) -> Engine:
    """The engine of that name, in any spelling of ``spec.engines``; MoeplanError lists the names."""
    known = engine_name(name)
    if known in ENGINES:
        return ENGINES[known]
    near = difflib.get_close_matches(name.lower().replace("_", "-"), ENGINES, n=1)
    nearest = f"nearest: {near[0]}; " if near else ""
    raise MoeplanError(f"engine {show(name)}: unknown; {nearest}expected one of {', '.join(ENGINES)}")


def export(
    placement: Placement, engine: str, model: Model, *, loads: np.ndarray | None = None, path_of: PathOf = str
) -> Export:
    """The engine's files for this placement, validated; nothing is written.

    loads: [layers, experts] tokens per expert, to say what an engine's even shares cost. path_of: the path at which the
    engine will find a file, by the file's name. Raises MoeplanError in one line if the placement is not one of the
    model, or not one that the engine can run: unequal slots, copies where there can be none, degrees that it does not
    start with, a model family whose placement it cannot use (``families``).
    """
    chosen = engine_named(engine)
    target = Target(model, len(placement.devices))
    check_fit(placement, target, chosen.title)
    known = notes_of(chosen, model)
    exported = chosen.write(placement, target, path_of)
    for name, text in exported.files.items():
        chosen.read(text, name, target)
    exported.notes[:0] = common_notes(placement, target, chosen.title, loads) + known
    return exported


def validate(engine: str, source: Path | str, model: Model, ranks: int) -> Slots | None:
    """Check an engine's file (a path) or its content (a text) against the engine's rules for this model on these ranks.

    The slots that it asks for; None where a valid file carries no placement, such as a file of flags. Raises
    DocumentError naming file, field, value and rule.
    """
    chosen = engine_named(engine)
    if ranks < 2:
        raise MoeplanError(f"{ranks} device: expert parallelism needs at least 2")
    where = str(source) if isinstance(source, Path) else chosen.name
    text = read_text(source) if isinstance(source, Path) else source
    return chosen.read(text, where, Target(model, ranks))


def read_back(engine: str, text: str, devices: int, model: Model) -> Slots:
    """[layers with experts][devices][slots]: the experts that the content of an engine's file puts on each device."""
    slots = validate(engine, text, model, devices)
    if slots is None:
        raise DocumentError(f"{engine}: this file carries no placement")
    return slots

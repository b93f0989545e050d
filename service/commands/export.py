"""``moeplan export``: a placement as the file that a serving or training engine loads."""

import shlex
from functools import partial
from pathlib import Path
from typing import IO, Annotated

import typer

from ...planner.export import ENGINES, Engine, Export, engine_named, same, validate
from ...spec.catalogue import load_model
from ...spec.claims import claim
from ...spec.cluster import MAX_DEVICES
from ...spec.errors import DocumentError, MoeplanError
from ...spec.model import Model
from ...spec.output import check_output, write_atomically
from ...spec.placement import Placement
from ...spec.serving import ServingPlan
from ...spec.trace import Trace
from .. import where
from ..console import note, out, print_json, say
from ..serving_export import export_serving, is_serving_plan

SUFFIXES = {".json", ".jsonl", ".yaml", ".yml", ".txt", ".pt"}  # an output that ends so is a file, else a folder


def export(
    placement: Annotated[
        Path | None, typer.Argument(help="What `moeplan place` wrote, or `moeplan solve` for a served model.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", "--engine", help=f"The engine: {', '.join(ENGINES)}; of a served model by its plan."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Catalogue name or path of a config.json; of a served model what the engine loads."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file or a folder; by default a folder named as the engine.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Routing (.npz), to say what the engine's even shares cost in balance.")
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(help="Check this file of the engine instead of writing one, and that it is the given placement."),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=2, max=MAX_DEVICES, help="With --check and no placement: the ranks.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Write a placement in an engine's own format, checked by the engine's rules, and say what it does not carry.

    Example: `moeplan export place.json --to sglang --model deepseek-v3 -o location.json`

    A served model's: `moeplan export plan.json -o start`

    To check a file: `moeplan export --check location.json --to sglang --model deepseek-v3 --devices 32`
    """
    if placement is not None and check is None and is_serving_plan(placement):
        if trace is not None or devices is not None:
            raise MoeplanError("--trace and --devices say nothing of a served model's plan: leave them out")
        export_serving(ServingPlan.read(placement), to, model, output, as_json)
        return
    if to is None or model is None:
        raise MoeplanError(f"export: name the engine (--to {', '.join(ENGINES)}) and the model (--model)")
    engine = engine_named(to)
    if check:
        wanted = Placement.read(placement) if placement else None
        _check(check, engine, load_model(model), wanted, devices, as_json)
        return
    if placement is None:
        raise MoeplanError("export: name the placement (place.json), or a file to check (--check FILE --devices N)")
    paths = _Paths(output or Path(engine.name), engine)
    for path in paths.all():
        claim(path)
        check_output(path)
    wanted = Placement.read(placement)
    recorded = Trace.read(trace) if trace else None
    places = {name: str(paths.of(name)) for name in (*engine.files, *engine.beside)}
    exported = where.export(wanted, engine.name, load_model(model), recorded, places)
    written = _write(exported, paths)
    beside = {} if paths.single is None else {name: exported.files[name] for name in exported.beside}
    if as_json:
        body = {"engine": exported.engine, "version": exported.version, "command": exported.command}
        print_json(body | {"files": [str(path) for path in written], "notes": exported.notes, "beside": beside})
        return
    for known in exported.notes:
        note(known if paths.single is None else known.replace(paths.single, str(paths.output)))
    for path in written:
        say(f"wrote {path}")
    if paths.single is not None and (others := [name for name in exported.files if name != paths.single]):
        note(f"{paths.output} is {engine.title}'s {paths.single}; --output FOLDER writes {', '.join(others)} too")
    for name, text in beside.items():
        say(f"one file was asked for; {name} is needed too, with")
        out.print(text, end="", soft_wrap=True)
    say(f"start {engine.title} (written for {exported.version}) with")
    say(shlex.join(exported.command))


class _Paths:
    """Where the files go: all into a folder, or the one that is asked for under the name that was given."""

    def __init__(self, output: Path, engine: Engine) -> None:
        """MoeplanError if the output is a file of a kind that the engine does not read."""
        self.output, self.engine = output, engine
        self.single: str | None = None  # the engine's name of the one file
        if output.suffix in SUFFIXES and not output.is_dir():
            kind = {".yml": ".yaml"}.get(output.suffix, output.suffix)
            fitting = [name for name in engine.files if Path(name).suffix == kind]
            if not fitting:
                kinds = ", ".join(dict.fromkeys(Path(name).suffix for name in engine.files))
                raise MoeplanError(f"--output {output}: the engine reads {kinds} files only")
            self.single = fitting[0]

    def of(self, name: str) -> Path:
        if self.single is None:
            return self.output / name
        return self.output if name == self.single else Path(name)

    def all(self) -> list[Path]:
        """Every file that may be written."""
        whole = (*self.engine.files, *self.engine.beside)
        return [self.of(name) for name in (whole if self.single is None else [self.single])]


def _write(exported: Export, paths: _Paths) -> list[Path]:
    names = exported.files if paths.single is None else [paths.single]
    return [write_atomically(paths.of(name), partial(_fill, exported.files[name].encode())) for name in names]


def _fill(content: bytes, f: IO[bytes]) -> None:
    f.write(content)


def _check(
    path: Path, engine: Engine, model: Model, wanted: Placement | None, devices: int | None, as_json: bool
) -> None:
    if wanted is not None and devices not in (None, len(wanted.devices)):
        raise MoeplanError(f"--devices {devices}: the placement has {len(wanted.devices)}; leave the option out")
    ranks = len(wanted.devices) if wanted is not None else devices
    if ranks is None:
        raise MoeplanError("--check needs the number of ranks: --devices N, or the placement itself")
    slots = validate(engine.name, path, model, ranks)
    if slots is not None and wanted is not None and not same(slots, tuple(layer.slots for layer in wanted.layers)):
        raise DocumentError(f"{path}: a valid file, but of another placement")
    if as_json:
        print_json({"engine": engine.name, "file": str(path), "valid": True, "slots": slots})
    else:
        found = "no placement in it" if slots is None else f"{len(slots)} layers of {sum(map(len, slots[0]))} slots"
        say(f"{path}: valid for {engine.title}: {found}")

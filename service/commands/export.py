"""``moeplan export``: a placement as the file that a serving or training engine loads."""

import shlex
from functools import partial
from pathlib import Path
from typing import IO, Annotated

import typer
from rich.markup import escape

from ...planner.export import ENGINES, Export, engine_named, same, validate
from ...planner.export import export as make
from ...spec.catalogue import load_model
from ...spec.errors import DocumentError, MoeplanError
from ...spec.model import Model
from ...spec.output import check_output, write_atomically
from ...spec.placement import Placement
from ...spec.trace import Trace
from ..console import err, out, print_json

SUFFIXES = {".json", ".jsonl", ".yaml", ".yml", ".txt", ".pt"}  # an output that ends so is a file, else a folder


def export(
    to: Annotated[str, typer.Option(help=f"The engine: {', '.join(ENGINES)}.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Catalogue name or path of a Hugging Face config.json.")],
    placement: Annotated[Path | None, typer.Argument(help="What `moeplan place` wrote.")] = None,
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
    devices: Annotated[int | None, typer.Option(min=2, help="With --check and no placement: the ranks.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Write a placement in an engine's own format, checked by the engine's rules, and say what it does not carry.

    Example: `moeplan export place.json --to sglang --model deepseek-v3 -o location.json`

    To check a file: `moeplan export --check location.json --to sglang --model deepseek-v3 --devices 32`
    """
    engine_named(to)
    wanted = Placement.read(placement) if placement else None
    if check:
        _check(check, to, load_model(model), wanted, devices, as_json)
        return
    if wanted is None:
        raise MoeplanError("export: name the placement (place.json), or a file to check (--check FILE --devices N)")
    loads = Trace.read(trace).expert_counts if trace else None
    folder = output or Path(to)
    file = folder if folder.suffix in SUFFIXES and not folder.is_dir() else None
    check_output(file or folder / "placement")  # some name in the folder
    exported = make(
        wanted, to, load_model(model), loads=loads, path_of=lambda name: str(file if file else folder / name)
    )
    written = _write(exported, folder, file)
    if as_json:
        body = {"engine": exported.engine, "version": exported.version, "command": exported.command}
        print_json(body | {"files": [str(path) for path in written], "notes": exported.notes})
        return
    for note in exported.notes:
        err.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)
    for path in written:
        out.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    title = ENGINES[to].title
    out.print(f"start {title} (written for {exported.version}) with", highlight=False, soft_wrap=True)
    out.print(shlex.join(exported.command), markup=False, highlight=False, soft_wrap=True)


def _write(exported: Export, folder: Path, file: Path | None) -> list[Path]:
    if file and len(exported.files) > 1:
        raise MoeplanError(f"--output {file}: {', '.join(exported.files)} need a folder, not a file")
    written = []
    for name, text in exported.files.items():
        if file and file.suffix != Path(name).suffix:
            raise MoeplanError(f"--output {file}: the engine reads {Path(name).suffix} files only")
        written.append(write_atomically(file or folder / name, partial(_fill, text.encode())))
    return written


def _fill(content: bytes, f: IO[bytes]) -> None:
    f.write(content)


def _check(path: Path, to: str, model: Model, wanted: Placement | None, devices: int | None, as_json: bool) -> None:
    if wanted is not None and devices not in (None, len(wanted.devices)):
        raise MoeplanError(f"--devices {devices}: the placement has {len(wanted.devices)}; leave the option out")
    ranks = len(wanted.devices) if wanted is not None else devices
    if ranks is None:
        raise MoeplanError("--check needs the number of ranks: --devices N, or the placement itself")
    slots = validate(to, path, model, ranks)
    if slots is not None and wanted is not None and not same(slots, tuple(layer.slots for layer in wanted.layers)):
        raise DocumentError(f"{path}: a valid file, but of another placement")
    if as_json:
        print_json({"engine": to, "file": str(path), "valid": True, "slots": slots})
    else:
        found = "no placement in it" if slots is None else f"{len(slots)} layers of {sum(map(len, slots[0]))} slots"
        out.print(f"{path}: valid for {ENGINES[to].title}: {found}", markup=False, highlight=False, soft_wrap=True)

"""``moeplan systems``: the types of GPUs of which measured tables or data sheets are at hand."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from ...spec.tabled import System
from ..console import out, print_json, progress, say

if TYPE_CHECKING:
    from ...profiler.silicon.audit import Fault
    from ...profiler.silicon.audited import AuditedTables
    from ...profiler.silicon.inventory import Held


def systems(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Only this type of GPU, in detail.")] = None,
    tables: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A folder of tables, instead of those of the extra `silicon`."),
    ] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Judge every table, and say what is wrong and what stands in its place.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List the types of GPUs that can be planned for without having one: data sheets, measured tables, their age.

    The tables come with `pip install 'moeplan[silicon]'`. `--audit` reads all of them: seconds to a minute for a GPU.

    Example: `moeplan systems h200_sxm`
    """
    from ...profiler.silicon.audited import open_tables
    from ...profiler.silicon.inventory import list_held

    known = open_tables(tables)
    names = known.systems() if name is None else (known.system(name).name,)
    sheets = {one: known.system(one) for one in names}
    held = {one: list_held(known.measured, one) for one in names}
    found = _audit(known, names) if audit else None
    if as_json:
        print_json([_entry(sheets[one], held[one], None if found is None else found[one]) for one in names])
        return
    if name is None:
        out.print(_overview(sheets, held))
        say("memory: GiB; bandwidth: of memory, TB/s; bf16, fp8: TFLOP/s, dense; link: in the node, GB/s each way")
        say("rows: of all measured tables; 0: a data sheet only, times are scaled from the nearest GPU's")
        say("`moeplan systems NAME` lists the tables of one GPU, `--audit` judges them")
    else:
        _detail(sheets[name], held[name])
    if found is not None:
        _faults(found)


def _audit(known: "AuditedTables", names: tuple[str, ...]) -> "dict[str, list[tuple[Fault, str]]]":
    """Of every GPU type what is wrong, and for a condemned part what stands in its place."""
    found: dict[str, list[tuple[Fault, str]]] = {one: [] for one in names}
    with progress("judging tables") as tell:
        for count, one in enumerate(names):
            for what, faults in known.faults(one):
                tell({"done": count, "of": len(names), "what": f"{one}: {what}"})
                found[one] += [(fault, known.instead(fault) if fault.condemned else "") for fault in faults]
            known.forget()
    return found


def _entry(sheet: System, held: "tuple[Held, ...]", found: "list[tuple[Fault, str]] | None") -> dict[str, Any]:
    entry: dict[str, Any] = asdict(sheet) | {"tables": [asdict(one) for one in held]}
    if found is not None:
        entry["faults"] = [asdict(fault) | {"replaced_by": instead} for fault, instead in found]
    return entry


def _columns(*names: str) -> Table:
    """Names of numbers begin with a small letter; what one types is never cut."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for place, name in enumerate(names):
        table.add_column(name + " ", justify="right" if name[0].islower() else "left", no_wrap=place == 0)
    return table


def _overview(sheets: dict[str, System], held: "dict[str, tuple[Held, ...]]") -> Table:
    table = _columns("GPU", "Generation", "memory", "bandwidth", "bf16", "fp8", "link", "rows")
    for one, sheet in sheets.items():
        table.add_row(
            f"{one} ",
            f"{sheet.generation} ",
            f"{sheet.memory_bytes / 2**30:.0f} ",
            f"{sheet.memory_bytes_per_second / 1e12:.2f} ",
            _tera(sheet, "bfloat16"),
            _tera(sheet, "fp8"),
            f"{sheet.intra_node_bytes_per_second / 1e9:.0f} ",
            f"{sum(item.rows for item in held[one]):,} ",
        )
    return table


def _tera(sheet: System, dtype: str) -> str:
    return f"{sheet.flops[dtype] / 1e12:.0f} " if dtype in sheet.flops else "- "


def _detail(sheet: System, held: "tuple[Held, ...]") -> None:
    rates = ", ".join(f"{dtype} {rate / 1e12:.0f}" for dtype, rate in sheet.flops.items())
    watts = f", {sheet.watts:.0f} W" if sheet.watts else ""
    say(
        f"{sheet.name}: {sheet.generation}, {sheet.memory_bytes / 2**30:.0f} GiB at"
        f" {sheet.memory_bytes_per_second / 1e12:.2f} TB/s, TFLOP/s: {rates}{watts}"
    )
    say(
        f"{sheet.gpus_per_node} in a node at {sheet.intra_node_bytes_per_second / 1e9:.0f} GB/s each way,"
        f" {sheet.inter_node_bytes_per_second / 1e9:.0f} GB/s between nodes"
    )
    if not held:
        say("no measured table: times are scaled from the nearest GPU by the data sheets")
        return
    table = _columns("Operator", "Engine", "rows", "Versions, newest first")
    for operator, engine in dict.fromkeys((item.operator, item.engine) for item in held):
        items = [item for item in held if (item.operator, item.engine) == (operator, engine)]
        versions = ", ".join(f"{item.version} ({item.rows:,})" if len(items) > 1 else item.version for item in items)
        table.add_row(f"{operator} ", f"{engine} ", f"{sum(item.rows for item in items):,} ", versions)
    out.print(table)


def _faults(found: "dict[str, list[tuple[Fault, str]]]") -> None:
    count = sum(fault.condemned for faults in found.values() for fault, _ in faults)
    total = sum(map(len, found.values()))
    say(f"audit: {count} faults that condemn a part of a table, {total - count} remarks")
    for one, faults in found.items():
        for fault, instead in sorted(faults, key=lambda item: not item[0].condemned):
            where = f"{one}: {fault.operator}, {fault.engine} {fault.version}, {fault.dtype}"
            end = f"; replaced by {instead}" if fault.condemned else ""
            say(f"{where}: {fault.check}: {fault.text}{end}")

"""How far scaled times are off: tables of measured GPUs, scaled from the nearest other one, beside what was measured.

    python -m moeplan.benchmarks.scaled_tables [--tables PATH]

Needs the extra ``silicon``. Off is the scaled time over the measured one, less one, of the shapes that both tables
have, with the fastest kernel of each; ``bias`` is its median with sign.
"""

import argparse
from pathlib import Path

import numpy as np

from moeplan.profiler.silicon.audited import AuditedTables, open_tables
from moeplan.profiler.silicon.scale import nearest_systems, scale_table

OPERATORS = ("gemm", "moe", "context_attention", "generation_attention", "all_reduce", "nccl")
ENGINES = {"nccl": "nccl"}
ENGINE = "trtllm"  # it has tables of most GPUs, and fewest of them are replaced
NO_SHAPE = {"kernel", "backend", "seconds", "source", "origin"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=Path, help="a folder of tables, instead of those of the extra")
    known = open_tables(parser.parse_args().tables)
    print("| operator | GPU | scaled from | shapes | median off | 90 % within | bias |")
    print("|---|---|---|--:|--:|--:|--:|")
    for operator in OPERATORS:
        engine = ENGINES.get(operator, ENGINE)
        names = [name for name in known.systems() if known.measured.versions(operator, name, engine)]
        for name in names:
            print(_row(known, operator, engine, name, names), flush=True)
            known.forget()


def _row(known: AuditedTables, operator: str, engine: str, name: str, names: list[str]) -> str:
    target = known.system(name)
    source = nearest_systems(target, [known.system(other) for other in names if other != name], operator)[0]
    measured = known.table(operator, name, engine).frame
    scaled = scale_table(known.table(operator, source.name, engine), source, target).frame
    shape = [column for column in measured if column not in NO_SHAPE and column in scaled]
    both = measured.groupby(shape, as_index=False)["seconds"].min()
    both = both.merge(scaled.groupby(shape, as_index=False)["seconds"].min(), on=shape)
    off = (both["seconds_y"] / both["seconds_x"] - 1).to_numpy()
    middle, most, bias = np.median(abs(off)), np.quantile(abs(off), 0.9), np.median(off)
    return f"| {operator} | {name} | {source.name} | {len(off):,} | {middle:.0%} | {most:.0%} | {bias:+.0%} |"


if __name__ == "__main__":
    main()

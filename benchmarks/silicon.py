"""Predicted against measured: served mixture-of-experts models on GPUs, beside two planners.

    python -m moeplan.benchmarks.silicon [--rows FILE] [--every N] [--out FOLDER]

The rows are measured serving configurations that InferenceX published and aiconfigurator-core 0.12.0 ships
(``systems/silicon_sample.csv``, Apache-2.0); benchmarks/silicon_rows.csv is a sample of them, with what AIConfigurator
0.12, AISimulate 0.13 (nightly of 2026-10-27) and a plain sum of the tables predict for each. ``--rows`` takes a larger
file of the same columns. Times are milliseconds.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pandas as pd

from moeplan.benchmarks.silicon_settings import Row, degrees, load, settings
from moeplan.benchmarks.silicon_split import hidden
from moeplan.planner.serving import Architecture, of_config, predict
from moeplan.profiler.silicon.audited import AuditedTables, open_tables
from moeplan.spec.errors import MoeplanError

HERE = Path(__file__).parent
SAMPLE = HERE / "silicon_rows.csv"
OTHERS = ("aiconfigurator", "aisimulate", "tables")
ASKED = ["backend", "backend_version", "model_path", "system", "precision", "isl", "osl", "conc", "gpus"]
DEGREES = ["tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size"]


def read_rows(path: Path) -> pd.DataFrame:
    """Measured rows, with their number of GPUs and the half of the split that they belong to."""
    rows = pd.read_csv(path, index_col="row", comment="#")
    rows["backend_version"] = rows["backend_version"].fillna("").astype(str)
    rows["gpus"] = rows.tp_size * rows.pp_size * rows.attention_dp_size.clip(lower=1)
    rows["generation"] = rows.system.str.startswith("h").map({True: "Hopper", False: "Blackwell"})
    rows["half"] = hidden(rows).map({True: "hidden", False: "design"})
    return rows


def predicted(rows: pd.DataFrame, tables: AuditedTables) -> pd.DataFrame:
    """``rows`` with moeplan_tpot and moeplan_ttft in milliseconds, absent where it refuses, and ``why`` it does."""
    found: list[tuple[float | None, float | None, str]] = []
    for number, asked in zip(rows.index, rows[list(Row._fields)].itertuples(index=False), strict=True):
        row = Row(*asked)
        try:
            served = predict(
                tables,
                row.system,
                row.backend,
                None,
                architecture(tables.measured.root, str(rows.model_path[number])),
                row.precision,
                degrees(row),
                load(row),
                settings(row),
            )
        except MoeplanError as error:
            found.append((None, None, str(error)))
        else:
            found.append((served.tpot_s * 1e3, served.ttft_s * 1e3, ""))
    return rows.assign(**dict(zip(("moeplan_tpot", "moeplan_ttft", "why"), zip(*found, strict=True), strict=True)))


@cache
def architecture(root: Path, name: str) -> Architecture:
    """Of a model whose configuration lies beside the tables."""
    path = root.parent / "model_configs" / f"{name.replace('/', '--')}_config.json"
    return of_config(json.loads(path.read_text()), name)


def regret(rows: pd.DataFrame, name: str) -> tuple[int, float]:
    """Groups with a choice of degrees, and how much slower the one predicted fastest is than the best, on average."""
    lost = []
    for _, group in rows.groupby(ASKED, dropna=False):
        means = group.groupby(DEGREES)[[f"{name}_tpot", "silicon_tpot_ms"]].mean()
        if len(means) > 1:
            chosen = means.silicon_tpot_ms.iloc[means[f"{name}_tpot"].argmin()]
            lost.append(chosen / means.silicon_tpot_ms.min() - 1)
    return len(lost), sum(lost) / max(len(lost), 1)


def scores(rows: pd.DataFrame, name: str) -> dict[str, float]:
    """Errors of one predictor on these rows: shares of the measured time."""
    tpot = (rows[f"{name}_tpot"] / rows.silicon_tpot_ms - 1).abs()
    ttft = (rows[f"{name}_ttft"] / rows.silicon_ttft_ms - 1).abs()
    groups, lost = regret(rows, name)
    values = (tpot.mean(), tpot.median(), ttft.mean(), ttft.median(), lost)
    names = ("tpot_mean", "tpot_median", "ttft_mean", "ttft_median", "regret")
    return {"rows": len(rows), "groups": groups} | {
        key: round(float(value), 4) for key, value in zip(names, values, strict=True)
    }


def sections(rows: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame]]:
    """The parts of the table: headline, halves, engines, generations, families."""
    headline = rows[rows.family != "deepseek"]
    yield "without DeepSeek", headline
    for key, part in (("half", headline), ("backend", headline), ("generation", headline), ("family", rows)):
        for value, some in part.groupby(key):
            yield f"{key} {value}", some


def scored(rows: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """Section -> predictor -> errors, of moeplan on all that it predicts and of each on what every predictor does."""
    result = {}
    for title, part in sections(rows):
        own = part[part.moeplan_tpot.notna()]
        common = own[own[[f"{name}_tpot" for name in OTHERS]].notna().all(axis=1)]
        result[title] = {"moeplan, all": scores(own, "moeplan")}
        result[title] |= {name: scores(common, name) for name in ("moeplan", *OTHERS)}
    return result


def report(result: dict[str, dict[str, dict[str, float]]], refused: dict[str, int], total: int, command: str) -> str:
    """The page of results, as Markdown."""
    lines = ["# Predicted against measured servings", ""]
    lines += [f"`{command}`, with the tables of aiconfigurator-core 0.12.0; no figure depends on the machine."]
    lines += ["*all*: all rows that moeplan predicts; else the rows that every predictor answers.", ""]
    lines += [f"Refused of {total} rows: " + ", ".join(f"{name} {count}" for name, count in refused.items()), ""]
    lines += ["| rows | predictor | n | TPOT mean | median | TTFT mean | median | regret | groups |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    for title, predictors in result.items():
        for name, s in predictors.items():
            errors = (f"{s[key]:.1%}" for key in ("tpot_mean", "tpot_median", "ttft_mean", "ttft_median", "regret"))
            *times, lost = errors
            lost = lost if s["groups"] else "none"
            lines.append(f"| {title} | {name} | {s['rows']} | {' | '.join(times)} | {lost} | {s['groups']} |")
    return "\n".join(lines) + "\n"


def named(argument: str) -> str:
    """As it is given, a path without its folder."""
    return Path(argument).name if "/" in argument else argument


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=SAMPLE)
    parser.add_argument("--every", type=int, default=1, help="predict one row in so many")
    parser.add_argument("--half", choices=("design", "hidden"), help="predict this half of the split alone")
    parser.add_argument("--system", help="predict the rows of this GPU type alone")
    parser.add_argument("--backend", help="predict the rows of this engine alone")
    parser.add_argument("--without", metavar="FAMILY", help="leave out this family")
    parser.add_argument("--predictions", nargs="+", type=Path, help="score predictions.csv of earlier runs")
    parser.add_argument("--tables", type=Path, help="folder of measured tables, if not the installed package")
    parser.add_argument("--out", type=Path, help="folder for silicon.md, silicon.json and predictions.csv")
    chosen = parser.parse_args()
    start = time.perf_counter()
    if chosen.predictions:
        rows = pd.concat([pd.read_csv(path, index_col="row", keep_default_na=True) for path in chosen.predictions])
        rows["why"] = rows["why"].astype(object).fillna("")
    else:
        rows = read_rows(chosen.rows)
        for column in ("half", "system", "backend"):
            if getattr(chosen, column):
                rows = rows[rows[column] == getattr(chosen, column)]
        rows = predicted(rows[rows.family != chosen.without].iloc[:: chosen.every], open_tables(chosen.tables))
    seconds = time.perf_counter() - start
    refused = {name: int(rows[f"{name}_tpot"].isna().sum()) for name in ("moeplan", *OTHERS)}
    result = scored(rows)
    command = shlex.join(
        ["python", "-m", "moeplan.benchmarks.silicon", *(named(argument) for argument in sys.argv[1:])]
    )
    text = report(result, refused, len(rows), command)
    print(text)
    print(f"{len(rows)} rows in {seconds:.0f} s; {dict(rows.why[rows.why != ''].value_counts())}")
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "silicon.md").write_text(text)
        (chosen.out / "silicon.json").write_text(json.dumps({"refused": refused, "scores": result}, indent=1) + "\n")
        rows.to_csv(chosen.out / "predictions.csv")


if __name__ == "__main__":
    main()

"""The scores of predictions against measured rows: how they are counted, and that they do not get worse."""

import json
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest

from moeplan.benchmarks.silicon import SAMPLE, predicted, read_rows, regret, scores
from moeplan.benchmarks.silicon_settings import Row, degrees
from moeplan.benchmarks.silicon_split import hidden
from moeplan.planner.serving import Degrees

QUICK = Path(__file__).parents[1] / "benchmarks" / "results" / "silicon-quick.json"


def quick(rows: pd.DataFrame) -> pd.DataFrame:
    """Few rows, whose tables are read quickly."""
    return rows[(rows.system == "h200_sxm") & (rows.backend == "trtllm")].iloc[:10]


def test_the_split_halves_every_family_and_keeps_questions_whole() -> None:
    rows = read_rows(SAMPLE)
    marked = hidden(rows)
    assert marked.equals(hidden(rows.sample(frac=1, random_state=1)).reindex(rows.index))
    for _, part in rows.assign(marked=marked).groupby("family"):
        assert part.marked.any()
        questions = part.groupby(["backend", "backend_version", "model_path", "system", "precision", "isl", "osl"])
        assert (questions.marked.nunique() == 1).all()


def test_regret_is_what_the_choice_costs() -> None:
    same = {"backend": "a", "backend_version": "1", "model_path": "m", "system": "s", "precision": "p"}
    same |= {"isl": 1, "osl": 1, "conc": 1, "gpus": 4, "pp_size": 1, "attention_dp_size": 1, "moe_tp_size": 1}
    rows = pd.DataFrame(
        [
            same | {"tp_size": 4, "moe_ep_size": 1, "silicon_tpot_ms": 10.0, "x_tpot": 9.0},
            same | {"tp_size": 4, "moe_ep_size": 4, "silicon_tpot_ms": 8.0, "x_tpot": 12.0},
            same | {"tp_size": 4, "moe_ep_size": 4, "silicon_tpot_ms": 8.0, "x_tpot": 12.0, "conc": 2},
        ]
    )
    assert regret(rows, "x") == (1, pytest.approx(0.25))


def test_attention_copies_of_vllm_are_counted_once() -> None:
    row = Row("b300_sxm", "vllm", "0.19.0", "minimax", "fp4", 1024, 1024, 512, 2, 1, 2, 1, 4)
    assert degrees(row) == Degrees(1, 1, 2, 1, 2)
    plain = row._replace(attention_dp_size=1, moe_ep_size=2)
    assert degrees(plain) == Degrees(2, 1, 1, 1, 2)


@pytest.mark.skipif(find_spec("aiconfigurator_core") is None, reason="needs the extra silicon")
def test_predictions_do_not_get_worse() -> None:
    from moeplan.profiler.silicon.audited import open_tables

    rows = predicted(quick(read_rows(SAMPLE)), open_tables())
    found, before = scores(rows, "moeplan"), json.loads(QUICK.read_text())
    assert found["rows"] == before["rows"] > 5
    for name in ("tpot_mean", "ttft_mean"):
        assert found[name] <= before[name] + 0.002, name

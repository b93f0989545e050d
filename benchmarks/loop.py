"""Families that only Transformers computes, through the commands that a user types: profile, solve, run.

    python -m moeplan.benchmarks.loop [--families glm4_moe,...] [--folder FOLDER] [--minutes N] [--output FILE.md]

Each family is a config.json of four layers with sixteen experts, in f32, on two local ranks: one ``moeplan profile``,
then ``solve`` and ``run`` for a prefill and a decoding step. The table has what was predicted, what was measured, and
whether the output was that of the unmodified model. FOLDER keeps every file: the same command goes on where it was
stopped, and after ``--minutes`` no further command begins. Exit code 1 where a command failed or an output differs.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rich.console import Console

from moeplan import Plan, Report
from moeplan.benchmarks.hardware import processor
from moeplan.spec.document import write_atomically

HERE = Path(__file__).parent
WORKLOADS = ("prefill:1024@256", "decode:32@128")
REFUSED = 2  # exit code of a command that was refused; 1 is a report beyond its tolerance
ANY_ERROR = "1000000"  # tolerance of the prediction: the table shows it, whatever it is

_ALL: dict[str, Any] = {
    "dtype": "float32", "hidden_size": 1024, "num_hidden_layers": 4, "vocab_size": 8192, "num_attention_heads": 16,
    "num_key_value_heads": 4, "max_position_embeddings": 4096, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
_WIDE = {"head_dim": 64}
_NARROW = {"moe_intermediate_size": 512, "intermediate_size": 2048, "num_experts_per_tok": 4}
SMALL: dict[str, dict[str, Any]] = {
    "glm4_moe": _WIDE | _NARROW | {"n_routed_experts": 16, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "minimax_m2": _WIDE | {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 512},
    "deepseek_v3": _NARROW | {
        "num_key_value_heads": 16, "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
        "kv_lora_rank": 128, "q_lora_rank": 384, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64,
        "head_dim": 32,
    },
    "gpt_oss": _WIDE | {
        "num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 512, "sliding_window": 128,
    },
    "qwen3_next": _WIDE | _NARROW | {
        "num_experts": 16, "shared_expert_intermediate_size": 512, "linear_num_key_heads": 8,
        "linear_num_value_heads": 16, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    },
    "ernie4_5_moe": {
        "intermediate_size": 2048, "moe_intermediate_size": 512, "moe_num_experts": 16, "moe_k": 4,
        "moe_num_shared_experts": 1,
    },
    "granitemoe": {
        "num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 512, "embedding_multiplier": 12.0,
        "attention_multiplier": 0.015625, "logits_scaling": 6.0, "residual_multiplier": 0.22,
    },
    "llama4_text": _WIDE | {
        "num_local_experts": 16, "num_experts_per_tok": 1, "intermediate_size": 512, "intermediate_size_mlp": 2048,
        "interleave_moe_layer_step": 1, "attention_chunk_size": 512,
    },
    "lfm2_moe": _NARROW | {
        "num_experts": 16, "num_dense_layers": 1, "layer_types": ["conv", "conv", "full_attention", "conv"],
    },
    "nemotron_h": _WIDE | {
        "hybrid_override_pattern": "MEM*EMEE", "n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1,
        "moe_intermediate_size": 512, "moe_shared_expert_intermediate_size": 512, "intermediate_size": 2048,
        "mamba_num_heads": 32, "mamba_head_dim": 64, "ssm_state_size": 64, "n_groups": 4, "num_hidden_layers": 8,
    },
}  # fmt: skip
"""Of every family what its configuration has beside ``_ALL``. Nemotron-H has four layers of experts among eight."""
console = Console(stderr=True)


class Row(NamedTuple):
    """One step of a family. done: its plan and report; None where ``said`` says why there is none."""

    family: str
    workload: str
    done: tuple[Plan, Report] | None
    said: str = ""


class Loop:
    """Commands in a folder per family, each run once; deadline: of ``time.monotonic``, after which none begins."""

    def __init__(self, folder: Path, budget: float, deadline: float, accept_noise: bool) -> None:
        self.folder, self.budget, self.deadline, self.accept_noise = folder, budget, deadline, accept_noise

    def rows(self, family: str, workloads: Sequence[str]) -> Iterator[Row]:
        """Of one family: the steps as far as they came."""
        here = self.folder / family
        write_config(here, family)
        steps = [argument for workload in workloads for argument in ("--workload", workload)]
        noise = ("--accept-noise",) if self.accept_noise else ()
        common = ("--model", ".", "--ranks", "2", "--budget", f"{self.budget:g}")
        refused = self._made(here, "cluster.json", "profile", *common, *noise, *steps)
        for workload in workloads:
            name = workload.replace(":", "-").replace("@", "-")
            plan, report = f"{name}.plan.json", f"{name}.report.json"
            said = (
                refused
                or self._made(here, plan, "solve", "--model", ".", "--workload", workload)
                or self._made(here, report, "run", plan, "--tolerance", ANY_ERROR)
            )
            done = None if said else (Plan.read(here / plan), Report.read(here / report))
            yield Row(family, workload, done, said)

    def _made(self, here: Path, output: str, *arguments: str) -> str:
        """Have a command write a file that is not there yet; what keeps it from being there, in one line."""
        if (here / output).exists():
            return ""
        if time.monotonic() > self.deadline:
            return "not yet: run the same command again"
        console.print(f"{here.name}: moeplan {shlex.join(arguments)}", style="dim")
        command = [sys.executable, "-m", "moeplan", *arguments, "--output", output]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
        if (here / output).exists() and done.returncode < REFUSED:
            return ""
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return f"moeplan {arguments[0]}: {lines[-1]}"


def configuration(family: str) -> dict[str, Any]:
    """Its ``config.json``."""
    return {"model_type": family} | _ALL | SMALL[family]


def write_config(here: Path, family: str) -> None:
    """The family's config.json. Ends the program where the folder has another one."""
    path, text = here / "config.json", json.dumps(configuration(family), indent=1) + "\n"
    if path.exists() and path.read_text() != text:
        sys.exit(f"{path}: made for other sizes: give another --folder")
    here.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))


def verdict(row: Row) -> str:
    """Of the output beside the unmodified model's."""
    if row.done is None:
        return row.said
    check = row.done[1].check
    if check is None:
        return "not checked"
    return f"{'ok' if check.passed else 'DIFFERS'} ({check.relative_error:.1e}, {check.layers} layers)"


def passed(row: Row) -> bool:
    if row.done is None:
        return False
    check = row.done[1].check
    return check is not None and check.passed


def cells(row: Row) -> list[str]:
    """Strategies, step times, error and memory."""
    if row.done is None:
        return [""] * 7
    plan, report = row.done
    step, strategies = report.step, dict.fromkeys(layer.strategy for layer in plan.layers)
    least = max(memory.total for memory in plan.predicted.memory)
    return [
        ", ".join(strategies),
        *(f"{1e3 * seconds:.1f}" for seconds in (step.predicted, step.measured)),
        f"{step.spread:.0%}",
        f"{step.error:+.1%}",
        *(f"{held / 2**20:.0f}" for held in (least, max(report.memory))),
    ]


def table(rows: Sequence[Row], command: str) -> str:
    lines = [
        "# Families that only Transformers computes, predicted and measured",
        "",
        f"Two local ranks, {processor()}, Linux {platform.release()}; `{command}`. Four layers of 16 experts, f32; "
        "predicted by `moeplan solve` from one profile, measured by `moeplan run` (median step). Error: predicted over "
        "measured less one; spread: (90th - 10th percentile) / median; MiB: of the device that holds most. "
        "Check: output beside the unmodified model's, relative error of as many layers as were compared.",
        "",
        "| family | phase | strategy | predicted ms | measured ms | spread | error | MiB planned | MiB held | check |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    lines += [f"| {' | '.join((row.family, row.workload, *cells(row), verdict(row)))} |" for row in rows]
    errors = [abs(row.done[1].step.error) for row in rows if row.done is not None]
    if errors:
        lines += ["", f"{len(errors)} steps, mean error {mean(errors):.1%}, worst {max(errors):.1%}."]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(SMALL), help="comma-separated")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="comma-separated")
    parser.add_argument("--folder", type=Path, default=HERE.parent / "build" / "loop", help="where all files stay")
    parser.add_argument("--budget", type=float, default=75.0, help="seconds of each profile, about")
    parser.add_argument("--accept-noise", action="store_true", help="beside other programs: times mean little then")
    parser.add_argument("--minutes", type=float, default=1e6, help="after which no further command begins")
    parser.add_argument("--output", type=Path, help="a Markdown file for the table")
    arguments = parser.parse_args()
    families = arguments.families.split(",")
    if unknown := [family for family in families if family not in SMALL]:
        sys.exit(f"{unknown[0]}: no such family here: {', '.join(SMALL)}")
    deadline = time.monotonic() + 60 * arguments.minutes
    loop = Loop(arguments.folder, arguments.budget, deadline, arguments.accept_noise)
    rows = [row for family in families for row in loop.rows(family, arguments.workloads.split(","))]
    command = shlex.join(["python", "-m", "moeplan.benchmarks.loop", *sys.argv[1:]])
    text = table(rows, command)
    print(text)
    if arguments.output:
        write_atomically(arguments.output, lambda file: file.write(text.encode()))
    if not all(map(passed, rows)):
        sys.exit(1)


if __name__ == "__main__":
    main()

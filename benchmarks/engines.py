"""Exports, read back by the engines' own loaders on a CPU.

    python benchmarks/engines.py --folder /tmp/engines-check [engine ...]

For each engine whose loader runs without a GPU (SGLang, vLLM, vllm-ascend, Megatron-Core, DeepSpeed) its package is
downloaded in a pinned version, without dependencies, and unpacked into the folder (about 1 GB of downloads, no CUDA
packages, nothing is installed). For every model family that reaches `export`, a placement is exported by the command
and given to the engine's own code: slot by slot, the expert whose weights a rank would load is compared with the
placement's. Families that `export` refuses go to the engine as well, past the refusal, to see what it does.

TensorRT-LLM is not run: its wheel needs CUDA libraries to import; its rules were read in its sources.
vllm-ascend 0.23.0 has a wheel; 0.23.0.post1, whose files are the same here, has not.
Prints the table and writes it to benchmarks/results/engines.md.
"""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import engine_loaders as loaders
from engine_sources import PACKAGES, unpack
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from moeplan.planner.export import ENGINES, Export, export
from moeplan.planner.export.common import Target
from moeplan.planner.export.families import cell_of
from moeplan.planner.export.vllm_ascend import copy_of
from moeplan.spec.catalogue.huggingface import read_config
from moeplan.spec.model import Model
from moeplan.spec.placement import Placement, PlacementDevice
from moeplan.tests.exports import linear_placement, random_placement

ROOT = Path(__file__).parents[1]
RANKS, EXPERTS = 4, 8
_BASE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_BASE |= {"num_key_value_heads": 4, "vocab_size": 64, "num_experts_per_tok": 2, "head_dim": 8}
_BASE |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
_FINE = {"moe_intermediate_size": 32}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_DEEPSEEK = _FINE | _LATENT | {"n_routed_experts": EXPERTS, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
FAMILIES: dict[str, dict[str, Any]] = {  # small models; DeepSeek's first layer is dense, as is every third of Qwen3's
    "deepseek_v2": _DEEPSEEK | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": {"num_local_experts": EXPERTS},
    "longcat_flash": _LATENT
    | {"n_routed_experts": EXPERTS, "moe_topk": 2, "zero_expert_num": 4, "ffn_hidden_size": 32, "num_layers": 3}
    | {"expert_ffn_hidden_size": 32},
    "mixtral": {"num_local_experts": EXPERTS},
    "olmoe": {"num_experts": EXPERTS},
    "qwen2_moe": _FINE | {"num_experts": EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": _FINE | {"num_experts": EXPERTS, "mlp_only_layers": [1]},
}


class Row(NamedTuple):
    engine: str
    family: str
    loader: str
    result: str
    right: bool | None  # None: not run


class Case:
    """A small model of one family, a placement of it with and one without copies."""

    def __init__(self, family: str, folder: Path) -> None:
        self.config = AutoConfig.for_model(family, **(_BASE | FAMILIES[family]))
        self.model: Model = read_config(self.config.to_dict(), family, f"small {family}", "")
        self.target = Target(self.model, RANKS)
        self.layers = self.target.moe_layers
        self.folder = folder
        devices = tuple(PlacementDevice(host=f"host{rank // 2}", capacity=3) for rank in range(RANKS))
        made = (random_placement(seed, EXPERTS, RANKS, slots, len(self.layers)) for seed, slots in ((1, 3), (2, 2)))
        self.copies, self.single = (one.model_copy(update={"devices": devices}) for one in made)

    def planned(self, placement: Placement) -> loaders.Slots:
        return [[list(rank) for rank in layer.slots] for layer in placement.layers]

    def exported(self, engine: str, placement: Placement, *, refused: bool = False) -> Export:
        """As `moeplan export` writes it; ``refused``: past the refusal, to see what the engine would do."""
        path_of = lambda name: str(self.folder / name)  # noqa: E731
        if refused:
            made = ENGINES[engine].write(placement, self.target, path_of)
        else:
            made = export(placement, engine, self.model, path_of=path_of)
        for name, text in made.files.items():
            (self.folder / name).write_text(text)
        return made


def compared(found: loaders.Slots, planned: loaders.Slots) -> tuple[str, bool]:
    """Whether every slot of every layer holds the planned expert."""
    pairs = [
        (a, b)
        for one, other in zip(found, planned, strict=True)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    wrong = sum(a != b for a, b in pairs)
    return f"{len(pairs) - wrong} of {len(pairs)} slots as planned", not wrong


def sglang(case: Case, roots: dict[str, Path]) -> tuple[str, str, bool]:
    family = case.model.family
    refused = cell_of("sglang", case.model).use == "refuse"
    made = case.exported("sglang", case.copies, refused=refused)
    kind = loaders.SglangRefused if refused else loaders.Sglang
    engine = kind(roots["sglang"], case.model, made.command, case.layers)
    if not refused:
        text, right = compared(engine.slots(), case.planned(case.copies))
        return "compute_initial_expert_location_metadata, FusedMoE.weight_loader", text, right
    if family == "gpt_oss":
        made = case.exported("sglang", case.single, refused=True)
        found = loaders.SglangRefused(roots["sglang"], case.model, made.command, case.layers).gpt_oss()
        text, right = compared(found, case.planned(case.single))
        return "GptOssForCausalLM._load_mxfp4_experts_weights", f"refused by us; else {text}", not right
    if family == "longcat_flash":
        return "LongcatFlashMoE.__init__", *stopped(engine.longcat, ValueError)
    return "ExpertLocationDispatchInfo.init_new", *stopped(engine.mixtral_or_olmoe, AssertionError)


def stopped(run: Callable[[], object], kind: type[Exception]) -> tuple[str, bool]:
    """Whether the engine stops as the table says."""
    try:
        run()
    except kind as error:
        return f"refused by us; else {kind.__name__}: {str(error).split('. ')[0]}", True
    return "refused by us, but the engine does not stop", False


def vllm(case: Case, roots: dict[str, Path]) -> tuple[str, str, bool]:
    """The flags of a linear placement; and whether the balancer works where the table says so."""
    placement = linear_placement(case.model, RANKS)
    made = case.exported("vllm", placement)
    found = loaders.vllm(roots["vllm"], made.command, case.model, RANKS, len(case.layers))
    text, right = compared(found, case.planned(placement))
    balances = loaders.vllm_balances(roots["vllm"], case.model.family)
    told = cell_of("vllm", case.model).use == "yes"
    verdict = "balanced" if balances else "not balanced"
    return "determine_expert_map, MixtureOfExperts", f"linear: {text}; {verdict}", right and balances == told


def vllm_ascend(case: Case, roots: dict[str, Path]) -> tuple[str, str, bool] | None:
    if cell_of("vllm-ascend", case.model).use == "refuse":
        return None
    made = case.exported("vllm-ascend", case.copies)
    degree = int(made.command[made.command.index("--tensor-parallel-size") + 1])
    file = case.folder / "vllm-ascend-expert-map.json"
    found, sent = loaders.vllm_ascend(
        roots["vllm-ascend"], roots["vllm"], file, RANKS, degree, len(case.layers), EXPERTS
    )
    text, right = compared(found, case.planned(case.copies))
    for layer, slots in enumerate(found):
        for expert in range(EXPERTS):
            holders = [rank for rank in range(RANKS) if expert in slots[rank]]
            used = [holders[copy_of(expert, rank, len(holders), degree)] for rank in range(RANKS)]
            right &= used == [sent[layer][rank][expert] for rank in range(RANKS)]
    return "init_eplb_config, generate_log2phy_map", f"{text}; the copy each rank uses as we say", right


def megatron(case: Case, roots: dict[str, Path]) -> tuple[str, str, bool]:
    moe = case.model.moe_block().moe
    placement = linear_placement(case.model, RANKS) if moe and moe.gate.groups > 1 else case.single
    made = case.exported("megatron", placement)
    found = loaders.megatron(roots["megatron"], made.files["expert-permutation.json"], RANKS)
    planned = [[sorted(rank) for rank in layer] for layer in case.planned(placement)]
    text, right = compared([[sorted(rank) for rank in layer] for layer in found], planned)
    return "BaseMoELayer.__init__", text + (" (linear: groups)" if placement is not case.single else ""), right


def deepspeed(case: Case, roots: dict[str, Path]) -> tuple[str, str, bool] | None:
    if cell_of("deepspeed", case.model).use == "refuse":
        return None
    made = case.exported("deepspeed", case.single)
    (text,) = made.files.values()
    network = AutoModelForCausalLM.from_config(case.config)
    found = loaders.deepspeed(roots["deepspeed"], json.loads(text), network, RANKS)
    said, right = compared(found, case.planned(linear_placement(case.model, RANKS)))
    return "AutoEP.ep_parser, repack_expert_weights", f"linear, as we say: {said}", right


CHECKS = {"sglang": sglang, "vllm": vllm, "vllm-ascend": vllm_ascend, "megatron": megatron, "deepspeed": deepspeed}


def rows(engines: list[str], roots: dict[str, Path]) -> Iterator[Row]:
    for engine in engines:
        title = f"{ENGINES[engine].title} {PACKAGES[engine][0][1]}"
        for family in FAMILIES:
            with tempfile.TemporaryDirectory() as folder:
                case = Case(family, Path(folder))
                outcome = CHECKS[engine](case, roots)
            loader, result, right = outcome or ("-", "refused by us; not run", None)
            yield Row(title, family, loader, result, right)
    yield Row(
        f"TensorRT-LLM {ENGINES['tensorrt-llm'].version}", "all", "-", "not run: needs CUDA; by its sources", None
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", choices=[*CHECKS, []], help="by default all that run on a CPU")
    parser.add_argument("--folder", type=Path, required=True, help="where the packages are downloaded and unpacked")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "engines.md")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    engines = args.engines or list(CHECKS)
    needed = {*engines, *(["vllm"] if "vllm-ascend" in engines else [])}
    roots = {engine: unpack(engine, args.folder) for engine in sorted(needed)}
    found = list(rows(engines, roots))
    show(found, args.output if not args.engines else None)
    sys.exit(any(row.right is False for row in found))


def show(found: list[Row], output: Path | None) -> None:
    heads = ("engine", "family", "loader, run on a CPU", "result", "right")
    cells = [(*row[:4], {True: "yes", False: "NO", None: "-"}[row.right]) for row in found]
    table = Table(*heads)
    for row in cells:
        table.add_row(*row)
    Console(width=170).print(table)
    if output:
        lines = [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *cells)]
        head = "# Exports, read back by the engines' own loaders\n\n"
        head += (
            f"{date.today()}, `python benchmarks/engines.py`: {RANKS} ranks, {EXPERTS} experts, 3 slots per rank where "
        )
        head += "the engine has copies. Exit status 1 if a line is not as `docs/engines.md` says.\n\n"
        output.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

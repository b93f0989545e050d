"""What each engine's own code makes of an exported file, on a CPU: per layer and rank, the experts in its slots.

Every function here calls the engine's loader, taken from its package (``engine_sources``), with stand-ins only for what
needs a GPU or a running server: configuration getters, process groups, the copying of a weight. It returns
[layers with experts][ranks][slots], or raises what the engine raises.
"""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from engine_sources import Source

from moeplan.planner.export.megatron import ExpertPermutation
from moeplan.spec.model import Model

Slots = list[list[list[int]]]
CLASSES = {  # family -> SGLang's file, vLLM's file, class
    "deepseek_v2": ("deepseek_v2", "deepseek_v2", "DeepseekV2ForCausalLM"),
    "deepseek_v3": ("deepseek_v2", "deepseek_v2", "DeepseekV3ForCausalLM"),
    "gpt_oss": ("gpt_oss", "gpt_oss", "GptOssForCausalLM"),
    "longcat_flash": ("longcat_flash", "longcat_flash", "LongcatFlashForCausalLM"),
    "mixtral": ("mixtral", "mixtral", "MixtralForCausalLM"),
    "olmoe": ("olmoe", "olmoe", "OlmoeForCausalLM"),
    "qwen2_moe": ("qwen2_moe", "qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "qwen3_moe", "Qwen3MoeForCausalLM"),
}


def stub(name: str, **members: Any) -> ModuleType:
    """A module in place of one that needs a GPU or a server to import."""
    module = ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module
    return module


def hf_config(model: Model) -> SimpleNamespace:
    """The fields of a Hugging Face configuration that the hooks read."""
    moe = model.moe_block().moe
    assert moe is not None
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    layers = len(model.layers) // (2 if model.family == "longcat_flash" else 1)
    return SimpleNamespace(num_hidden_layers=layers, n_group=moe.gate.groups, **dict.fromkeys(names, moe.num_experts))


class Sglang:
    """``srt/eplb/expert_location.py`` whole, the model class's own hook, and ``FusedMoE.weight_loader``."""

    def __init__(self, root: Path, model: Model, command: list[str], layers: tuple[int, ...]) -> None:
        self.root, self.model, self.layers = root / "sglang" / "srt", model, layers
        flags = dict(zip(command, [*command[1:], ""], strict=True))
        self.ranks = int(flags["--ep-size"])
        moe = SimpleNamespace(
            ep_num_redundant_experts=int(flags.get("--ep-num-redundant-experts", "0")),
            ep_dispatch_algorithm=flags.get("--ep-dispatch-algorithm", "static"),  # its default with a placement
            init_expert_location=flags["--init-expert-location"],
            moe_a2a_backend=flags["--moe-a2a-backend"],
            ep_join_mode=None,
        )
        parallel = SimpleNamespace(
            ep_size=self.ranks, nnodes=int(flags.get("--nnodes", "1")), elastic_ep_initial_size=None
        )
        self.resources = SimpleNamespace(expert_location_metadata=None)
        stub(
            "sglang.srt.runtime_context",
            get_exec=lambda: SimpleNamespace(moe=moe),
            get_parallel=lambda: parallel,
            get_device=lambda: SimpleNamespace(device="cpu"),
            get_resources=lambda: self.resources,
        )
        stub("sglang.srt.elastic_ep.elastic_ep", elastic_expanded_world_enabled=lambda: False)
        stub("sglang.srt.model_loader", get_model_architecture=lambda config: (self._class(), ""))
        # Packages without what their __init__ imports.
        for name in ("sglang", "sglang.srt", "sglang.srt.eplb"):
            stub(name, __path__=[str(root / name.replace(".", "/"))])
        for name in ("expert_location", "expert_location_dispatch"):
            sys.modules.pop(f"sglang.srt.eplb.{name}", None)
        from sglang.srt.eplb import expert_location, expert_location_dispatch

        self.location, self.dispatch = expert_location, expert_location_dispatch

    def _class(self) -> type:
        file, _, name = CLASSES[self.model.family]
        given = {"ModelConfigForExpertLocation": self.location.ModelConfigForExpertLocation}
        hook = ("get_model_config_for_expert_location",)
        return Source(self.root / "models" / f"{file}.py").bare_class(name, hook, **given)

    def slots(self) -> Slots:
        """The weights that each rank loads; also that its router then finds each expert where its weights are."""
        found: Slots = [[[] for _ in range(self.ranks)] for _ in self.layers]
        for rank in range(self.ranks):
            config = SimpleNamespace(hf_config=hf_config(self.model))
            self.resources.expert_location_metadata = self.location.compute_initial_expert_location_metadata(
                config, rank
            )
            for i, layer in enumerate(self.layers):
                info = self.dispatch.ExpertLocationDispatchInfo.init_new(layer)
                physical = self.resources.expert_location_metadata.physical_to_logical_map
                found[i][rank] = self._loaded(rank, layer, physical.shape[1])
                logical = torch.arange(self.resources.expert_location_metadata.num_logical_experts)
                sent = self.dispatch.topk_ids_logical_to_physical(logical, info)
                assert torch.equal(physical[layer][sent], logical)
        return found

    def _loaded(self, rank: int, layer: int, slots: int) -> list[int]:
        """Checkpoint experts in the rank's slots, by ``FusedMoE.weight_loader`` with a loader that only notes them."""
        source = Source(self.root / "layers" / "moe" / "fused_moe_triton" / "layer.py")
        methods = ("weight_loader", "_weight_loader_physical", "_map_global_expert_id_to_local_expert_id")
        fused = source.bare_class(
            "FusedMoE",
            methods,
            get_global_expert_location_metadata=self.location.get_global_expert_location_metadata,
            uses_per_rank_fused_shared_slots=lambda: False,
            KTEPWrapperMethod=type("KTEPWrapperMethod", (), {}),
        )()
        local = slots // self.ranks
        vars(fused).update(
            quant_config=None, quant_method=None, uses_expert_location=True, layer_id=layer, moe_ep_size=self.ranks,
            num_fused_shared_experts=0, num_local_experts=local, _has_fused_shared=False, _num_local_routed=local,
            _num_global_routed=slots, _expert_storage_rank=rank,
        )  # fmt: skip
        held: dict[int, int] = {}
        for expert in range(hf_config(self.model).num_experts):
            fused._weight_loader_impl = lambda expert_id, _e=expert, **rest: held.__setitem__(expert_id, _e)
            fused.weight_loader(SimpleNamespace(), None, "w2_weight", "w2", expert)
        return [held[slot] for slot in range(local)]


class SglangRefused(Sglang):
    """What SGLang does for the families that we refuse, by the same placement."""

    def mixtral_or_olmoe(self) -> None:
        """No hook: the first forward pass asks for metadata that are not there."""
        config = SimpleNamespace(hf_config=hf_config(self.model))
        self.resources.expert_location_metadata = self.location.compute_initial_expert_location_metadata(config, 0)
        self.dispatch.ExpertLocationDispatchInfo.init_new(self.layers[0])

    def longcat(self) -> None:
        source = Source(self.root / "models" / "longcat_flash.py")
        runtime = sys.modules["sglang.srt.runtime_context"]
        layer = source.bare_class("LongcatFlashMoE", ("__init__",), get_exec=runtime.get_exec)
        layer.__init__.__globals__["super"] = lambda: SimpleNamespace(__init__=lambda: None)
        moe = self.model.moe_block().moe
        assert moe is not None
        fields = {"routed_scaling_factor": 1.0, "n_routed_experts": moe.num_experts, "moe_topk": moe.top_k}
        layer(SimpleNamespace(**fields, zero_expert_num=moe.zero_experts, zero_expert_type="identity"), 0)

    def gpt_oss(self) -> Slots:
        """Experts whose down projection's bias each rank gets from ``_load_mxfp4_experts_weights``."""
        source = Source(self.root / "models" / "gpt_oss.py")
        method = ("_load_mxfp4_experts_weights",)
        experts = hf_config(self.model).num_local_experts
        slots: Slots = []
        for layer in self.layers:
            name = f"model.layers.{layer}.mlp.experts.down_proj_bias"
            ranks = []
            for rank in range(self.ranks):
                held: list[int] = []
                network = source.bare_class(
                    "GptOssForCausalLM", method, math=math, torch=torch, default_weight_loader=None
                )()
                network.config = SimpleNamespace(intermediate_size=32, num_local_experts=experts)
                part = SimpleNamespace(moe_tp_rank=0, moe_tp_size=1, moe_ep_rank=rank, moe_ep_size=self.ranks)
                network.get_submodule = lambda name, _part=part: _part
                parameter: Any = torch.nn.Parameter(torch.zeros(1))
                parameter.weight_loader = lambda p, weight, _held=held, **rest: _held.extend(map(int, weight[:, 0]))
                network.named_parameters = lambda _n=name, _p=parameter: [
                    (_n.replace("down_proj_bias", "w2_weight_bias"), _p)
                ]
                network._load_mxfp4_experts_weights([(name, torch.arange(experts)[:, None].repeat(1, 4))])
                ranks.append(held)
            slots.append(ranks)
        return slots


def vllm_ascend(root: Path, vllm: Path, file: Path, ranks: int, degree: int, layers: int, experts: int) -> tuple:
    """``init_eplb_config`` of model runner V1 for every layer and rank: the slots, and the copy that each rank uses.

    The second value: [layers][ranks][experts] the rank that holds the copy to which this rank sends the expert.
    """
    source = Source(root / "vllm_ascend" / "eplb" / "core" / "eplb_utils.py")
    manager = Source(vllm / "vllm" / "model_executor" / "layers" / "fused_moe" / "expert_map_manager.py")
    torch.Tensor.npu = lambda tensor: tensor  # type: ignore[attr-defined]
    given: dict[str, Any] = {"torch": torch, "np": np, "json": json, "defaultdict": defaultdict, "logger": _Quiet()}
    given["determine_expert_map"] = manager.function("determine_expert_map", torch=torch)
    for name in ("expert_file_to_tensor", "generate_global_placement", "generate_log2phy_map"):
        given[name] = source.function(name, **given)
    init = source.function("init_eplb_config", **given)
    config = SimpleNamespace(expert_map_path=str(file), dynamic_eplb=False, num_redundant_experts=0)
    slots: Slots = [[[] for _ in range(ranks)] for _ in range(layers)]
    sent: Slots = [[[] for _ in range(ranks)] for _ in range(layers)]
    for layer in range(layers):
        for rank in range(ranks):
            moe = SimpleNamespace(num_experts=experts, ep_size=ranks, ep_rank=rank)
            _, local, log2phy, _ = init(config, layer, moe, tp_size=degree)
            size = int((local >= 0).sum())
            slots[layer][rank] = [int((local == slot).nonzero()) for slot in range(size)]
            sent[layer][rank] = [int(physical) // size for physical in log2phy]
    return slots, sent


class _Quiet:
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **rest: None


def vllm(root: Path, flags: list[str], model: Model, ranks: int, layers: int) -> Slots:
    """``determine_expert_map`` of the strategy with which vLLM ends, on every rank."""
    source = Source(root / "vllm" / "model_executor" / "layers" / "fused_moe" / "expert_map_manager.py")
    moe = model.moe_block().moe
    assert moe is not None
    found = dict(zip(flags, [*flags[1:], ""], strict=True))
    data = int(found.get("--data-parallel-size", "1"))
    parallel = SimpleNamespace(use_all2all_kernels=data > 1, needs_round_robin_routing_tables=False, all2all_backend="")
    strategy = source.function("determine_expert_placement_strategy", logger=_Quiet())(
        found["--expert-placement-strategy"], parallel, moe.gate.groups, 0, "--enable-eplb" in flags
    )
    rank_of = source.function("determine_expert_map", torch=torch)
    maps = [rank_of(ranks, rank, moe.num_experts, strategy)[1] for rank in range(ranks)]
    return [[[int(e) for e in (one >= 0).nonzero().flatten()] for one in maps]] * layers


def vllm_balances(root: Path, family: str) -> bool:
    """Whether the class of this family is one for which vLLM's balancer does anything."""
    _, file, name = CLASSES[family]
    source = Source(root / "vllm" / "model_executor" / "models" / f"{file}.py")
    return any("MixtureOfExperts" in base for base in source.bases(name))


def megatron(root: Path, permutation: str, ranks: int) -> Slots:
    """``BaseMoELayer.__init__`` on every rank: the old experts at the positions that it calls its own."""
    source = Source(root / "megatron" / "core" / "transformer" / "moe" / "moe_layer.py")
    given: dict[str, Any] = {
        "utils": SimpleNamespace(get_pg_size=lambda group: ranks, get_pg_rank=lambda group: group.rank)
    }
    base = type("MegatronModule", (), {"__init__": lambda self, config: None})
    layer = source.bare_class("BaseMoELayer", ("__init__",), base, **given)
    layer.__init__.__globals__["BaseMoELayer"] = layer
    found = ExpertPermutation.parse(permutation, "expert-permutation.json")
    slots: Slots = []
    for order in found.layers.values():
        config = SimpleNamespace(
            num_moe_experts=found.num_experts, moe_shared_expert_intermediate_size=None, moe_shared_expert_overlap=False
        )
        groups = [SimpleNamespace(ep=SimpleNamespace(rank=rank), tp=None, expt_tp=None) for rank in range(ranks)]
        layers = [layer(config, pg_collection=PartOfCollection(group)) for group in groups]
        slots.append([[order[position] for position in one.local_expert_indices] for one in layers])
    return slots


class PartOfCollection:
    """A process-group collection whose other groups are None."""

    def __init__(self, known: SimpleNamespace) -> None:
        self._known = known

    def __getattr__(self, name: str) -> Any:
        return getattr(self._known, name, None)


def deepspeed(root: Path, section: dict[str, Any], network: Any, ranks: int) -> Slots:
    """AutoEP's own configuration, detection and repacking for every rank, on a small model of Transformers.

    The experts are told apart by their values: expert e holds e everywhere.
    """
    sys.path.insert(0, str(root))
    from deepspeed.module_inject import auto_ep_config
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.moe.ep_repack import repack_expert_weights

    sys.path.remove(str(root))
    config = auto_ep_config.parse_autoep_config(section["expert_parallel"])
    for stage in (0, 3):
        auto_ep_config.validate_autoep_config(config, ranks, 1, 1, 1, zero_stage=stage)
    specs = AutoEP(network, config).ep_parser()
    auto_ep_config.validate_autoep_post_detection(config, specs)
    slots: Slots = []
    for spec in specs:
        experts = network.get_submodule(f"{spec.moe_module_name}.{spec.experts_name}")
        for parameter in experts.parameters():
            values = torch.arange(len(parameter), dtype=parameter.dtype)
            parameter.data[:] = values.view(-1, *[1] * (parameter.dim() - 1))
        parts = [repack_expert_weights(experts, spec, rank, ranks) for rank in range(ranks)]
        assert all(torch.equal(w[:, :1, :1], w2[:, :1, :1]) for w1, w2, w3 in parts for w in (w1, w3))
        slots.append([[int(value) for value in w2[:, 0, 0]] for _, w2, _ in parts])
    return slots

"""A plan's execution equals Transformers' causal models: logits of a prefill and of eight decode steps.

Each number of ranks is started once and runs every family and every way to divide the work.
"""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from moeplan.runtime.check import gather_rows
from moeplan.runtime.checkpoint import Checkpoint
from moeplan.runtime.executor import Executor
from moeplan.runtime.launch import LocalLauncher, Rank
from moeplan.runtime.layout import Layout
from moeplan.spec import Model, Plan, Workload
from moeplan.spec.catalogue import load_model
from moeplan.spec.offload import Offload
from moeplan.spec.plan import LayerPlan
from moeplan.spec.routing import Routing
from moeplan.tests.plans import even_slots, hand_made_plan, made_up_foresight

PROMPT, DECODE = 5, 8
SIZES = {"vocab_size": 89, "hidden_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = ("mixtral", "qwen3_moe", "olmoe")
TOLERANCE = 1e-4

# Experts of each device, by the number of devices; columns likewise.
EXPERTS = 8
COPIES = {
    1: (tuple(range(8)),),
    2: ((0, 1, 2, 3, 7), (3, 0, 7, 4, 5, 6)),
    4: ((0, 1, 2), (2, 0, 3, 4), (), (5, 6, 7, 0)),
}
UNEVEN = {1: (tuple(range(8)),), 2: ((5,), (0, 1, 2, 3, 4, 6, 7)), 4: ((7, 1), (), (0, 2, 3, 4, 6), (5,))}
SPLIT = {1: (24,), 2: (24, 0), 4: (9, 0, 1, 14)}
SPEEDS = (1.0, 0.3, 2.0, 0.7)
PLACES = {1: (1,), 2: (1, 3), 4: (2, 1, 0, 4)}  # for experts that are read from a disk


def cases(world: int) -> dict[str, tuple[int, tuple[int, ...], tuple[LayerPlan, ...]]]:
    """name -> (tensor, tokens of each device per step of the prompt, layers)."""
    even = even_slots(EXPERTS, world)
    ep, ep_copies = LayerPlan(strategy="ep", slots=even), LayerPlan(strategy="ep", slots=COPIES[world])
    sharded = LayerPlan(strategy="sharded", slots=((),) * world, split=SPLIT[world])
    gathered = LayerPlan(strategy="gathered", slots=UNEVEN[world])
    parts = [{e: 0.3 + 0.1 * e + g for e in held} for g, held in enumerate(COPIES[world])]
    shares = tuple(tuple(part / sum(p.get(e, 0) for p in parts) for e, part in held.items()) for held in parts)
    ep_shares = LayerPlan(strategy="ep", slots=COPIES[world], shares=shares)
    hierarchical = LayerPlan(strategy="hierarchical", slots=COPIES[world])
    hierarchical_shares = LayerPlan(strategy="hierarchical", slots=COPIES[world], shares=shares)
    # Three sequences in all; with four groups, one device has none.
    alone = {1: (3,), 2: (2, 1), 4: (1, 0, 1, 1)}[world]
    tokens = tuple(PROMPT * n for n in alone)
    found = {
        "ep": (1, tokens, (ep,)),
        "ep copies": (1, tokens, (ep_copies, ep_shares)),
        "ep, shares by batch": (1, tokens, (LayerPlan(strategy="ep", slots=COPIES[world], speeds=SPEEDS[:world]),)),
        "hierarchical": (1, tokens, (hierarchical, hierarchical_shares)),
        "sharded": (1, tokens, (sharded,)),
        "gathered": (1, tokens, (gathered,)),
        "mixed": (1, tokens, (gathered, sharded, ep)),
        "offload": (1, tokens, (offloaded(COPIES[world], None, 1, 9), offloaded(COPIES[world], None, 0, 0))),
        "offload, foreseen": (1, tokens, (offloaded(COPIES[world], None, 1, 9), offloaded(UNEVEN[world], None, 0, 0))),
        "offload, shares": (1, tokens, (offloaded(COPIES[world], shares, 2, 1), offloaded(UNEVEN[world], None, 0, 9))),
        "offload, by hosts": (1, tokens, (hosted(COPIES[world], 2), hosted(UNEVEN[world], 10**6))),
        "gathered, then hierarchical": (1, tokens, (gathered, hierarchical)),
    }
    if world > 1:
        pairs = {2: (4, 11), 4: (9, 1, 0, 5)}[world]
        found |= {
            "ep, tensor 2": (2, pairs, (ep_copies,)),
            "hierarchical, tensor 2": (2, pairs, (hierarchical,)),
            "sharded, tensor 2": (2, pairs, (sharded,)),
            "offload, tensor 2": (2, pairs, (offloaded(COPIES[world], None, 1, 1),)),
            "offload, foreseen, tensor 2": (2, pairs, (offloaded(COPIES[world], None, 1, 0),)),
            "gathered, tensor 2": (2, pairs, (gathered,)),
        }
    return found


def offloaded(slots, shares, stay: int, early: int) -> LayerPlan:
    """So many of each device's experts stay, at most, the next ones are read ahead; the third device's all stay."""
    resident = tuple(held if g == 2 else held[:stay] for g, held in enumerate(slots))
    ahead = tuple(() if g == 2 else held[stay : stay + early] for g, held in enumerate(slots))
    return LayerPlan(strategy="offload", slots=slots, shares=shares, resident=resident, ahead=ahead)


def hosted(slots, rows: int) -> LayerPlan:
    """Experts that rest in the memory of a host, which computes those of few rows."""
    plan = offloaded(slots, None, 1, 1)
    return plan.model_copy(update={"host_rows": (rows,) * len(slots)})


def case_plan(model: Model, world: int, name: str, folder: Path) -> Plan:
    tensor, tokens, layers = cases(world)[name]
    offload = None
    if name.startswith("offload"):
        both = [layers[i % len(layers)] for i in range(SIZES["num_hidden_layers"])]
        foresight = made_up_foresight(both, EXPERTS) if "foreseen" in name else None
        where = "" if "hosts" in name else str(folder)
        offload = Offload(folder=where, places=PLACES[world], foresight=foresight)
    workload = Workload(phase="prefill", tokens=3 * PROMPT, sequences=3)
    hosts = ["a", "a", "b", "b"][:world]
    return hand_made_plan(model, workload, layers, tokens=tokens, tensor=tensor, hosts=hosts, offload=offload)


def logits_of(plan: Plan, rank: int, folder: Path, tokens: torch.Tensor, forced: Routing | None = None) -> torch.Tensor:
    """Logits [1 + DECODE, sequences, V] on rank 0: after the prompt, then after each further token.

    tokens: [sequences, PROMPT + DECODE].
    """
    source = Checkpoint(plan.model, folder, torch.float32)
    executor = Executor(plan, rank, source, device=torch.device("cpu"), capacity=PROMPT + DECODE)
    layout, found = executor.layout, []
    for context in (0, *range(PROMPT, PROMPT + DECODE)):
        fresh = tokens[:, context : context + layout.length].reshape(-1)
        choices = executor.forced(forced, layout) if forced is not None and context == 0 else None
        output = executor.step(fresh[layout.own], layout, context, forced=choices)
        found.append(gather_rows(output.logits, layout.last_counts))
        layout = executor.layout.decode()
    return torch.stack(found)


def on_rank(rank: Rank, job: dict) -> dict[str, float]:
    """Relative error of each family and case, on rank 0."""
    found = {}
    for family in FAMILIES:
        folder = Path(job["folder"]) / family
        wanted = load_file(folder / "wanted" / "logits.safetensors")
        for name in cases(rank.world):
            plan = case_plan(load_model(str(folder)), rank.world, name, folder)
            got = logits_of(plan, rank.rank, folder, wanted["tokens"])
            if rank.rank == 0:
                error = (got - wanted["logits"]).abs().max() / wanted["logits"].abs().max()
                found[f"{family}: {name}"] = error.item()
        rank.emit({"family": family})
    return found


def transformers_model(family: str):
    """Random weights; a router whose skew leaves experts idle."""
    import transformers as hf

    torch.manual_seed(1)
    ffn = {"intermediate_size": 24} if family != "qwen3_moe" else {"moe_intermediate_size": 24, "intermediate_size": 40}
    top_k = {"num_experts_per_tok": 2, "max_position_embeddings": 64}
    if family == "mixtral":
        model = hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, **ffn, **top_k, num_local_experts=EXPERTS))
    elif family == "qwen3_moe":
        model = hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(**SIZES, **ffn, **top_k, num_experts=EXPERTS, norm_topk_prob=True)
        )
    else:
        sizes = {k: v for k, v in SIZES.items() if k != "head_dim"}
        model = hf.OlmoeForCausalLM(hf.OlmoeConfig(**sizes, **ffn, **top_k, num_experts=EXPERTS, norm_topk_prob=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("gate.weight"):
                parameter.mul_(40)
                parameter[6:] = -parameter[:2]  # of 0 and 6, and of 1 and 7, one has a large logit
                parameter[2:6] *= 0.01
            elif parameter.dim() > 1:
                parameter.mul_(3)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """For each family a checkpoint, tokens, and the logits that Transformers gives."""
    base = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        model = transformers_model(family)
        model.save_pretrained(base / family)
        tokens = torch.randint(SIZES["vocab_size"], (3, PROMPT + DECODE), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            output = model(tokens, output_router_logits=True)
        logits = output.logits[:, PROMPT - 1 :].transpose(0, 1).contiguous()
        chosen = [layer.view(3, -1, EXPERTS)[:, :PROMPT].topk(2).indices for layer in output.router_logits]
        counts = torch.stack([torch.bincount(c.reshape(-1), minlength=EXPERTS) for c in chosen])
        assert (counts == 0).any(1).all(), counts  # idle experts in every layer
        assert (counts.max(1).values >= 2 * counts.float().mean(1)).all(), counts
        (base / family / "wanted").mkdir()
        wanted = {"tokens": tokens, "logits": logits, "counts": counts}
        save_file(wanted, base / family / "wanted" / "logits.safetensors")
    return base


@contextmanager
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def errors(folder) -> dict[int, dict[str, float]]:
    """Relative errors by number of ranks; one rank needs no process of its own."""
    job = {"folder": str(folder)}
    launched = {
        world: LocalLauncher(world).run("moeplan.tests.test_executor:on_rank", job, timeout=120)[0] for world in (2, 4)
    }
    here = Rank(0, 1, ("here",), torch.device("cpu"), 1, 1.0, lambda event: None)
    with one_rank():
        return launched | {1: on_rank(here, job)}


@pytest.mark.parametrize(
    ("world", "family", "name"), [(w, f, n) for w in (1, 2, 4) for f in FAMILIES for n in cases(w)]
)
def test_logits_equal_transformers(errors, world, family, name):
    assert errors[world][f"{family}: {name}"] < TOLERANCE


def test_a_forced_routing_changes_the_output(folder):
    """The error of a wrong expert is far beyond the tolerance, so the equality above means something."""
    wanted = load_file(folder / "mixtral" / "wanted" / "logits.safetensors")
    plan = case_plan(load_model(str(folder / "mixtral")), 1, "ep", folder)
    ids = torch.tensor([6, 7]).expand(3 * PROMPT, 2, 2).numpy()
    forced = Routing(ids, torch.full(ids.shape, 0.5).numpy())
    with one_rank():
        got = logits_of(plan, 0, folder / "mixtral", wanted["tokens"], forced)
    assert ((got - wanted["logits"]).abs().max() / wanted["logits"].abs().max()).item() > 100 * TOLERANCE


def test_layout():
    layout = Layout(rank=3, tensor=2, tokens=(7, 1, 5, 3), sequences=(2, 2), length=4)
    assert (layout.own, layout.group_tokens, layout.group_sequences) == (slice(13, 16), (5, 3), (2, 4))
    assert (layout.batch(9).sequences, layout.batch(9).length, layout.batch(9).context) == (2, 4, 9)
    assert layout.last_counts == [1, 1, 1, 1]
    rows = [Layout(r, 2, layout.tokens, layout.sequences, 4).last_rows for r in range(4)]
    assert rows == [[3], [0], [3], [2]]
    assert layout.decode().tokens == (1, 1, 1, 1)
    assert Layout(0, 2, (5, 0), (5,), 1).decode().tokens == (3, 2)

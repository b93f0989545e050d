"""The numerical check: a plan's output beside the plain single-process reference, on as many layers as time allows."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ..spec import Model, Plan
from ..spec.model import DTYPE_BYTES, Block
from ..spec.routing import Routing
from .collectives import all_to_all
from .executor import DTYPES, Executor, Output
from .families.source import FamilyWeights
from .reference import ReferenceModel
from .router import Chooser, choose
from .vocabulary import embed, head
from .weights import WeightSource

if TYPE_CHECKING:
    from .families.execute import FamilyExecutor


# Largest relative error of the output. In bf16 and f16 sums over experts and devices round in another order, layer
# after layer; a wrong expert, weight or token gives errors of order 1.
TOLERANCE = {"f32": 1e-4, "bf16": 5e-2, "f16": 1e-2}


def first_layers(model: Model, layers: int) -> Model:
    """The model that ends after so many layers."""
    return Model(**model.model_dump(exclude={"blocks"}), blocks=model.layers[:layers])


def checked_layers(plan: Plan, seconds: float, memory: int, step_seconds: float, load_seconds: float) -> int:
    """Layers that the reference computes within ``seconds`` and ``memory`` bytes; 0: not one with experts fits.

    One process does the work of all devices and, one layer at a time, draws or reads all weights. The first layer with
    experts is checked even if it takes longer.
    """
    model, workload, size = plan.model, plan.workload, DTYPE_BYTES[plan.dtype]
    count = len(model.layers)
    each = len(plan.devices) * (step_seconds / count + load_seconds / plan.stored_layers)
    layers = max(model.moe_layers[0] + 1, min(count, int(seconds / each)))
    positions = workload.sequences * (workload.context + workload.length)
    cache = [size * positions * cached_values(block) for block in model.layers]
    # The next layer is made while the last one is still held.
    weights = size * (2 * max(map(layer_parameters, model.layers)) + model.embedding_parameters())
    while layers and sum(cache[:layers]) + weights > memory:
        layers -= 1
    return layers if layers > model.moe_layers[0] else 0


def cached_values(block: Block) -> int:
    """Values that the runtime's cache holds for a token in one layer."""
    if block.counted is not None:
        return block.counted.held_values
    return block.attention.cache_values() if block.attention else 0


def layer_parameters(block: Block) -> int:
    moe = block.moe
    return block.always_on_parameters() + (moe.num_experts * moe.expert_parameters(block.hidden_size) if moe else 0)


def gather_rows(own: Tensor, counts: Sequence[int]) -> Tensor:
    """All ranks' rows on rank 0, in rank order; nothing elsewhere. own: [counts[rank], ...]."""
    rank, world = dist.get_rank(), len(counts)
    send = [len(own)] + [0] * (world - 1)
    return all_to_all(own, send, list(counts) if rank == 0 else [0] * world)


def planned_output(
    executor: "Executor | FamilyExecutor",
    inputs: Tensor,
    routing: Routing | None,
    context: int,
    layers: int,
    chooser: Chooser = choose,
) -> Output:
    """The executor's output after ``layers`` layers, of all devices, on rank 0."""
    layout = executor.layout
    forced = executor.forced(routing, layout) if routing else None
    output = executor.step(inputs[layout.own], layout, context, forced=forced, layers=layers, chooser=chooser)
    hidden = gather_rows(output.hidden, layout.tokens)
    return Output(hidden, None if output.logits is None else gather_rows(output.logits, layout.last_counts))


def reference_output(
    plan: Plan, source: WeightSource | FamilyWeights, inputs: Tensor, routing: Routing | None, chooser: Chooser = choose
) -> Output:
    """The same by the single-process reference on ``source``'s (shortened) model."""
    if isinstance(source, FamilyWeights):
        from .families.reference import family_output  # and Transformers with it

        return family_output(plan, source, len(source.model.layers), inputs, routing)
    model, workload = source.model, plan.workload
    reference = ReferenceModel(
        model,
        source,
        sequences=workload.sequences,
        capacity=workload.context + workload.length,
        dtype=DTYPES[plan.dtype],
        device=inputs.device,
    )
    reference.fill_context(workload.context, plan.seed)
    x = embed(inputs, source.embedding()) if model.vocab_size else inputs
    hidden = reference.forward_hidden(x, routing, chooser)
    if not model.vocab_size:
        return Output(hidden, None)
    last = hidden[workload.length - 1 :: workload.length]
    return Output(hidden, head(last, source.final_norm(), model.norm_eps, source.head(), kernel=reference.kernel))


def relative_error(output: Output, reference: Output) -> float:
    """max |output - reference| / max |reference|, the larger of hidden states and logits; huge where not finite."""
    worst = 0.0
    for got, wanted in zip(output, reference, strict=True):
        if wanted is None or got is None:
            continue
        error = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max()
        worst = max(worst, error.item() if torch.isfinite(error) else sys.float_info.max)
    return worst

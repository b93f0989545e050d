"""What no placement of experts can beat: a lower bound on layers, before any placement is looked for."""

# L mixture-of-experts layers, G devices

import numpy as np

from ..spec.model import Block
from ..spec.operators import expert_shape
from ..spec.plan import Strategy
from .clock import longest_chains
from .costs import Costs
from .step import Step
from .strategies import ep, hierarchical
from .strategies.layer import Layer

FAR = 1e3  # times the largest measured number of rows: where the last slope of a curve is all that counts


def row_rates(costs: Costs, block: Block) -> np.ndarray:
    """[kinds] least seconds per row of an expert on each kind of device, over the whole curve.

    Curves are linear between measured points, so that the least is at a point or in the last slope.
    """
    assert block.moe is not None
    rates = []
    for device in costs.representatives:
        table = costs.table(device, "expert_ffn", expert_shape(block))
        axes = dict(zip((axis.name for axis in table.axes), table.values, strict=True))
        experts = np.append(axes["experts"], block.moe.num_experts)[:, None]
        tokens = np.append(axes["tokens"], FAR * axes["tokens"][-1])[None, :]
        seconds, _ = table.read(ffn=block.moe.ffn_size, experts=experts, tokens=tokens)
        rates.append(float((seconds / (experts * tokens)).min()))
    return np.array(rates)


def placed_floor(step: Step, strategy: Strategy, degree: int, copies: bool) -> np.ndarray:
    """[L] seconds: no placement with this expert degree has a ``Chains.slowest`` of a layer below it; strategy: one of
    ``offered.PLACED``.

    Outside the experts all placements do the same but for what they move, which takes at least what the smallest
    message does. The experts take at least the time of all rows at the devices' best rates together, and, without
    ``copies`` inside a group of ``degree`` devices, the largest expert's at the best rate of its one device in each.
    """
    floor = np.zeros(len(step.model.moe_layers))
    for ordinals in step.alike():
        layer = step.layer([step.model.moe_layers[j] for j in ordinals])
        rates = row_rates(step.costs, layer.block)
        total = layer.choices.total
        together = total.sum(1) / (1 / np.maximum(step.costs.of_devices(rates), 1e-300)).sum()
        largest = total.max(1) * degree / step.layout.devices * rates.min()
        before, after = _around(layer, strategy)
        floor[ordinals] = before + (together if copies else np.maximum(together, largest)) + after
    return floor


def _around(layer: Layer, strategy: Strategy) -> tuple[float, float]:
    """Least seconds before the last device has come to the exchange of rows, and after its experts."""
    devices, stages = layer.layout.devices, hierarchical if strategy == "hierarchical" else ep
    arrival = longest_chains(stages.before(layer), 1, devices).slowest()
    exchange = stages.least(layer)
    rest = sum((stage.seconds for stage in stages.after(layer)), np.zeros((1, devices)))
    return float(arrival[0]) + exchange, exchange + float(rest.min())

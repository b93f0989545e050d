"""What a plan says of its search: the space, what was assumed or left out, what memory does not hold."""

from collections.abc import Sequence

import numpy as np

from ..spec.cluster import Cluster
from ..spec.foresight import Foresight
from ..spec.load import note
from ..spec.offload import Reads
from ..spec.plan import LayerPlan
from ..spec.routing import ASSUMED_EXPONENT
from ..spec.trace import Trace
from .choices import held
from .chunking import COUNTS
from .foresight import can_foresee
from .offered import folder_of
from .space import Search
from .splits import unmeasured_degrees
from .strategies.offload import least_host_seconds
from .units import bytes_text

ASSUMPTION = (
    f"independent draws, expert of popularity rank r with probability proportional to (r + 1) ** -{ASSUMED_EXPONENT}"
)
IDENTITY = "identity experts are not in the trace's counts: each is taken to be as popular as the mean expert"


def space(search: Search) -> str:
    """What was searched, as text; the bound claims no more than this."""
    layouts = f"{len(search.layouts)} layouts ({'; '.join(search.layouts)})"
    degrees = f"expert degrees {', '.join(map(str, search.degrees))}" if search.placed else ""
    within = {
        "ep": f"ep ({search.options.placed_by()} placement)",
        "hierarchical": f"hierarchical ({search.options.placed_by()} placement)",
        "sharded": "sharded (even and min-max FFN splits)",
        "gathered": "gathered",
    }
    if search.even:
        within["sharded"] = "sharded (even FFN split)"
    if search.given is not None:
        within = {name: f"{name} as {search.given.name} places its experts" for name in search.placed}
    for strategy in search.chunked:
        within[strategy] += f"{',' if search.given else ' and the fastest of them'} in {_ways(search)}"
        within[strategy] += ", in every layer's own order" if strategy == "hierarchical" else ""
    options = ", ".join(within[strategy] for strategy in search.strategies)
    per = "layer" if search.stored == len(search.model.layers) else "group of layers that share storage"
    text = f"{' x '.join(filter(None, (layouts, degrees)))} x per {per} any of: {options}"
    if "coherent" in search.whole:
        coherent = f"coherent in every layer ({search.options.placed_by(coherent=True)} placement)"
        text = f"{text}; or {coherent}" if search.strategies else f"{coherent} in layouts of tensor 1"
    if "offload" in search.whole:
        every = ", every slot" if any(block.shortcut != "none" for block in search.model.blocks) else ""
        hosts = (
            " or left to the GPUs' hosts"
            if np.isfinite(least_host_seconds(search.costs, search.model.blocks)).any()
            else ""
        )
        text = (
            f"{layouts} x {search.options.placed_by()} placement, offload in every layer{every}, the likeliest experts "
            f"in memory, 1 to 16 places for others, read ahead by their frequency or as foreseen{hosts}; the bound is "
            "on what any choice of those in memory has to read"
        )
    if search.searched < search.spaces:
        return f"the first {search.searched} of {search.spaces} combinations, where the bound holds, of {text}"
    return text


def _ways(search: Search) -> str:
    """How tokens may travel besides at once, as text."""
    slots = any(block.shortcut != "none" for block in search.model.blocks)
    counts = COUNTS if slots else COUNTS[1:]
    text = f"{', '.join(map(str, counts[:-1]))} or {counts[-1]} chunks{' and every slot' if slots else ''}"
    return f"{text}, as a few layers let expect"


def notes(search: Search, trace: Trace | None) -> list[str]:
    notes = [] if search.given is None else [search.given.note]
    notes += note(search.costs.cluster.provenance.load, "while the cluster was measured", "profile")
    if trace is None:
        notes.append(f"routing is assumed, not measured: {ASSUMPTION}; give a trace with --trace")
    elif trace.counts_only:
        notes.append("the trace has counts only: tokens are assumed independent")
        if any(block.moe and block.moe.zero_experts for block in search.model.blocks):
            notes.append(IDENTITY)
    if search.model.family_config is not None:
        notes.append(
            f"all of {search.model.name} but its experts runs as Transformers' own modules: layouts of tensor 1, and "
            "neither coherent nor offload"
        )
    if search.routing.scale > 1:
        notes.append(_expected_note(search))
    if lacking_degrees := unmeasured_degrees(search.costs, search.model):
        named = ", ".join(map(str, lacking_degrees))
        notes.append(
            f"not searched, for want of curves: tensor degree {named}: measure the model on groups of so many devices "
            "with `moeplan profile`"
        )
    layers = len(search.model.layers)
    if search.stored < layers:
        notes.append(
            f"MEMORY: {search.model.name} does not fit; its {layers} layers share the weights of {search.stored}: the "
            "step's time is that of the whole model, its output is not"
        )
    stored = search.model.stored_in()
    if stored:
        parts = ", ".join(f"{part} in {name}" for part, name in stored.items())
        dtype = search.costs.dtype
        notes.append(
            f"the weights are stored with {parts}; the runtime holds and moves them dequantised to {dtype}, which the "
            f"plan counts: {bytes_text(search.model.computed_expert_bytes(0, dtype))} for each expert, where engines "
            f"hold {bytes_text(search.model.expert_bytes(0, dtype))}"
        )
    return [*notes, *_early_notes(search)]


def resting_notes(
    plans: Sequence[LayerPlan], search: Search, cluster: Cluster, foresight: Foresight | None, reads: Reads | None
) -> list[str]:
    """Of experts that memory does not hold; reads: what is expected."""
    if plans[0].resident is None:
        return []
    resting = np.sum([np.array([len(experts) for experts in plan.slots]) - held(plan) for plan in plans], axis=0)
    stored = sum(len(experts) for plan in plans for experts in plan.slots)
    folder, size = folder_of(cluster), search.model.computed_expert_bytes(0, search.costs.dtype)
    where = f"in files in {folder}" if folder else "in the hosts' memory"
    each = f"{bytes_text(int(resting.max()) * size)} of a device at most"
    memory = f"MEMORY: {int(resting.sum()):,} of {stored:,} experts do not fit and rest {where}, {each}"
    if reads is None:
        return [memory]
    return [memory, _reading_note(reads, search, foresight), *_hosts_note(search)]


def _hosts_note(search: Search) -> list[str]:
    """Of GPUs whose hosts were not measured."""
    costs, least = search.costs, least_host_seconds(search.costs, search.model.blocks)
    kinds = [costs.cluster.kinds[k].type for k in costs.kinds]
    if not any(kind == "cuda" and np.isinf(seconds) for kind, seconds in zip(kinds, least, strict=True)):
        return []
    return [
        "not searched, for want of curves: experts computed by the GPUs' hosts: measure the model again with `moeplan "
        "profile`"
    ]


def _reading_note(reads: Reads, search: Search, foresight: Foresight | None) -> str:
    """What is read before it is known that it is needed."""
    experts, trace = search.options.moe.num_experts, search.trace
    if foresight is not None:
        how = (
            f"foreseen from what the layer before needs, by {foresight.tokens:,} other tokens of the trace, where the "
            f"probability is {foresight.least:g} or more"
        )
    else:
        how = "by the lists of the plan"
        if trace is not None and trace.tells_movement and trace.layers > 1 and not can_foresee(trace, experts):
            how += f" (what {trace.layers} layers of {experts} experts need is not foreseen: a table too large)"
    return (
        f"a step needs {reads.needed:g} experts from there and reads ahead {reads.listed:g}, {how}; {reads.ahead:g} of "
        "these are needed"
        + (f"; {reads.host:g} more are computed by the hosts' processors, where they rest" if reads.host else "")
    )


def _early_notes(search: Search) -> list[str]:
    """What was left out because time, or the user, ended the search."""
    notes = []
    why, advice = ("stopped", "") if search.budget.stopped else ("time limit", ": raise --time-limit")
    if search.budget.skipped:
        notes.append(f"no time for {', '.join(search.budget.skipped)}: raise --time-limit")
    if search.cut:
        notes.append(f"{why}: mixtures of strategies, or coherent plans, were left out in some layouts{advice}")
    if search.searched < search.spaces:
        notes.append(f"{why}: {search.searched} of {search.spaces} combinations of layout and degree searched")
    return notes


def _expected_note(search: Search) -> str:
    """What expected counts are, and how far real ones lie from them."""
    counts = search.routing.counts(search.options.moe.num_experts)
    typical = float(np.median(counts)) / search.costs.devices  # of one expert from one device
    error = 1 / np.sqrt(max(typical, 1e-9))
    tokens = len(search.routing.expert_ids)
    return (
        f"expected counts: the step's {search.workload.tokens:,} tokens are taken to choose as {tokens:,} sampled ones "
        f"do on average; an expert's real rows from one device differ by about {min(error, 1.0):.0%} of them, a whole "
        f"expert's by {1 / np.sqrt(max(float(np.median(counts)) / search.routing.scale, 1.0)):.1%}"
    )

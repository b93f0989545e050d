"""How many tokens' keys and values fit beside the weights."""

from ...spec.tabled import NUMBERS
from .architecture import Architecture, Layers, Mixer
from .layers import Formats
from .shapes import Degrees, Settings

WORK_BYTES = 4e9
"""Of a GPU's memory, for activations, CUDA graphs, communication buffers and the driver: 3.5 GiB and some, as the data
sheets that come with the tables have it."""


def cached_tokens(
    model: Architecture, formats: Formats, degrees: Degrees, settings: Settings, memory_bytes: float
) -> float:
    """Tokens over all attention copies whose keys and values fit; negative where the weights do not."""
    free = memory_bytes * settings.memory_share - WORK_BYTES - weight_bytes(model, formats, degrees)
    per_token = sum(layers.count * cache_values(layers.mixer, degrees.tp) for layers in model.layers)
    size = 1.0 if settings.kv_cache == "fp8" else 2.0
    return degrees.dp * free * degrees.pp / (per_token * size)


def weight_bytes(model: Architecture, formats: Formats, degrees: Degrees) -> float:
    """Of one GPU."""
    embedding = 2 * model.vocab * model.hidden * 2.0 / degrees.tp
    return (
        embedding
        + sum(layers.count * _layer_bytes(layers, model.hidden, formats, degrees) for layers in model.layers)
        / degrees.pp
    )


def _layer_bytes(layers: Layers, hidden: int, formats: Formats, degrees: Degrees) -> float:
    dense, experts, shared = (NUMBERS[name][0] for name in (formats.dense, formats.experts, formats.shared))
    total = dense * mixer_values(layers.mixer, hidden) / degrees.tp
    if not layers.experts:
        return total + shared * 3 * hidden * layers.ffn / degrees.tp
    total += shared * 3 * hidden * layers.shared / degrees.tp + 2.0 * hidden * layers.experts
    return total + experts * 3 * hidden * layers.ffn * layers.experts / (degrees.moe_tp * degrees.moe_ep)


def mixer_values(mixer: Mixer, hidden: int) -> int:
    """Weights of a mixer's projections."""
    if mixer.kind == "gdn":
        return hidden * (2 * mixer.kv_heads * mixer.head_dim + 3 * mixer.heads * mixer.value_dim)
    if mixer.kind == "gqa":
        return hidden * mixer.head_dim * (mixer.heads * (3 if mixer.gated else 2) + 2 * mixer.kv_heads)
    into = mixer.q_rank or hidden
    q = hidden * mixer.q_rank + into * mixer.heads * (mixer.head_dim + mixer.rope_dim)
    kv = hidden * (mixer.kv_rank + mixer.rope_dim) + mixer.kv_rank * mixer.heads * (mixer.head_dim + mixer.value_dim)
    return q + kv + hidden * mixer.heads * mixer.value_dim


def cache_values(mixer: Mixer, tp: int) -> int:
    """Values per token that one rank keeps; a window's are few and count as none, like a recurrence's state."""
    if mixer.kind == "gdn" or mixer.window:
        return 0
    if mixer.kind == "gqa":
        return 2 * max(mixer.kv_heads // tp, 1) * mixer.head_dim
    return mixer.kv_rank + mixer.rope_dim

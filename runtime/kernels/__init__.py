"""The runtime's kernels: ``expert_ffn`` and the operators it is made of; ``registry`` chooses who computes them."""

from .dense import dense_ffn, linear
from .functions import esfk, esmm, ess, estmm, expert_ffn
from .pack import pack_interleaved
from .registry import implementations
from .stored import weights_of

__all__ = [
    "dense_ffn",
    "esfk",
    "esmm",
    "ess",
    "estmm",
    "expert_ffn",
    "implementations",
    "linear",
    "pack_interleaved",
    "weights_of",
]

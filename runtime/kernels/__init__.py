"""The runtime's kernels. ``expert_ffn`` is the one entry; implementations are chosen in ``registry``."""

from .dense import dense_ffn
from .product import linear
from .registry import expert_ffn, implementations, register

__all__ = ["dense_ffn", "expert_ffn", "implementations", "linear", "register"]

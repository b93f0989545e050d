"""Expert kernels in Triton: tokens are gathered in the load and scattered in the store, through a re-index vector.

``TritonKernels`` is the implementation. Only making one imports triton, so a machine without it can import this.
"""

from .implementation import TritonKernels

__all__ = ["TritonKernels"]

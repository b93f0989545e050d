"""How a weight matrix is stored: the bits of its values, and the scales and zero points beside them.

Bytes are those of the tensors that an engine holds for such a matrix (what Transformers' and vLLM's quantised layers
allocate), scales included. A matrix is [rows, columns] = [outputs, inputs]. Biases, norms, routers and embeddings are
not stored this way: they stay in the model's compute dtype.
"""

from typing import Annotated

from pydantic import Field

from .document import Part

Extent = Annotated[int, Field(ge=1, lt=2**31)]
Shape = tuple[int, int]


class PerBlock(Part):
    """One more value for every block of ``rows`` x ``columns`` weights; none: all of them."""

    what: str = Field(description="scale, zero point, ...")
    bits: int = Field(ge=1, le=16384)
    rows: Extent | None = None
    columns: Extent | None = None

    def bytes(self, shape: Shape) -> int:
        rows, columns = shape
        blocks = -(-rows // (self.rows or rows)) * -(-columns // (self.columns or columns))
        return -(-blocks * self.bits // 8)


class Storage(Part):
    """A weight format, and which matrices of its part keep the compute dtype all the same."""

    name: str = Field(description="such as fp8, int4, mxfp4")
    bits: int = Field(ge=1, le=16, description="of one weight as stored")
    beside: tuple[PerBlock, ...] = Field((), description="scales, zero points and the like")
    flat: bool = Field(False, description="blocks run over the whole matrix as one row (bitsandbytes)")
    plain: tuple[str, ...] = Field((), description="matrices that keep the compute dtype, such as kv_b")

    def bytes(self, shape: Shape) -> int:
        """Bytes of one matrix [rows, columns], its scales included."""
        count = shape[0] * shape[1]
        blocked = (1, count) if self.flat else shape
        return -(-count * self.bits // 8) + sum(per.bytes(blocked) for per in self.beside)


def stored_bytes(matrices: dict[str, Shape], storage: Storage | None, element_bytes: int) -> int:
    """Bytes of these matrices in ``storage``, or, where there is none, in a dtype of ``element_bytes``."""
    total = 0
    for name, shape in matrices.items():
        if storage is None or name in storage.plain:
            total += shape[0] * shape[1] * element_bytes
        else:
            total += storage.bytes(shape)
    return total

"""mxfp4 as gpt-oss stores its experts: 4-bit floats in blocks of 32 with a power of two each.

``gate_up_proj_blocks`` uint8 [E, 2 H, D / 32, 16] and ``down_proj_blocks`` [E, D, H / 32, 16]: two values a byte, the
lower half first; ``*_scales`` uint8 [E, rows, blocks]: exponents, less 127. Rows of gate and up alternate. Values are
e2m1 (OCP Microscaling Formats 1.0): 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same negative.
"""

import torch
from torch import Tensor

from ...spec.errors import DocumentError
from ..tensors import TensorFolder
from ..weights import Range

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BLOCK, BIAS, NAN = 32, 127, 255


class Mxfp4Experts:
    """The experts under ``name`` ("model.layers.0.mlp.experts") of a folder. ``dry``: no data is read ("meta" tensors).

    Raises DocumentError for shapes, dtypes or exponents that are not mxfp4's.
    """

    def __init__(self, folder: TensorFolder, name: str, dry: bool = False) -> None:
        self.folder, self.name, self.dry = folder, name, dry

    def check(self, experts: int, hidden: int, ffn: int) -> None:
        """Shapes and dtypes, without the data. experts, hidden, ffn: of the whole layer."""
        for projection, rows, columns in (("gate_up_proj", 2 * ffn, hidden), ("down_proj", hidden, ffn)):
            if columns % BLOCK:
                raise DocumentError(f"{self._where(projection)}: {columns} columns are no multiple of {BLOCK}")
            shapes = {
                "blocks": (experts, rows, columns // BLOCK, BLOCK // 2),
                "scales": (experts, rows, columns // BLOCK),
            }
            for part, shape in shapes.items():
                stored = self.folder.check(f"{self.name}.{projection}_{part}", shape)
                if stored.dtype != "U8":
                    raise DocumentError(f"{self._where(projection)}_{part}: expected U8, got {stored.dtype}")

    def read(self, expert: int, columns: Range) -> tuple[Tensor, Tensor]:
        """gate_up [2, H, D] (gate, then up) and down [D, H] of one expert and FFN columns H, float32."""
        first, last = columns
        both = self._projection("gate_up_proj", expert, (2 * first, 2 * last), None)
        # Only the blocks that hold the columns are read, then cut.
        span = (first // BLOCK, -(-last // BLOCK))
        down = self._projection("down_proj", expert, None, span)
        return both.unflatten(0, (last - first, 2)).transpose(0, 1), down[:, first - span[0] * BLOCK :][
            :, : last - first
        ]

    def _projection(self, projection: str, expert: int, rows: Range | None, blocks: Range | None) -> Tensor:
        names = [f"{self.name}.{projection}_{part}" for part in ("blocks", "scales")]
        shape = self.folder.stored(names[0]).shape
        region: list[Range] = [(expert, expert + 1), rows or (0, shape[1]), blocks or (0, shape[2]), (0, shape[3])]
        if self.dry:
            _, (top, end), (left, right), _ = region
            return torch.empty(end - top, BLOCK * (right - left), device="meta")
        packed, scales = self.folder.read(names[0], region)[0], self.folder.read(names[1], region[:3])[0]
        if (scales == NAN).any():
            raise DocumentError(f"{self._where(projection)}_scales: holds 255, which is not a number")
        return unpack(packed, scales)

    def _where(self, projection: str) -> str:
        return f"{self.folder.folder}: {self.name}.{projection}"


def unpack(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks: uint8 [..., B, 16]; scales: uint8 [..., B] -> float32 [..., 32 B]. Every product is exact."""
    table = torch.tensor(E2M1, dtype=torch.float32, device=blocks.device)
    halves = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    return torch.ldexp(table[halves.int()], scales.int().unsqueeze(-1) - BIAS).flatten(-2)

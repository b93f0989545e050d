"""How an FFN's weights lie in memory, as their strides say: what the kernels read without a copy of the weights.

``gate_up`` [E, M, H, D] and ``down`` [E, D, H] may be views of what a checkpoint or a Transformers module keeps:
outputs before inputs (the usual) or inputs before outputs (*transposed*), gate before up or their columns in turn
(*interleaved*). Letters as in ``interface``.
"""

from typing import NamedTuple

from torch import Tensor

from ...spec import MoeplanError


class Layout(NamedTuple):
    """transposed: gate_up lies as [E, D, M H], else [E, M H, D]; interleaved: of these M H, gate 0, up 0, gate 1, ...;
    down_transposed: down lies as [E, H, D], else [E, D, H]."""

    transposed: bool = False
    interleaved: bool = False
    down_transposed: bool = False

    @property
    def plain(self) -> bool:
        return self == Layout()


class Weights(NamedTuple):
    """What ``expert_ffn`` takes: gate_up [E, M, H, D], down [E, D, H], gate_up_bias [E, M, H] or None. All views."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None


def weights_of(
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_proj_bias: Tensor | None = None,
    *,
    gated: bool = True,
    transposed: bool = False,
    interleaved: bool = False,
) -> Weights:
    """Views, for ``expert_ffn``, of experts as Transformers keeps them: its modules' gated, transposed, interleaved.

    gate_up_proj (up_proj where not gated): [E, M H, D], or [E, D, M H] transposed; down_proj: [E, D, H] or [E, H, D];
    gate_up_proj_bias: [E, M H], interleaved as the weight is. Raises MoeplanError for shapes that do not go together.
    """
    name = "gate_up_proj" if gated else "up_proj"
    matrices = 2 if gated else 1
    if gate_up_proj.ndim != 3 or gate_up_proj.shape[2 if transposed else 1] % matrices:
        wanted = f"[E, D, {matrices} H]" if transposed else f"[E, {matrices} H, D]"
        raise MoeplanError(f"weights_of: {name}: expected {wanted}, got {list(gate_up_proj.shape)}")
    rows = gate_up_proj.transpose(1, 2) if transposed else gate_up_proj
    experts, both, model = rows.shape
    ffn = both // matrices
    for part, tensor, shape in (
        ("down_proj", down_proj, (experts, ffn, model) if transposed else (experts, model, ffn)),
        (f"{name}_bias", gate_up_proj_bias, (experts, both)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise MoeplanError(f"weights_of: {part}: expected {list(shape)}, got {list(tensor.shape)}")
    interleaved = interleaved and gated

    def parted(tensor: Tensor) -> Tensor:
        if interleaved:
            return tensor.unflatten(1, (ffn, matrices)).transpose(1, 2)
        return tensor.unflatten(1, (matrices, ffn))

    return Weights(
        parted(rows),
        down_proj.transpose(1, 2) if transposed else down_proj,
        None if gate_up_proj_bias is None else parted(gate_up_proj_bias),
    )


def layout_of(gate_up: Tensor, down: Tensor) -> Layout | None:
    """The layout of these tensors by their strides; None where they lie in none of them.

    Where sizes of 1 fit several, the first: usual before interleaved before transposed.
    """
    _, matrices, ffn, model = gate_up.shape
    both = matrices * ffn
    ways = {
        (False, False): (both * model, ffn * model, model, 1),
        (False, True): (both * model, model, matrices * model, 1),
        (True, False): (both * model, ffn, 1, both),
        (True, True): (both * model, 1, matrices, both),
    }
    first = next((way for way, strides in ways.items() if _lies(gate_up, strides)), None)
    model, ffn = down.shape[1:]
    turns = {False: (model * ffn, ffn, 1), True: (model * ffn, 1, model)}
    second = next((turn for turn, strides in turns.items() if _lies(down, strides)), None)
    return None if first is None or second is None else Layout(*first, second)


def layout(gate_up: Tensor, down: Tensor) -> Layout:
    """The same of tensors that ``validation`` has let through."""
    found = layout_of(gate_up, down)
    if found is None:
        strides = list(gate_up.stride()), list(down.stride())
        raise MoeplanError(f"expert_ffn: expected weights in a layout of weights_of, got strides {strides}")
    return found


def lying(gate_up: Tensor, of: Layout) -> Tensor:
    """gate_up [E, M, H, D] as it lies in memory: [E, M H, D], or [E, D, M H] where transposed. A view."""
    flat = (gate_up.transpose(1, 2) if of.interleaved else gate_up).flatten(1, 2)
    return flat.transpose(1, 2) if of.transposed else flat


def like_weights(
    gate_up: Tensor, gate_up_bias: Tensor | None, down: Tensor, matrices: int, of: Layout
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The other way: tensors as they lie, as gate_up [E, M, H, D], its bias [E, M, H] and down [E, D, H]. Views."""
    turned = down.transpose(1, 2) if of.down_transposed != of.transposed else down
    found = weights_of(
        gate_up, turned, gate_up_bias, gated=matrices == 2, transposed=of.transposed, interleaved=of.interleaved
    )
    return found.gate_up, found.gate_up_bias, found.down


def _lies(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether a tensor lies as these strides say; that of a dimension of one does not count, and none of nothing."""
    if not tensor.numel():
        return True
    return all(n == 1 or a == b for n, a, b in zip(tensor.shape, tensor.stride(), strides, strict=True))

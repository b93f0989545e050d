"""What every implementation of the expert kernels is: the operators, their shapes, types and meaning.

Letters: T tokens, D model, E experts held here, K top-k, H ffn columns, M 2 for a gated FFN (gate, then up) or 1,
P = T K choices, I and O inputs and outputs of one projection.

A choice is one of a token's K experts: ``ids`` [T, K] int32 or int64 holds the local number of the expert, -1 where it
is not here. A choice of -1 contributes nothing anywhere; a token that names an expert twice has two choices of it.
Rows of a choice are x [T, I], shared by a token's choices, or x [T, K, I], one for each.

Every result has the type of its first input unless said otherwise, sums are accumulated in float32 (float64 for
float64), and is contiguous. T, E, K, H = 0, idle experts, and sizes of any remainder are all allowed. Exactly the rows
of the choices that are here are computed. Arguments come validated (``validation``), except that an implementation
looks at the values of ``ids`` itself: one above E - 1 or below -1 is a MoeplanError that names it (on a GPU, which is
not waited for, of a later call).
"""

from typing import NamedTuple, Protocol

from torch import Tensor


class Gradients(NamedTuple):
    """Of one ``forward``, each of the shape and type of what it belongs to; None for a bias that is not there. Those of
    weights lie as these do, or contiguous (``reference``)."""

    x: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    weights: Tensor


class Kernels(Protocol):
    """One implementation; ``registry.choose`` gives it out."""

    name: str

    def esmm(self, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
        """Expert-specific product: y[t, k] = weight[e] x_row + bias[e] with e = ids[t, k], zeros where e is -1.

        x: [T, I] or [T, K, I]; weight: [E, O, I]; bias: [E, O] or None -> [T, K, O].
        """
        ...

    def ess(self, dy: Tensor, ids: Tensor, experts: int) -> Tensor:
        """Expert-specific sum, a bias's gradient: dy [T, K, O] -> [E, O], the sum of each expert's rows."""
        ...

    def estmm(self, x: Tensor, dy: Tensor, ids: Tensor, experts: int) -> Tensor:
        """Expert-specific transposed product, a weight's gradient in the weight's layout.

        x: [T, I] or [T, K, I]; dy: [T, K, O] -> [E, O, I], for each expert the sum of dy_row^T x_row.
        """
        ...

    def esfk(
        self, x: Tensor, weight: Tensor, dy: Tensor, ids: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Fused backward of ``esmm``: gradients of x (of its shape), of weight [E, O, I] and of the bias [E, O].

        With x [T, I] a token's gradient is the sum over its choices. The last is None without a bias.
        """
        ...

    def forward(
        self,
        x: Tensor,
        gate_up: Tensor,
        gate_up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        ids: Tensor,
        weights: Tensor,
        activation: str,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        """y[t] = sum over k of weights[t, k] (down[e] act(gate_up[e] x[t] + gate_up_bias[e]) + down_bias[e]).

        x: [T, D]; gate_up: [E, M, H, D]; gate_up_bias: [E, M, H] or None; down: [E, D, H]; down_bias: [E, D] or None;
        gate_up and down lie in a layout of ``stored``; activation: a text of ``activation``; weights: [T, K] float32 ->
        y [T, D], and what ``backward`` needs: the projections before the activation, [P, M H], all of gate first, in an
        order of rows that is the implementation's own (rows of no choice are undefined); [0, M H]
        unless ``save``.
        """
        ...

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        gate_up: Tensor,
        gate_up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        ids: Tensor,
        weights: Tensor,
        saved: Tensor,
        activation: str,
    ) -> Gradients:
        """Gradients of everything that ``forward`` took; dy: [T, D]; that of a weight whose choice is -1 is 0."""
        ...

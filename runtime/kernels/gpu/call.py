"""One call's choices: their re-index vector, and the tuned launches over it.

Letters: T tokens, K top-k, P = T K choices, E experts, I and O inputs and outputs, S parts of a split sum.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..stored import Layout, lying
from .config import Config, candidates, height, key, precision, with_split
from .device import architecture, on, processors
from .elementwise import activate, activate_backward
from .esfk import esfk
from .esmm import esmm
from .index import reindex
from .project import project
from .reduce import reduce
from .reports import raise_reported, report
from .tuning import tuner

Result = TypeVar("Result")


class Call:
    """ids: [T, K] contiguous, on the device of the call; function: the operator's name, for errors."""

    def __init__(self, ids: Tensor, experts: int, function: str) -> None:
        raise_reported(ids.device, function)
        self.ids, self.experts = ids, experts
        self.tokens, self.top_k = ids.shape
        self.choices = ids.numel()
        self.index = reindex(ids, experts, height(self.choices, experts), report(ids.device))
        if ids.device.type == "cpu":
            raise_reported(ids.device, function)

    def products(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gates: Tensor | None,
        per_row: int,
        zeroed: bool,
        transposed: bool = False,
    ) -> Tensor:
        """gate (weight[e] x + bias[e]) of every choice: [S, P, O], parts to be summed; in x.dtype with one part.

        weight: [E, O, I], or [E, I, O] transposed. See ``esmm``. Rows of choices that are not here are undefined, or
        zeros if ``zeroed`` and S is 1.
        """

        outputs = weight.shape[2 if transposed else 1]

        def launch(config: Config) -> Tensor:
            config = self._split(config, weight, transposed)
            shape = (config.split, self.choices, outputs)
            make = x.new_zeros if zeroed and config.split == 1 else x.new_empty
            out = make(shape, dtype=x.dtype if config.split == 1 else torch.float32)
            esmm(x, weight, bias, gates, self.index, per_row, out, config, transposed)
            return out

        return self._tuned("esmm", x.dtype, weight, launch)

    def hidden(
        self, x: Tensor, gate_up: Tensor, bias: Tensor | None, activation: str, save: bool, lies: Layout
    ) -> tuple[Tensor, Tensor | None]:
        """[P, H], the activation of every choice's first projection, and the projections [P, M H] if ``save``.

        gate_up: [E, M, H, D], which lies as ``lies`` says.
        """
        _, matrices, width, _ = gate_up.shape
        flat = lying(gate_up, lies)
        hidden = x.new_empty((self.choices, width))
        saved = x.new_empty((self.choices, matrices * width)) if save else None

        def launch(config: Config) -> None:
            config = self._split(config, flat, lies.transposed)
            if config.split == 1:
                project(x, gate_up, bias, self.index, self.top_k, hidden, saved, activation, lies, config)
                return
            parts = x.new_empty((config.split, self.choices, matrices * width), dtype=torch.float32)
            # In the order in which the columns lie.
            turned = bias if bias is None or not lies.interleaved else bias.transpose(1, 2)
            flat_bias = None if turned is None else turned.flatten(1).contiguous()
            esmm(x, flat, flat_bias, None, self.index, self.top_k, parts, config, lies.transposed)
            activate(parts, None, self.ids, self.experts, hidden, saved, activation, lies.interleaved)

        self._tuned("project", x.dtype, flat, launch)
        return hidden, saved

    def activated(self, saved: Tensor, gates: Tensor, width: int, activation: str) -> Tensor:
        """[P, H]: gate act(saved) of every choice."""
        hidden = saved.new_empty((self.choices, width))
        activate(saved[None], gates, self.ids, self.experts, hidden, None, activation)
        return hidden

    def activation_gradients(
        self,
        dhidden: Tensor,
        saved: Tensor,
        gates: Tensor,
        dy: Tensor,
        down_bias: Tensor | None,
        activation: str,
        mixed: bool,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the projections [P, M H] and of the gates [P]: see ``activate_backward``."""
        dprojected, dgates = torch.empty_like(saved), torch.empty_like(gates)
        given = (dhidden, saved, gates, dy, down_bias, self.ids, self.experts)
        activate_backward(*given, dprojected, dgates, activation, mixed)
        return dprojected, dgates

    def row_gradients(self, x: Tensor, per_row: int) -> Tensor:
        """Buffer [P, I] for a gradient of every choice's row; zeros where no sum over choices will pass over them."""
        shape = (self.choices, x.shape[-1])
        return x.new_zeros(shape) if per_row == 1 else x.new_empty(shape)

    def bias_gradient(self, dy: Tensor, dbias: Tensor) -> None:
        """ESS alone: the sum of dy [P, O] over each expert's choices into dbias [E, O]."""
        config = candidates("esfk", self.index.height, dy.dtype, arch=0)[0]
        esfk(None, None, dy, None, self.index, 1, 1, None, None, dbias, config)

    def gradients(
        self,
        x: Tensor,
        weight: Tensor,
        dy: Tensor,
        gates: Tensor | None,
        per_row: tuple[int, int],
        dx: Tensor | None,
        dweight: Tensor,
        dbias: Tensor | None,
        transposed: bool = False,
    ) -> None:
        """``esfk`` into dx, dweight and dbias; per_row: how many choices share a row of x, and of dy.

        weight: [E, O, I], or [E, I, O] transposed; without dx only its shape counts.
        """

        def launch(config: Config) -> None:
            esfk(x, weight, dy, gates, self.index, *per_row, dx, dweight, dbias, config, transposed)

        self._tuned("esfk", dy.dtype, weight, launch)

    def summed(self, parts: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
        """[S, P, O] -> [P / top_k, O]: the sum over parts and over ``top_k`` neighbouring choices."""
        if len(parts) == 1 and top_k == 1:
            return parts[0]
        return reduce(parts, self.ids.reshape(-1, top_k), self.experts, dtype)

    def _split(self, config: Config, weight: Tensor, transposed: bool) -> Config:
        width, depth = weight.shape[:0:-1] if transposed else weight.shape[1:]
        return with_split(config, self.index.tiles, width, depth, processors(weight.device))

    def _tuned(self, kind: str, dtype: torch.dtype, weight: Tensor, launch: Callable[[Config], Result]) -> Result:
        """Launch with the configuration of this kind, type, height, number of choices (up to a power of two), shape."""
        able = candidates(kind, self.index.height, dtype, architecture(weight.device))
        precise = precision(dtype) if dtype == torch.float32 else ""
        name = key(kind, str(dtype), precise, weight.shape, self.choices, self.index.height)
        with on(weight.device):
            return launch(tuner(weight.device).pick(name, able, launch))

"""Random weights of a family's model that do not depend on how devices divide its experts.

Every matrix has a stream of its own, seeded by (seed, layer, name, number), as in ``runtime.random_weights``; vectors
are what the family's own initialisation makes of them, under a seed of their layer.

Letters: E experts, D model.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...spec import Model
from ..random_weights import BIAS, random_tensor
from .net import Net
from .weights import fan_in, materialise

if TYPE_CHECKING:
    from ..embedding.form import Form

OUTSIDE = 2**32 - 1  # the "layer" of what stands around the layers


class FamilyWeights:
    """Layer i is layer i % ``stored``: the same values and, in one net, the same storage."""

    def __init__(self, model: Model, dtype: torch.dtype, seed: int, device: torch.device, stored: int) -> None:
        self.model, self.dtype, self.seed, self.device, self.stored = model, dtype, seed, device, stored

    def fill(self, net: Net) -> None:
        """Memory and values for all of a net on the meta device but its routed experts."""
        inside = set(net.layers.modules())
        around = [(name, module) for name, module in net.model.named_modules() if module not in inside]
        self._materialise(net, around, OUTSIDE)
        for i in range(len(net.layers)):
            own = dict(net.rest(i))
            if i in net.experts:  # a norm after every expert, say
                parts = [(f"experts.{name}", part) for name, part in net.experts[i].named_modules() if name]
                self._materialise(net, parts, i % self.stored)
            if i < self.stored:
                self._materialise(net, list(own.items()), i)
                continue
            for name, module in net.rest(i % self.stored):
                own[name]._parameters.update(module._parameters)
                own[name]._buffers.update(module._buffers)
        net.model.tie_weights()

    def _materialise(self, net: Net, modules: list[tuple[str, nn.Module]], layer: int) -> None:
        def draw(name: str, like: Tensor) -> Tensor:
            out = torch.empty(like.shape, dtype=like.dtype, device=self.device)
            return random_tensor(out, self.seed, layer, name, fan_in=fan_in(like.shape))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(((self.seed << 32) + layer) % 2**63)
            materialise(net.model, modules, draw, self.device)

    def experts(
        self, index: int, form: "Form", experts: Sequence[int], columns: tuple[int, int], adds_bias: bool = True
    ) -> list[Tensor]:
        """Tensors of these experts of a layer and of their FFN columns [first, end), in the order of ``Form.names``.

        adds_bias: whether the bias of the output is this device's to add; else its values are 0.
        """
        from ..embedding.part import own_part  # and Transformers with it

        one = form._replace(experts=1)
        found: list[list[Tensor]] = [[] for _ in form.names]
        for e in experts:
            whole = self._expert(index % self.stored, one, e)
            for parts, tensor in zip(found, own_part(whole, one, [0], columns, adds_bias), strict=True):
                parts.append(tensor)
        width = form._replace(experts=0, ffn=columns[1] - columns[0])
        none = [torch.empty(shape, dtype=self.dtype, device=self.device) for shape in width.shapes()]
        return [torch.cat([empty, *parts]) for empty, parts in zip(none, found, strict=True)]

    def _expert(self, layer: int, one: "Form", expert: int) -> list[Tensor]:
        """All tensors of one expert, [1, ...] each."""
        fans, found = (one.hidden, one.ffn, BIAS, BIAS), []
        for name, shape, fan in zip(one.names, one.shapes(), fans, strict=False):
            out = torch.empty(shape, dtype=self.dtype, device=self.device)
            found.append(random_tensor(out, self.seed, layer, f"experts.{name}", expert, fan_in=fan))
        return found

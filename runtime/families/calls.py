"""Operators of a family's layers as calls on realistic inputs: Transformers' own modules, without their experts.

Letters: B sequences, L tokens of each, E experts, K top-k, D model.
"""

import copy
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from ...spec import Model
from ...spec.model import Block
from ..embedding.compute import experts_from
from ..even_choices import even_choices
from .cache import empty_cache, extend, kept, pretend, put_back
from .experts import form_of_meta, without_weights
from .frame import arguments, idle_layers, real_arguments, tuple_size, with_handed
from .net import build, built, rest
from .package import without_experts
from .weights import materialise

Call = Callable[[], object]
Cut = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Random values of a shape and dtype."""


class FamilyCalls:
    """One method per operator; its keyword arguments are the operator's axes. block: one of the model's.

    cold: bytes of weights after which those used before are in no cache.
    """

    def __init__(
        self, model: Model, block: Block, dtype: torch.dtype, device: torch.device, cut: Cut, cold: int
    ) -> None:
        self.model, self.block, self.dtype, self.device, self._cut, self._cold = model, block, dtype, device, cut, cold
        self.index = model.layers.index(block.model_copy(update={"count": 1}))
        self.net = built(model, dtype)

    def mixer_prefill(self, sequences: int, length: int) -> Call:
        return self._layer_call(self._layer(), empty_cache(self.net.config), self._ids(sequences, length), 0)

    def mixer_decode(self, sequences: int, context: int) -> Call:
        layer, cache, ids = self._layer(), empty_cache(self.net.config), self._ids(sequences, 1)
        self._layer_call(layer, cache, ids, 0)()

        def fill(shape: tuple[int, ...], like: Tensor, *of: object) -> Tensor:
            return self._cut(shape, like.dtype)

        extend(cache, context, fill, [self.index])
        pretend(cache, sequences, context, self.device, but=self.index)
        return self._layer_call(layer, cache, ids, context)

    def frame_prefill(self, sequences: int, length: int) -> Call:
        return self._frame(empty_cache(self.net.config), self._ids(sequences, length))

    def frame_decode(self, sequences: int, context: int) -> Call:
        cache = empty_cache(self.net.config)
        pretend(cache, sequences, context, self.device)
        return self._frame(cache, self._ids(sequences, 1))

    def expert_ffn(self, ffn: int, experts: int, tokens: int) -> Call:
        """Every one of ``experts`` gets ``tokens`` rows; ffn: columns of each that are held."""
        moe = self.block.moe
        assert moe is not None
        module = without_weights(self.net.experts[self.index])
        materialise(self.net.model, list(module.named_modules())[1:], self._drawn, self.device)
        form = form_of_meta(module)._replace(experts=experts, ffn=ffn)
        ids, gates = even_choices(experts, tokens, moe.top_k, self.device)
        each = experts * moe.expert_parameters(form.hidden) * ffn // moe.ffn_size * self.dtype.itemsize
        sets = max(1, min(len(self.model.moe_layers), -(-self._cold // each)))
        x = self._cut((len(ids), form.hidden), self.dtype)
        layers = cycle(
            [experts_from(module, form, [self._cut(shape, self.dtype) for shape in form.shapes()]) for _ in range(sets)]
        )
        return lambda: next(layers)(x, ids, gates)

    def _handed(self, like: Tensor) -> Tensor:
        """In the place of what another layer gives: values, or of positions the first, which every token sees."""
        if like.is_floating_point():
            return self._cut(tuple(like.shape), like.dtype).to(self.device)
        return torch.zeros(like.shape, dtype=like.dtype, device=self.device)

    def _drawn(self, name: str, like: Tensor) -> Tensor:
        return self._cut(tuple(like.shape), like.dtype)

    def _layer(self) -> nn.Module:
        """The layer with weights of its own; the model around it has some, too."""
        self._around()
        original, experts = self.net.layers[self.index], self.net.experts.get(self.index)
        layer = copy.deepcopy(original)
        names = {name for name, _ in rest(original, experts)}
        parts = [(name, module) for name, module in layer.named_modules() if name in names]
        materialise(self.net.model, parts, self._drawn, self.device)
        return layer

    def _around(self) -> None:
        """Memory for what the model computes before and after its layers."""
        inside = set(self.net.layers.modules())
        around = [(name, module) for name, module in self.net.base.named_modules() if module not in inside]
        materialise(self.net.model, around, self._drawn, self.device)

    def _ids(self, sequences: int, length: int) -> Tensor:
        some = torch.Generator().manual_seed(0)
        return torch.randint(self.model.vocab_size, (sequences, length), generator=some).to(self.device)

    def _layer_call(self, layer: nn.Module, cache: Any, ids: Tensor, context: int) -> Call:
        """The layer's call for these tokens, with the cache as it is now, of ``context`` tokens."""
        given = arguments(self.net, self.index, ids, cache, self.model.name)
        if tuple_size(self.net) > 1:
            whole = build(self.model, self.dtype)
            without_experts(whole.config)
            sequences, length = ids.shape
            real = real_arguments(whole, self.index, sequences, length, context)
            given = with_handed(given, real, self._handed)
        args, kwargs = given
        held = kept(cache)

        def call() -> object:
            put_back(cache, held)
            return layer(*args, **kwargs)

        return call

    def _frame(self, cache: Any, ids: Tensor) -> Call:
        self._around()
        base, held = self.net.base, kept(cache)

        def call() -> None:
            put_back(cache, held)
            with idle_layers(self.net):
                base(input_ids=ids, past_key_values=cache, use_cache=True)

        return call

"""What a family's layers hold while they compute: counted as they run without memory.

Tensors on the meta device have sizes and no values. Every one that an operator makes is seen, and gone when Python and
torch let go of it, as it would be with memory. torch's fused attention keeps no scores; on the meta device it does not
exist, so that its result takes its place where the processor's kernel would be used.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...spec.counted import Peak
from .cache import empty_cache
from .net import Net

LENGTH = 128
"""Tokens of a sequence that is looked at, and twice as many: state spaces work in chunks of 64 to 256."""


class _Live(TorchDispatchMode):
    """Bytes of tensors made within it that are still there, and the most there were since ``most`` was set."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._users: dict[int, int] = {}  # tensors of each storage
        self._alive: dict[int, weakref.ref[Tensor]] = {}  # by their ids: as keys they would be compared

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {_storage(t)[0] for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._see(tensor, given)
        return found

    def _see(self, tensor: Tensor, given: set[int]) -> None:
        storage, size = _storage(tensor)
        if storage not in self._users:
            if storage in given:
                return  # a view of what was there before
            self._users[storage] = 0
            self.now += size
            self.most = max(self.most, self.now)
        self._users[storage] += 1
        reference = weakref.ref(tensor, partial(self._gone, storage, size))
        self._alive[id(reference)] = reference

    def _gone(self, storage: int, size: int, reference: "weakref.ref[Tensor]") -> None:
        del self._alive[id(reference)]
        self._users[storage] -= 1
        if not self._users[storage]:
            del self._users[storage]
            self.now -= size


def _storage(tensor: Tensor) -> tuple[int, int]:
    found = tensor.untyped_storage()
    return found._cdata, found.nbytes()


class _Fused(TorchFunctionMode):
    """Attention without scores, where keys and values have one size."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and len(args) > 2 and args[0].shape[-1] == args[2].shape[-1]:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def peaks(net: Net) -> list[Peak]:
    """Of every layer of a net on the meta device whose experts give zeros, with what the model around it holds."""
    caches = [empty_cache(net.config) for _ in range(2)]
    prompts = [_highest(net, LENGTH * (i + 1), cache) for i, cache in enumerate(caches)]
    steps = [_highest(net, 1, cache) for cache in caches]
    size = net.model.dtype.itemsize
    return [_peak(*(held / size for held in layer)) for layer in zip(*prompts, *steps, strict=True)]


def _peak(short: float, long: float, early: float, late: float) -> Peak:
    """short, long: values for LENGTH tokens and for twice as many; early, late: for one token after these."""
    pair = max(0.0, (long - 2 * short) / (2 * LENGTH**2))
    position = max(0.0, (late - early) / LENGTH)
    return Peak(
        token=max(long / (2 * LENGTH) - pair * 2 * LENGTH, 0.0),
        pair=pair,
        step=max(late - position * 2 * LENGTH, 0.0),
        position=position,
    )


def _highest(net: Net, length: int, cache: Any) -> list[int]:
    """Bytes at the fullest moment of each layer for so many new tokens; what layers before it cached is left out."""
    ids = torch.zeros((1, length), dtype=torch.long, device="meta")
    live, before, found = _Live(), [0], [0] * len(net.layers)
    first: list[int] = []

    def enter(layer: nn.Module, args: Any) -> None:
        first[:] = first or [live.now]
        before[0] = live.most = live.now

    def leave(index: int, layer: nn.Module, args: Any, output: Any) -> None:
        found[index] = first[0] + live.most - before[0]

    hooks = []
    for i, layer in enumerate(net.layers):
        hooks += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(partial(leave, i))]
    try:
        with torch.no_grad(), _Fused(), live:
            net.base(input_ids=ids, past_key_values=cache, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    return found

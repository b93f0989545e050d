"""What a model calls its layers with: found out by letting it call them, with layers that do nothing.

A family's model makes masks, positions and more for its layers in ways of its own. So it is called as it is, its layers
pass on what they are given, and the arguments of one of them are kept.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...spec.errors import MoeplanError
from .cache import empty_cache, extend
from .net import Net
from .package import first_line

MOST_GIVEN = 2
"""Of a tuple that a layer gives: hidden states, and what the next layer takes besides."""


class Arguments(NamedTuple):
    """Of one call of a layer: what other layers gave it besides hidden states is None where they were idle."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Reached(Exception):
    """The layer whose arguments are wanted was called."""


def _passed_on(size: int) -> Callable[..., Any]:
    """A forward that gives back the hidden states that it is given, as they are or in a tuple of so many with None."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *(None for _ in range(1, size))) if size else hidden

    return forward


@lru_cache(maxsize=4)
def tuple_size(net: Net) -> int:
    """Of the tuple that the layers of a net give, and their model takes apart; 0: they give hidden states alone.

    The model around them has memory, or all is on the meta device. Raises ValueError where it wants something else.
    """
    hidden = net.config.hidden_size
    refused: Exception | None = None
    for size in range(MOST_GIVEN + 1):
        ids = torch.zeros((2, 3), dtype=torch.long, device=net.base.device)
        try:
            with _idle(net, size), torch.no_grad():
                found = net.base(input_ids=ids, past_key_values=empty_cache(net.config), use_cache=True)
            if found.last_hidden_state.shape == (2, 3, hidden):
                return size
        except Exception as error:
            refused = refused or error
    raise ValueError(f"its model does not call its layers one after the other ({first_line(refused)})")


@contextmanager
def _idle(net: Net, size: int, but: Callable[[int], Callable[..., Any] | None] = lambda index: None) -> Iterator[None]:
    passed_on = _passed_on(size)
    for i, layer in enumerate(net.layers):
        layer.forward = but(i) or passed_on
    try:
        yield
    finally:
        for layer in net.layers:
            del layer.forward


def idle_layers(
    net: Net, but: Callable[[int], Callable[..., Any] | None] = lambda index: None
) -> AbstractContextManager[None]:
    """Within it the layers pass on what they are given; but: another forward for some of them."""
    return _idle(net, tuple_size(net), but)


def arguments(net: Net, index: int, ids: Tensor, past: Any, where: str) -> Arguments:
    """What the model calls layer ``index`` with for token ids [B, L] after those in the cache ``past``.

    where: names the model in errors.
    """
    found: list[Arguments] = []

    def kept(*args: Any, **kwargs: Any) -> Any:
        found.append(Arguments(args, kwargs))
        raise _Reached

    try:
        with idle_layers(net, lambda i: kept if i == index else None), torch.no_grad():
            net.base(input_ids=ids, past_key_values=past, use_cache=True)
    except _Reached:
        return found[0]
    raise MoeplanError(f"{where}: its model does not call layer {index}")


def with_handed(own: Arguments, real: Arguments, make: Callable[[Tensor], Tensor]) -> Arguments:
    """The arguments with what other layers would have given.

    real: the same call on the meta device, where all layers ran. make: a tensor for one that is missing.
    """

    def whole(mine: Any, theirs: Any) -> Any:
        return make(theirs) if mine is None and isinstance(theirs, Tensor) else mine

    args = tuple(whole(mine, theirs) for mine, theirs in zip(own.args, real.args, strict=True))
    return Arguments(args, {key: whole(value, real.kwargs.get(key)) for key, value in own.kwargs.items()})


def real_arguments(net: Net, index: int, sequences: int, length: int, context: int) -> Arguments:
    """What layer ``index`` of a net on the meta device is called with, all layers before it run."""
    found: list[Arguments] = []

    def kept(layer: Any, args: Any, kwargs: Any) -> None:
        found.append(Arguments(args, kwargs))
        raise _Reached

    def ids(size: int) -> Tensor:
        return torch.zeros((sequences, size), dtype=torch.long, device="meta")

    cache = empty_cache(net.config)
    with torch.no_grad():
        if context:
            net.base(input_ids=ids(1), past_key_values=cache, use_cache=True)
            extend(cache, context, lambda shape, like, *_: like.new_empty(shape), range(len(net.layers)))
        hook = net.layers[index].register_forward_pre_hook(kept, with_kwargs=True)
        with suppress(_Reached):
            net.base(input_ids=ids(length), past_key_values=cache, use_cache=True)
        hook.remove()
    return found[0]

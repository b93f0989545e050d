"""What a model calls its layers with: found out by letting it call them, with layers that do nothing.

A family's model makes masks, positions and more for its layers in ways of its own. So it is called as it is, its layers
pass on what they are given, and the arguments of one of them are kept.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...spec.errors import MoeplanError
from .cache import empty_cache
from .net import Net
from .package import first_line


class Arguments(NamedTuple):
    """Of one call of a layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Reached(Exception):
    """The layer whose arguments are wanted was called."""


def _passed_on(tuples: bool) -> Callable[..., Any]:
    """A forward that gives back the hidden states that it is given, in a tuple or as they are."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if tuples else hidden

    return forward


@lru_cache(maxsize=4)
def give_tuples(net: Net) -> bool:
    """Whether the layers of a net give a tuple, which their model takes apart. The model around them has memory, or
    all is on the meta device. Raises ValueError where the model wants something else."""
    size = net.config.hidden_size
    refused: Exception | None = None
    for tuples in (False, True):
        ids = torch.zeros((2, 3), dtype=torch.long, device=net.base.device)
        try:
            with _idle(net, tuples), torch.no_grad():
                found = net.base(input_ids=ids, past_key_values=empty_cache(net.config), use_cache=True)
            if found.last_hidden_state.shape == (2, 3, size):
                return tuples
        except Exception as error:
            refused = refused or error
    raise ValueError(f"its model does not call its layers one after the other ({first_line(refused)})")


@contextmanager
def _idle(
    net: Net, tuples: bool, but: Callable[[int], Callable[..., Any] | None] = lambda index: None
) -> Iterator[None]:
    passed_on = _passed_on(tuples)
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
    return _idle(net, give_tuples(net), but)


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

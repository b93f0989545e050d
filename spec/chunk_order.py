"""The order in which a device relays, computes and adds up the chunks of a ``hierarchical`` layer.

Three streams work at once: what crosses between hosts, what moves inside them, and the device's own calls. All chunks
begin to cross at once; every call waits for what it needs, and what it has made begins to travel when it ends. So the
order of the calls is all there is to choose, and every device must have the same, since collectives of one group are
begun in one order by all its members. The planner predicts by this order and the runtime executes it.

The usual order relays chunk c before it computes c - 1, and adds c - 2 up after that: what limits then seldom waits.
Over the best order it loses at most half in two chunks, a third in three, and on average 2 % in four
(tests/test_chunk_order.py, benchmarks/chunk_order.py). A layer's plan may have another one: the names of all its calls,
each of which takes its chunks by number.
"""

from collections.abc import Iterator
from functools import cache
from typing import Literal

Call = Literal["relay", "experts", "add"]
CALLS: tuple[Call, ...] = ("relay", "experts", "add")
Order = tuple[Call, ...]

EVERY = 4
"""Chunks up to which ``orders`` has every order: 1, 5, 42 and 462 of them."""


def calls(chunks: int, order: Order | None = None) -> tuple[tuple[Call, int], ...]:
    """Every call of each chunk 0..chunks-1, in this order, or in the usual one."""
    taken = dict.fromkeys(CALLS, 0)
    found: list[tuple[Call, int]] = []
    for call in led(chunks, 1, 2) if order is None else order:
        found.append((call, taken[call]))
        taken[call] += 1
    return tuple(found)


def led(chunks: int, experts: int, add: int) -> Order:
    """Relays chunk c, then computes chunk c - ``experts``, then adds chunk c - ``add`` up, for all c in turn."""
    lags: tuple[tuple[Call, int], ...] = (("relay", 0), ("experts", experts), ("add", add))
    return tuple(call for c in range(chunks + add) for call, lag in lags if 0 <= c - lag < chunks)


def check_order(order: Order, chunks: int) -> None:
    """Raise ``ValueError`` for an order that lacks a call, or makes one before what it needs."""
    if chunks < 2:
        raise ValueError("order belongs to layers in two chunks or more")
    made = dict.fromkeys(CALLS, 0)
    for call in order:
        made[call] += 1
        if not made["relay"] >= made["experts"] >= made["add"]:
            raise ValueError("order: a chunk is relayed before its experts, and these before it is added up")
    if set(made.values()) != {chunks}:
        raise ValueError(f"order: expected relay, experts and add {chunks} times each, once for each chunk")


@cache
def orders(chunks: int) -> tuple[Order, ...]:
    """Those to choose from, the usual one first: all of up to ``EVERY`` chunks; of more, those that keep a distance of
    so many chunks from one call to the next."""
    usual = led(chunks, 1, 2)
    if chunks <= EVERY:
        return tuple(dict.fromkeys([usual, *_every((chunks,) * len(CALLS))]))
    return tuple(dict.fromkeys([usual, *(led(chunks, e, a) for a in range(chunks + 1) for e in range(a + 1))]))


def _every(left: tuple[int, ...]) -> Iterator[Order]:
    """left: how often each call is still to be made."""
    if not any(left):
        yield ()
    for i, call in enumerate(CALLS):
        if left[i] and (i == 0 or left[i] > left[i - 1]):
            for rest in _every((*left[:i], left[i] - 1, *left[i + 1 :])):
                yield (call, *rest)

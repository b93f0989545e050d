"""Brings experts from where they rest into places in a device's memory, beside what is computed."""

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.errors import MoeplanError
from .groups import giving_way
from .tiers import Tier

__all__ = ["Reader"]


class _Place(NamedTuple):
    """``used``: when what was computed from it is done, on a GPU."""

    number: int
    used: torch.cuda.Event | None = None


class Reader:
    """Reads experts in the order in which they are asked for into places [places, bytes] uint8, one after the other.

    entry: the number of an expert in the tier. Who takes one gives it back, so that the next can be read.
    ``vain``: experts that were read, or begun to be, and that nobody took.
    """

    def __init__(self, tier: Tier, places: Tensor) -> None:
        self._tier, self._places = tier, places
        self._order: deque[int] = deque()
        self._free = [_Place(number) for number in range(len(places))]
        self._there: dict[int, _Place] = {}
        self._reading: int | None = None
        self._unwanted = False  # what is being read
        self._fault: MoeplanError | None = None
        self.vain = 0
        self._change = threading.Condition()
        with giving_way():
            threading.Thread(target=self._serve, name="reader of experts", daemon=True).start()

    def put(self, entry: int, parts: Sequence[Tensor]) -> None:
        """Write an expert; before anything is asked for."""
        values = torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts])
        self._places[0][: len(values)].copy_(values)
        self._tier.write(entry, self._places[0])

    def ask(self, entries: Iterable[int]) -> None:
        """Read these next, behind what was asked for before."""
        with self._change:
            self._order.extend(entries)
            self._change.notify_all()

    def drop(self, entries: Iterable[int]) -> None:
        """Nobody will take these."""
        unwanted = set(entries)
        with self._change:
            if unwanted.intersection(self._order):
                self._order = deque(entry for entry in self._order if entry not in unwanted)
            if self._reading in unwanted and not self._unwanted:
                self._unwanted = True
                self.vain += 1
            for entry in unwanted.intersection(self._there):
                self._free.append(self._there.pop(entry))
                self.vain += 1
            self._change.notify_all()

    def restart(self) -> None:
        """Drop everything that was asked for."""
        with self._change:
            outstanding = [*self._order, *self._there, *([] if self._reading is None else [self._reading])]
        self.drop(outstanding)

    def take(self, entry: int) -> Tensor:
        """[bytes] uint8 of an expert that was asked for, once it is there."""
        with self._change:
            self._change.wait_for(lambda: entry in self._there or self._fault is not None)
            if self._fault is not None:
                raise self._fault
            return self._places[self._there[entry].number]

    def give_back(self, entry: int) -> None:
        used = None
        if self._places.is_cuda:
            used = torch.cuda.Event()
            used.record()
        with self._change:
            self._free.append(_Place(self._there.pop(entry).number, used))
            self._change.notify_all()

    def _serve(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._order and self._free)
                entry, place = self._order.popleft(), self._free.pop()
                self._reading, self._unwanted = entry, False
            try:
                if place.used is not None:
                    place.used.synchronize()
                self._tier.read(entry, self._places[place.number])
            except (MoeplanError, RuntimeError) as error:
                with self._change:
                    self._fault = (
                        error if isinstance(error, MoeplanError) else MoeplanError(f"reading experts: {error}")
                    )
                    self._change.notify_all()
                return
            with self._change:
                self._reading = None
                if self._unwanted:
                    self._free.append(place)
                else:
                    self._there[entry] = place
                self._change.notify_all()

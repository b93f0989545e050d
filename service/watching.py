"""One watcher at work: reads what is new, decides, writes, and says why."""

# L layers

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import IO, Any

import numpy as np

from ..planner.budget import Budget
from ..planner.export import export
from ..planner.place.score import reached_balance
from ..planner.rebalance.decide import Decision, Prices, Terms, decide
from ..planner.rebalance.document import fleet_of, moved, old_slots
from ..planner.rebalance.watcher import Reason
from ..profiler.traces.follow import Refused
from ..spec.model import Model
from ..spec.output import write_atomically
from ..spec.placement import Placement
from .watch_folder import PLACE, Saved, save, tell

LONGEST = 600.0  # seconds of a decision, a ceiling
BECAUSE: dict[Reason, str] = {"learned": "traffic is known", "drift": "traffic has changed"}


@dataclass
class Look:
    """What one look at the recordings brought: recordings read, lines on what was left out, decisions."""

    read: int = 0
    refused: tuple[str, ...] = ()
    decided: tuple[dict[str, Any], ...] = ()


@dataclass
class Watching:
    """folder: what it writes to; engine, model: whose files are written too; stop: no new decision is begun."""

    folder: Path
    saved: Saved
    prices: Prices
    limit: int | None
    seed: int
    engine: str | None
    model: Model | None
    stop: Event
    on_event: Callable[[dict[str, Any]], None] | None = None

    def look(self) -> Look:
        """Read what is complete, decide where there is a reason, keep the state. Raises MoeplanError."""
        found = Look()
        watcher = self.saved.watcher
        for new in self.saved.follower.look():
            if isinstance(new, Refused):
                found.refused += (new.why,)
                continue
            found.read += 1
            reasons = [reason for counts in new.counts if (reason := watcher.add(new.when, counts))]
            if reasons:
                found.decided += (self._decide(reasons[-1]),)
            if self.stop.is_set():
                break
        if found.read or found.refused:
            save(self.folder, self.saved)
        return found

    def _decide(self, reason: Reason) -> dict[str, Any]:
        """Decide, write in the order that ``watch_folder`` gives, and return the line of the log."""
        # Imported when it is needed: numba takes a second to load.
        from threadpoolctl import threadpool_limits

        from ..planner.place.ready import solvers_ready

        saved, batches = self.saved, self.saved.watcher.batches()
        placement, fleet = saved.placement, fleet_of(saved.placement)
        terms = Terms(self.limit, placement.groups, placement.equal_slots, self.seed)
        solvers_ready(None)
        with threadpool_limits(1, user_api="blas"):
            budget = Budget.of(LONGEST, on_event=self.on_event)
            decision = decide(old_slots(placement), batches, fleet, self.prices, terms, budget)
        if decision.slots is not None:
            saved.placement = moved(placement, decision, batches, self.limit)
            self.write()
        saved.decisions += 1
        saved.told = self._line(reason, decision, len(batches))
        save(self.folder, saved)
        tell(self.folder, saved)
        return saved.told

    def write(self) -> list[Path]:
        """The placement, and the engine's files of it."""
        placement = self.saved.placement
        written = [placement.write(self.folder / PLACE)]
        for name, text in self.files(placement).items():
            written.append(write_atomically(self.folder / name, partial(_fill, text.encode())))
        return written

    def files(self, placement: Placement) -> dict[str, str]:
        """The engine's files by name; raises MoeplanError where the engine cannot run the placement."""
        if self.engine is None or self.model is None:
            return {}
        return export(placement, self.engine, self.model, path_of=lambda name: str(self.folder / name)).files

    @property
    def balance(self) -> float:
        """Of the latest traffic, under what serves now; 1 before there is any."""
        load = self.saved.watcher.loads.decayed
        fleet = fleet_of(self.saved.placement)
        return float(reached_balance(old_slots(self.saved.placement), load[None], fleet.speed).mean())

    def _line(self, reason: Reason, decision: Decision, batches: int) -> dict[str, Any]:
        return {
            "decision": self.saved.decisions,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "reason": reason,
            "batch": self.saved.watcher.seen,
            "batches": batches,
            "copies": decision.moves,
            "balance_before": decision.before,
            "balance_after": decision.after,
            "kept_of_gain": decision.keep,
            "gain_seconds": decision.gain,
            "cost_seconds": decision.cost,
            "placement": self.saved.placement.digest(),
        }


def sentence(line: dict[str, Any], horizon: float) -> str:
    """A line of the log as text."""
    why = f"{BECAUSE[line['reason']]} (batch {line['batch']}, decided on {line['batches']})"
    gain, cost = f"{line['gain_seconds']:.3g} s", f"{line['cost_seconds']:.3g} s"
    if line["copies"]:
        return (
            f"moved {line['copies']} copies: {why}; balance {line['balance_before']:.3f}, then "
            f"{line['balance_after']:.3f} expected; gains {gain} in {horizon:g} s, costs {cost}"
        )
    if not line["cost_seconds"]:
        return f"kept the placement: {why}; balance {line['balance_before']:.3f}, no move pays for itself"
    return (
        f"kept the placement: {why}; balance {line['balance_before']:.3f}, the best moves gain {gain} in {horizon:g} s "
        f"and cost {cost}"
    )


def move_seconds(sizes: tuple[int, ...], rate: float) -> np.ndarray:
    """[L] to load one copy of an expert of each layer; sizes: [L] bytes, rate: bytes a second."""
    return np.array(sizes, float) / rate


def _fill(content: bytes, file: IO[bytes]) -> None:
    file.write(content)

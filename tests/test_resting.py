"""Experts that rest: in which order a device asks for them, and that whoever takes them never waits for itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.runtime.strategies import resting as module
from moeplan.runtime.strategies.resting import Resting
from moeplan.spec.foresight import Foresight, foreseen, written
from moeplan.spec.offload import Offload
from moeplan.spec.plan import LayerPlan
from moeplan.tests.plans import hand_made_plan
from moeplan.tests.synthetic import tiny_model

LAYERS, EXPERTS, TOP_K = 3, 6, 2
MODEL = tiny_model(layers=LAYERS, experts=EXPERTS)


class Recorder:
    """In place of a reader: the queue as it is asked for, nothing read."""

    def __init__(self, *_) -> None:
        self.queue: list[int] = []
        self.vain = 0

    def restart(self) -> None:
        self.queue.clear()

    def ask(self, entries) -> None:
        self.queue += entries

    def drop(self, entries) -> None:
        self.queue = [entry for entry in self.queue if entry not in entries]


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(module, "Reader", Recorder)
    monkeypatch.setattr(module, "ExpertFile", lambda *_: None)


experts = st.lists(st.integers(0, EXPERTS - 1), unique=True, max_size=EXPERTS)


@st.composite
def layers(draw):
    found = []
    for _ in range(LAYERS):
        slots = draw(st.permutations(range(EXPERTS)))
        stays = draw(st.lists(st.sampled_from(slots), unique=True, max_size=EXPERTS - 1))
        rest = [e for e in slots if e not in stays]
        early = draw(st.lists(st.sampled_from(rest), unique=True))
        found.append((tuple(slots), tuple(stays), tuple(early), draw(rows), draw(rows)))
    return found


rows = st.lists(st.integers(0, 3), min_size=EXPERTS, max_size=EXPERTS).map(np.array)


@pytest.mark.usefixtures("recorded")
@given(layers(), st.booleans(), st.integers(0, 2**16))
@settings(max_examples=200, deadline=None)
def test_what_is_asked_for_is_what_is_taken_in_that_order(drawn, foresees, seed):
    """In each layer: what was to be read ahead and is needed, then the rest, most rows first; then the next layer's."""
    foresight = None
    if foresees:
        drawn = [(s, r, early if j == 0 else (), *more) for j, (s, r, early, *more) in enumerate(drawn)]
        rng = np.random.default_rng(seed)
        tables = [written(rng.random((EXPERTS - len(stays), EXPERTS))) for _, stays, *_ in drawn[1:]]
        foresight = Foresight(least=0.5, tokens=1, chances=tuple(tables))
    plans = [LayerPlan(strategy="offload", slots=(s,), resident=(r,), ahead=(a,)) for s, r, a, *_ in drawn]
    offload = Offload(folder="/disk", places=(1,), foresight=foresight)
    plan = hand_made_plan(MODEL, "decode:4@8", plans, tokens=(4,), offload=offload)
    held = Resting(plan, 0, torch.float32, torch.device("cpu"))
    reader, entries = held._reader, held._entries
    needed = listed = hits = 0
    for _ in range(2):  # two steps
        held.begin()
        early = drawn[0][2]
        assert reader.queue == [entries[0, e] for e in early]
        for j, (slots, stays, _, count, chosen) in enumerate(drawn):
            taken = [slots[i] for i in held.need(j, count, chosen).read]
            wanted = {e: count[i] for i, e in enumerate(slots) if count[i] and e not in stays}
            hit = [e for e in early if e in wanted]
            late = [e for e in wanted if e not in hit]
            assert taken[: len(hit)] == hit
            assert sorted(taken[len(hit) :]) == sorted(late)
            assert [wanted[e] for e in taken[len(hit) :]] == sorted((wanted[e] for e in late), reverse=True)
            needed, listed, hits = needed + len(wanted), listed + len(early), hits + len(hit)
            early = ()
            if j + 1 < LAYERS:
                early = drawn[j + 1][2]
                if foresight is not None:
                    early = foreseen(foresight, j + 1, (drawn[j + 1][0],), (drawn[j + 1][1],), TOP_K, 0).ahead(chosen)
            assert reader.queue == [*(entries[j, e] for e in taken), *(entries[j + 1, e] for e in early)]
            reader.queue = reader.queue[len(taken) :]  # taken and given back
    assert held.needs() == (needed, listed, hits, 0, 0)

"""Timing and grids against clocks that are known exactly."""

import random
import time
from itertools import product

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from moeplan.profiler.grids import SIZES, Coordinates, Grid, Point, grow, steps
from moeplan.profiler.measure import (
    COLD_STRETCH,
    LONG_CALL,
    WORK,
    ColdTimer,
    Pace,
    StepTimer,
    Timing,
    measure,
    summary,
    timer,
)
from moeplan.profiler.noise import summarised, warnings

PLAIN, QUOTA = Pace.of(False), Pace.of(True)


class Machine:
    """A processor with a clock of its own: calls of ``cost`` seconds, hiccups, and a quota of ``share`` in periods."""

    def __init__(self, cost: float, share: float = 1.0, period: float = 0.01, hiccup: float = 0.0) -> None:
        self.cost, self.share, self.period, self.hiccup = cost, share, period, hiccup
        self.now, self.used, self.calls = 0.0, 0.0, 0
        self.random = random.Random(1)

    def run(self, times: int) -> float:
        start = self.now
        for _ in range(times):
            self.calls += 1
            work = self.cost + (0.2 if self.random.random() < self.hiccup else 0.0)
            while work > 1e-12:
                left = self.share * self.period - self.used
                if left <= 1e-12:
                    self.now = (self.now // self.period + 1) * self.period
                    self.used = 0.0
                    continue
                step = min(work, left, self.period)
                self.now, self.used, work = self.now + step, self.used + step, work - step
                if self.share == 1.0:
                    self.used = 0.0
        return self.now - start


def alone(value: float) -> float:
    return value


@pytest.mark.parametrize("cost", [2e-6, 3e-4, 0.02, 0.4, 3.0])
def test_a_steady_machine_is_measured_exactly(cost):
    machine = Machine(cost)
    timing = measure(machine.run, alone, PLAIN)
    assert timing.median == pytest.approx(cost, rel=1e-6)
    assert timing.spread < 1e-6


@pytest.mark.parametrize("cost", [2e-6, 3e-4, 0.02, 0.4])
def test_the_foreseen_cost_bounds_what_measuring_takes(cost):
    machine = Machine(cost)
    measure(machine.run, alone, PLAIN)
    assert machine.now <= 2 * PLAIN.cost(cost) + 0.01


def test_long_calls_are_run_twice_at_most_and_short_ones_at_least_three_times():
    long, short = Machine(1.5 * LONG_CALL), Machine(0.5 * LONG_CALL)
    assert measure(long.run, alone, PLAIN).batches == 2
    assert long.calls == 2
    assert measure(short.run, alone, PLAIN).batches >= 3


@pytest.mark.parametrize("cost", [1e-5, 7e-4, 0.004, 0.03])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_quota_shows_as_its_average_rate(cost, share):
    # 1e-5 s calls run at full speed within a period, then wait: only an average over many periods is true.
    timing = measure(Machine(cost, share).run, alone, QUOTA)
    assert timing.median == pytest.approx(cost / share, rel=0.2)


def test_hiccups_move_the_spread_but_not_the_median():
    timing = measure(Machine(0.002, hiccup=0.02).run, alone, Pace(0.004, 0.2))
    assert timing.median == pytest.approx(0.002, rel=0.01)
    rough = summary([1.0] * 6 + [1.0, 9.0, 9.0, 9.0])
    assert rough.median == 1.0
    assert rough.spread == pytest.approx(8.0)


def test_a_fast_rank_keeps_running_while_the_slow_one_measures():
    fast, slow_cost = Machine(0.001), 0.5
    measure(fast.run, lambda value: max(value, slow_cost), PLAIN)
    assert fast.now >= 0.8 * 3 * slow_cost


def test_collectives_make_equally_many_calls_on_all_ranks():
    # Two ranks that see different times; ``agree`` is replayed from a joint run.
    costs = (0.0007, 0.0011)
    counts = []
    for cost in costs:
        machine = Machine(cost)
        measure(machine.run, lambda value, own=cost: value * max(costs) / own, PLAIN, together=True)
        counts.append(machine.calls)
    assert counts[0] == counts[1]


def test_timer_goes_round_its_calls():
    seen = []
    run = timer([lambda: seen.append("a"), lambda: seen.append("b")], torch.device("cpu"))
    assert run(3) > 0
    run(1)
    assert seen == ["a", "b", "a", "b"]


def test_a_cold_timer_counts_the_calls_alone():
    seen = []

    def call() -> None:
        seen.append(time.perf_counter())
        time.sleep(0.002)

    run = ColdTimer([call], 8 * 2**20)
    inside, outside = run(3), run.outside
    assert len(seen) == 3
    assert inside >= 0.006
    assert outside > 0
    run(1)
    assert run.outside > outside


def test_a_step_timer_works_before_each_call():
    begun, ended = [], []

    def call() -> None:
        begun.append(time.perf_counter())
        time.sleep(0.002)
        ended.append(time.perf_counter())

    run = StepTimer(call)
    before = time.perf_counter()
    inside = run(3)
    elapsed = time.perf_counter() - before
    assert all(start - end >= WORK for start, end in zip(begun, [before, *ended[:2]], strict=True))
    assert sum(ended) - sum(begun) <= inside <= elapsed - 3 * WORK
    assert 3 * WORK <= run.outside <= elapsed - inside


def test_a_step_timer_counts_from_when_work_was_due(monkeypatch):
    class Slow:
        """Memory that takes twice as long as it should: a processor that is given to others."""

        def sum(self) -> None:
            time.sleep(2 * WORK)

    monkeypatch.setattr("moeplan.profiler.measure._other_memory", lambda size: torch.zeros(size // 4))
    monkeypatch.setattr(torch.Tensor, "split", lambda self, size: [Slow()])
    assert StepTimer(lambda: None)(2) >= 2 * WORK


def test_a_step_timer_knows_the_processor_time_of_its_calls():
    def call() -> None:
        end = time.process_time() + 0.002
        while time.process_time() < end:
            pass

    run, before = StepTimer(call), time.process_time()
    run(2)
    run(4)
    assert len(run.busy) == 2
    assert min(run.busy) >= 0.002
    assert 2 * run.busy[0] + 4 * run.busy[1] < time.process_time() - before


def test_what_passes_between_calls_shortens_the_batches():
    alone_, among = Machine(1e-4), Machine(1e-4)
    measure(alone_.run, alone, PLAIN)
    timing = measure(among.run, alone, PLAIN, other=0.01)
    assert timing.median == pytest.approx(1e-4, rel=1e-6)
    assert among.calls < alone_.calls / 5


@given(st.floats(1e-6, 10.0), st.floats(0.0, 1.0))
def test_among_other_work_a_batch_takes_a_bounded_time(call, other):
    pace = PLAIN.among(call, other)
    assert 0 < pace.batch <= PLAIN.batch
    assert pace.window / pace.batch == pytest.approx(PLAIN.window / PLAIN.batch)
    assert pace.batch / call * (call + other) <= COLD_STRETCH * PLAIN.batch * (1 + 1e-9)


def test_noise_is_said_only_where_it_is():
    assert warnings([summarised("device 0: route", [0.1] * 20 + [3.0])]) == ()
    (line,) = warnings([summarised("device 0: route", [0.1, 0.9, 0.8])])
    assert "device 0: route" in line
    assert "2 of 3 points" in line


def law(at: Coordinates) -> float:
    return 1e-3 * at["experts"] * (1 + at["tokens"] / 8)


GRID = Grid(
    {"experts": 1, "tokens": 1},
    (*steps("tokens", 64), *steps("experts", 4), *steps("tokens", 8, 256, 8), *steps("experts", 1, 2)),
    needed=2,
    linear=("experts",),
)


def visitor(seen: list[Coordinates], scale: float = 1.0):
    def visit(at: Coordinates) -> Point:
        seen.append(dict(at))
        seconds = scale * law(at)
        return Point(Timing(seconds, 0.0, 3), seconds, 0.01)

    return visit


def test_a_grid_with_time_enough_is_complete_and_each_point_is_measured_once():
    seen: list[Coordinates] = []
    curve = grow(GRID, visitor(seen), PLAIN, 1000.0)
    assert [axis.values for axis in curve.axes] == [(1, 2, 4), (1, 8, 64, 256)]
    assert [axis.beyond for axis in curve.axes] == ["linear", "flagged"]
    assert len(seen) == 12
    for experts, tokens in product((1, 2, 4), (1, 8, 64, 256)):
        assert curve.at(experts=experts, tokens=tokens).seconds == pytest.approx(
            law({"experts": experts, "tokens": tokens})
        )


@given(st.floats(0, 60), st.floats(0.1, 30))
@example(5.0, 7.0)  # foreseen beyond a second a call, then just below it, where more calls are made
def test_grids_are_rectangles_within_their_allowance(allowance, scale):
    seen: list[Coordinates] = []
    curve = grow(GRID, visitor(seen, scale), PLAIN, allowance)
    assert {1, 4} <= set(curve.axes[0].values)
    assert {1, 64} <= set(curve.axes[1].values)

    def cost(points):
        return sum(0.01 + PLAIN.cost(scale * law(at)) for at in points)

    needed = [{"experts": e, "tokens": t} for e in (1, 4) for t in (1, 64)]
    assert cost(seen) <= max(allowance, cost(needed)) + 1e-9


def test_what_does_not_fit_in_memory_is_left_out():
    curve = grow(GRID, visitor([]), PLAIN, 1000.0, fits=lambda at: at["tokens"] < 100)
    assert curve.axes[1].values == (1, 8, 64)


def test_message_sizes_reach_16_mib_on_a_fast_link_and_stop_early_on_a_slow_one():
    def link(rate: float):
        def visit(at: Coordinates) -> Point:
            seconds = 1e-4 + at["bytes"] / rate
            return Point(Timing(seconds, 0.0, 3), seconds, 0.0)

        return visit

    fast, slow, slower = (grow(SIZES, link(rate), PLAIN, 1.0).axes[0].values for rate in (1e10, 1e7, 1e6))
    assert (fast[0], fast[-1], len(fast)) == (1 << 10, 1 << 24, 8)
    assert 1 << 20 <= slow[-1] < 1 << 24
    assert 1 << 16 in slower

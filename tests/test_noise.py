"""What other programs disturb: left out, waited for, measured again, or refused."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.profiler import profile
from moeplan.profiler.grids import Coordinates, Grid, Growth, Point, measured, repair, steps
from moeplan.profiler.measure import IN_A_ROW, Pace, Timing, measure, measure_exchange, processor_clock, timer
from moeplan.profiler.noise import UNUSABLE_PART, noise, refusal, summarised, warnings
from moeplan.profiler.patience import IMPATIENT, QUIET, Patience
from moeplan.profiler.worker import shares_cores
from moeplan.runtime.launch import Rank
from moeplan.runtime.launch.rank import Seated
from moeplan.runtime.load import Program
from moeplan.spec import MoeplanError
from moeplan.spec.cluster import CurveNoise, Provenance
from moeplan.spec.load import Load
from moeplan.tests.spelled_out import spelled_out
from moeplan.tests.synthetic import cluster as synthetic_cluster
from moeplan.tests.test_profiler import tiny

PLAIN = Pace.of(False)


def alone(value: float) -> float:
    return value


class Exchange:
    """A collective of ``cost`` seconds; ``busy`` says for each call whether another program is there: it takes long."""

    def __init__(self, cost: float, busy, late: float = 0.02) -> None:
        self.cost, self.busy, self.late = cost, busy, late
        self.calls: list[float] = []
        self.inside: list[float] = []
        self.disturbed, self.made = False, 0
        self.random = random.Random(3)

    def __call__(self, times: int) -> float:
        self.disturbed, total = False, 0.0
        for _ in range(times):
            there = self.busy(self.made)
            self.made += 1
            self.disturbed |= there
            self.calls.append(self.cost + (self.random.random() * self.late if there else 0.0))
            self.inside.append(self.calls[-1] / 4)
            total += self.calls[-1]
        return total


class Visitor(Patience):
    """The other program leaves once it has been waited for ``patience`` times."""

    def __init__(self, patience: int) -> None:
        super().__init__(None, float, 0.0)
        self.asked, self.patience = 0, patience

    def wait(self) -> bool:
        self.asked += 1
        return self.asked <= self.patience


@pytest.mark.parametrize("cost", [2e-4, 5e-3, 0.3, 1.5])
def test_a_quiet_exchange_is_measured_exactly_and_nothing_is_waited_for(cost):
    run, patience = Exchange(cost, lambda call: False), Visitor(0)
    timing = measure_exchange(run, alone, PLAIN, patience, list).due
    assert timing.median == pytest.approx(cost)
    assert timing.clean
    assert patience.asked == 0


@given(st.integers(2, 12), st.integers(0, 100))
def test_a_program_that_comes_and_goes_moves_nothing(period, seed):
    # There in a third of the time, in stretches of so many calls.
    run = Exchange(4e-4, lambda call: (call // (25 * period) + seed) % 3 == 0)
    timing = measure_exchange(run, alone, PLAIN, Visitor(10**6), list).due
    if timing.clean:
        assert timing.median == pytest.approx(4e-4)
        assert timing.spread < 1e-6
    else:
        assert timing.median < 4e-4 + run.late / 2


def test_what_stays_is_waited_for_and_then_the_low_calls_count():
    run, patience = Exchange(4e-4, lambda call: True), Visitor(3)
    timing = measure_exchange(run, alone, PLAIN, patience, list).due
    assert not timing.clean
    assert patience.asked > 3
    assert timing.median < 4e-4 + 0.3 * run.late  # the mean would be half of it


def test_long_exchanges_are_made_twice_whoever_is_there():
    for there in (False, True):
        run = Exchange(1.5, lambda call, there=there: there)
        assert measure_exchange(run, alone, PLAIN, Visitor(9), list).due.clean is not there
        assert run.made == 2


@pytest.mark.parametrize("cost", [2e-4, 0.3, 1.5])
def test_an_exchange_counts_from_when_the_last_member_has_come(cost):
    """Of every call the member that spent least in it, which need not be the same one each time."""
    run = Exchange(cost, lambda call: False)
    others = random.Random(5)
    shortest = []

    def least(inside):
        shortest.extend(min(value, others.random() * cost) for value in inside)
        return shortest

    found = measure_exchange(run, alone, PLAIN, IMPATIENT, least)
    assert len(shortest) == len(run.inside)
    assert min(shortest) <= found.last.median <= max(shortest)
    assert found.last.batches == found.due.batches
    assert found.last.clean


def test_nobody_is_waited_for_because_of_one_batch():
    run, patience = Exchange(4e-4, lambda call: call == 40), Visitor(10)
    assert measure_exchange(run, alone, PLAIN, patience, list).due.clean
    assert IN_A_ROW > 1
    assert patience.asked == 0


def test_ranks_decide_alike_when_only_one_is_disturbed():
    run = Exchange(4e-4, lambda call: False)  # this rank sees nothing, another one does
    found = measure_exchange(
        run, lambda value: max(value, 1.0) if value in (0.0, 1.0) else value, PLAIN, IMPATIENT, list
    )
    assert not found.due.clean
    assert not found.last.clean


def test_the_clock_of_a_single_thread_stands_still_while_it_does_not_run():
    clock = processor_clock(1)
    before = clock()
    time.sleep(0.05)
    assert clock() - before < 0.03
    timing = measure(timer([lambda: sum(range(2000))], device("cpu"), clock), alone, PLAIN)
    assert 0 < timing.median < 0.1


def test_with_several_threads_waiting_for_each_other_counts():
    clock, begin = processor_clock(4), time.perf_counter()
    before = clock()
    time.sleep(0.05)
    assert 0.0 < clock() - before <= time.perf_counter() - begin


def device(kind: str):
    import torch

    return torch.device(kind)


class Meter:
    """Looks at the machine: the load that each look finds."""

    def __init__(self, *taken: float) -> None:
        self.taken, self.names, self.left_out = list(taken), 0, 0

    def read(self) -> None: ...

    def leave_out(self, before: None) -> None:
        self.left_out += 1

    def since(self, before: None) -> Load:
        return Load(seconds=0.1, foreign=self.taken.pop(0) if len(self.taken) > 1 else self.taken[0])

    def programs(self, seconds: float) -> list[Program]:
        self.names += 1
        return [Program(77, "cc1plus", 0.9)]


def test_waiting_ends_when_the_machine_is_quiet_and_says_for_whom(monkeypatch):
    monkeypatch.setattr("moeplan.profiler.patience.WINDOW", 0.001)
    said: list[str] = []
    meter = Meter(0.9, 0.9, 0.5, QUIET / 2)
    patience = Patience(meter, alone, 10.0, said.append)
    assert patience.wait()
    assert meter.left_out == 4  # what was not measured does not count
    assert said == ["waiting for cc1plus (process 77, 90% of a core)"]
    assert 0 < patience.waited < 10
    assert patience.left == pytest.approx(10 - patience.waited)


def test_waiting_ends_with_its_time_and_then_costs_nothing(monkeypatch):
    monkeypatch.setattr("moeplan.profiler.patience.WINDOW", 0.001)
    meter = Meter(1.0)
    patience = Patience(meter, alone, 0.02, lambda text: None)
    assert not patience.wait()
    looked, waited = meter.names, patience.waited
    assert waited >= 0.02
    assert not patience.wait()
    assert (meter.names, patience.waited) == (looked, waited)


def test_another_host_is_waited_for_although_this_one_is_quiet(monkeypatch):
    monkeypatch.setattr("moeplan.profiler.patience.WINDOW", 0.001)
    said: list[str] = []
    answers = iter([0.8, 0.1, 0.8, 0.1, 0.8, 0.1, 0.0, 0.1])  # load, then seconds, of the slowest rank
    patience = Patience(Meter(0.0), lambda value: next(answers), 10.0, said.append)
    assert patience.wait()
    assert said == ["waiting for other programs on another host"]


def growth(values: list[list[Timing]]) -> Growth:
    """A grid of one axis whose points have these timings, one after the other."""
    grid = Grid({"tokens": 1}, steps("tokens", *range(2, len(values) + 1)), needed=len(values) - 1)

    def visit(at: Coordinates) -> Point:
        timing = values[at["tokens"] - 1].pop(0)
        return Point(timing, timing.median, 0.0, timing.spread if timing.clean else float("inf"))

    result = Growth(grid, visit, PLAIN)
    result.start()
    return result


def test_noisy_points_are_measured_again_the_worst_first_and_the_better_is_kept():
    first = growth([[Timing(1.0, 0.1, 3)], [Timing(9.0, 0.9, 3), Timing(2.0, 0.2, 3)]])
    second = growth([[Timing(5.0, 0.3, 3, False), Timing(3.0, 0.6, 3)], [Timing(4.0, 0.8, 3), Timing(8.0, 1.8, 3)]])
    waits: list[int] = []
    repair([first, second], lambda: False, lambda: waits.append(1))
    assert first.curve().median == (1.0, 2.0)
    assert second.curve().median == (3.0, 4.0)
    assert len(waits) == 3
    assert first.noisy == []
    assert second.noisy == [{"tokens": 1}, {"tokens": 2}]


def test_a_point_that_takes_longer_than_one_with_more_work_is_measured_again():
    grid = growth([[Timing(1.0, 0.1, 3)], [Timing(4.0, 0.1, 3), Timing(1.9, 0.3, 3)], [Timing(2.0, 0.1, 3)]])
    assert grid.noisy == [{"tokens": 2}]
    repair([grid], lambda: False, lambda: None)
    assert grid.curve().median == (1.0, 1.9, 2.0)
    assert grid.noisy == []


def test_repairs_end_when_they_must():
    grid = growth([[Timing(1.0, 3.0, 3), Timing(1.0, 0.0, 3)], [Timing(1.0, 2.0, 3)]])
    ends = iter([False, True])
    repair([grid], lambda: next(ends), lambda: None)
    assert grid.noisy == [{"tokens": 2}]


def test_the_time_that_others_cost_is_foreseen():
    class Bench:
        pace = PLAIN
        agree = staticmethod(alone)

    point = measured(Timing(1e-4, 0.1, 3), 1.0, Bench())  # type: ignore[arg-type]
    assert point.build + PLAIN.cost(1e-4) == pytest.approx(1.0)
    assert measured(Timing(1e-4, 0.1, 3), 0.0, Bench()).build == 0.0  # type: ignore[arg-type]
    assert measured(Timing(1e-4, 0.1, 3, False), 0.0, Bench()).noise == float("inf")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("share", "quota", "wanted"), [(1.0, None, False), (0.5, None, True), (1.0, 1.5, True), (1.0, 2.0, False)]
)
def test_ranks_that_have_less_than_their_cores_by_design(share, quota, wanted):
    rank = Rank(0, 2, ("a", "a"), device("cpu"), threads=1, cpu_share=share, send=lambda event: None)
    assert shares_cores(rank, quota) == wanted


BUSY = Load(seconds=80, foreign=0.6, steal=0.2)


def provenance(load: Load | None = None) -> Provenance:
    return Provenance(created="now", command="test", versions={}, seconds=80.0, models=("tiny",), load=load)


def entry(curve: str, **changed) -> CurveNoise:
    return CurveNoise(**{"curve": curve, "points": 8, "noisy": 1, "typical": 0.3, "worst": 0.7} | changed)


def test_a_refusal_names_the_curves_the_load_and_what_to_do_in_one_line():
    found = [entry("route (f32)"), entry("all_to_all", disturbed=8), entry("links", typical=2.5)]
    text = refusal(found, provenance(BUSY))
    assert text is not None
    assert "\n" not in text
    assert "all_to_all (spread 30%, 8 of 8 points disturbed)" in text
    assert "links (spread 250%" in text
    assert "route" not in text
    assert "other programs used 60% of the cores, other virtual machines used 20% of the cores" in text
    assert "--budget" in text
    assert "--accept-noise" in text


def test_what_is_usable_is_not_refused():
    half = int(UNUSABLE_PART * 8)
    assert refusal([entry("all_to_all", disturbed=half, typical=0.9)], provenance(BUSY)) is None
    assert refusal([], provenance()) is None


def test_warnings_speak_of_the_machine_and_of_disturbed_points():
    first, second = warnings([entry("route (f32)"), entry("all_to_all", disturbed=2)], BUSY)
    assert first.startswith("other programs used 60% of the cores, other")
    assert first.endswith("while this was measured; profile again on an idle machine")
    assert "2 never undisturbed" in second
    assert warnings([entry("route (f32)")], Load(seconds=80, foreign=0.03)) == ()
    assert warnings([], Load(seconds=80, missing=("/proc/stat", "cpu pressure"))) == (
        "whether the machine was busy is not known: there is no /proc/stat, no cpu pressure here",
    )
    in_a_container = Load(seconds=80, foreign=0.0, missing=("/proc/stat",))
    assert warnings([], in_a_container) == ("only programs of this container are seen: there is no /proc/stat here",)
    assert "held a rank back for 40%" in warnings([], Load(seconds=80, foreign=0.0, throttled=0.4))[0]


def test_points_of_a_group_are_counted_once_and_links_by_each_rank():
    measured = spelled_out(synthetic_cluster(tiny(), ((1.0, 1.0),), late=1e-4))
    found = {one.curve: one for one in noise(measured, [{"all_to_all": 3, "links": 1}, {"all_to_all": 3, "links": 2}])}
    assert found["all_to_all"].disturbed == 3
    assert found["links"].disturbed == 3
    assert found["all_gather"].disturbed == 0


def test_no_spreads_hide_behind_one_another():
    one = summarised("links", [0.1, 0.6, 0.2])
    assert (one.points, one.noisy, one.typical, one.worst) == (3, 1, 0.2, 0.6)


class Recorded:
    """A launcher whose ranks have measured already."""

    def __init__(self, results: list[dict]) -> None:
        self.results = results

    def seated(self) -> list[Seated]:
        return [Seated()] * len(self.results)

    def run(self, entry, job, *, timeout, on_event=None) -> list[dict]:
        return self.results


def recorded(disturbed: int) -> Recorded:
    measured = spelled_out(synthetic_cluster(tiny(), ((1.0, 1.0),), late=1e-4))
    results = []
    for i, one in enumerate(measured.devices):
        results.append(
            {
                "device": one.model_dump(mode="json"),
                "links": [link.model_dump(mode="json") for link in measured.links if link.source == i],
                "collectives": [entry.model_dump(mode="json") for entry in measured.collectives if i in entry.group],
                "uplinks": {host.name: (1e9, 1e9) for host in measured.hosts},
                "versions": {},
                "load": BUSY.model_dump(mode="json"),
                "waited": 12.0,
                "lacking": [],
                "disturbed": {"all_to_all": disturbed},
            }
        )
    return Recorded(results)


def test_profile_refuses_unless_noise_is_accepted_and_records_why():
    points = sum(
        len(one.curve.median)
        for one in synthetic_cluster(tiny(), ((1.0, 1.0),), late=1e-4).collectives
        if one.collective == "all_to_all"
    )
    with pytest.raises(MoeplanError, match=r"all_to_all .*--accept-noise") as error:
        profile(recorded(points), [tiny()])  # type: ignore[arg-type]
    assert error.value.exit_code == 2
    kept = profile(recorded(points), [tiny()], accept_noise=True).provenance  # type: ignore[arg-type]
    assert kept.noise_accepted
    assert (kept.load, kept.waited) == (BUSY, 12.0)
    assert next(one for one in kept.noise if one.curve == "all_to_all").disturbed == points
    assert kept.disturbed_limit == UNUSABLE_PART
    quiet = profile(recorded(0), [tiny()]).provenance  # type: ignore[arg-type]
    assert not quiet.noise_accepted
    assert quiet.warnings[0].startswith("other programs used 60% of the cores")

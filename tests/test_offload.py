"""Plans with experts beyond memory: what they may say, what is kept, when what is there, and when they are chosen."""

import functools
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.offloading import kept
from moeplan.planner.search import solve
from moeplan.planner.step import Step
from moeplan.planner.strategies.reading import Cold, Reading
from moeplan.runtime.run import reads_note, reads_of
from moeplan.spec import Plan, Workload
from moeplan.spec.errors import DocumentError, InfeasibleError, MissingCurveError, MoeplanError
from moeplan.spec.offload import Offload, Reads, cold_experts
from moeplan.spec.plan import LayerPlan
from moeplan.tests.plans import hand_made_plan
from moeplan.tests.synthetic import cluster, tiny_model

MODEL = tiny_model(layers=4, hidden=64, ffn=128, experts=8)
EXPERT = 3 * 64 * 128 * 4  # bytes
DECODE, PREFILL = Workload.from_text("decode:4@64"), Workload.from_text("prefill:256@32")


# what a plan may say -------------------------------------------------------------------------------------------------

HALF = {"slots": (tuple(range(8)),), "resident": ((0, 1),), "ahead": ((4,),)}


def planned(changes: dict, offload: dict | None, **options) -> Plan:
    layer = LayerPlan(**({"strategy": "offload"} | HALF | changes))
    return hand_made_plan(MODEL, DECODE, [layer], tokens=(4,), offload=offload and Offload(**offload), **options)


@pytest.mark.parametrize(
    ("changes", "offload", "said"),
    [
        ({"strategy": "ep"}, None, "resident and ahead belong to strategy offload, and only there"),
        ({"resident": None}, None, "resident and ahead belong to strategy offload, and only there"),
        ({"resident": ((0,), (1,))}, None, "resident and ahead need one list for each device"),
        ({"resident": ((0, 9),)}, None, "resident[0] must hold some of the device's slots, each once"),
        ({"ahead": ((1,),)}, None, "ahead[0] must hold some of the device's slots that are not resident, each once"),
        ({"ahead": ((4, 4),)}, None, "ahead[0] must hold some of"),
        ({}, None, "offload: belongs to plans with layers of strategy offload, and only there"),
        ({}, {"folder": "/disk", "places": (1, 1)}, "offload.places: 2 numbers for 1 devices"),
        (
            {"strategy": "ep", "host_rows": (1,), "resident": None, "ahead": None},
            None,
            "host_rows belong to strategy off",
        ),
        ({"host_rows": (1, 1)}, None, "host_rows need one number for each device"),
        ({"host_rows": (-1,)}, None, "greater than or equal to 0"),
        ({"host_rows": (1,)}, {"folder": "/disk", "places": (1,)}, "layers.host_rows[0]: its experts rest on a disk"),
        ({}, {"folder": "/disk", "places": (0,)}, "offload.places[0]: 0, but some of its experts rest on the disk"),
    ],
)
def test_plans_that_contradict_themselves(changes, offload, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        planned(changes, offload)


def test_all_layers_are_offload_and_stored():
    offload = Offload(folder="/disk", places=(1,))
    layers = [LayerPlan(strategy="offload", **HALF), LayerPlan(strategy="ep", slots=HALF["slots"])]
    with pytest.raises(ValueError, match="layers are offload and ep: all must be offload, or none"):
        hand_made_plan(MODEL, DECODE, layers, tokens=(4,), offload=offload)
    with pytest.raises(ValueError, match="offload plans store all layers"):
        planned({}, {"folder": "/disk", "places": (1,)}, stored_layers=2)


def test_it_is_written_and_read():
    plan = planned({}, {"folder": "/disk", "places": (2,)})
    assert Plan.parse(plan.to_json(), "plan") == plan
    body = json.loads(plan.to_json())
    body["offload"]["places"] = [-2]
    with pytest.raises(DocumentError, match=r"plan: offload.places.*-2"):
        Plan.parse(json.dumps(body), "plan")


# what is read, and when ----------------------------------------------------------------------------------------------


def test_the_order_is_ahead_then_most_tokens():
    rows = np.array([3, 0, 5, 1, 5, 2])
    slots = (10, 11, 12, 13, 14, 15)
    assert cold_experts(rows, slots, (13,), (15, 11)) == ([5, 2, 4, 0], [])
    assert cold_experts(rows, slots, (13,), (15, 11), host_rows=3) == ([5, 2, 4], [0])  # 15 is to be read ahead
    assert cold_experts(rows, slots, (13,), (), host_rows=5) == ([], [2, 4, 0, 5])


def simulated(layers: list[tuple[float, float, Cold]], places: int, read: float) -> list[float]:
    """When each layer's experts are done, in small steps of time: a reader and a computer that know nothing of each
    other's future. layers: when it is known what the tokens need after the layer before, when their experts' turn
    comes after that, and what is cold."""
    tick, time, ends = 1, 0, []
    free, queue = places, []  # queue: (entry) to read, in order
    reading: tuple[object, int] | None = None  # entry, when it ends
    there: set = set()
    dropped: set = set()
    entry = itertools.count()
    ahead = [[next(entry) for _ in cold.ahead] for *_, cold in layers]
    queue += ahead[0]

    def turn() -> None:
        """Everything that happens at this moment but for what is computed."""
        nonlocal reading, free
        if reading is not None and reading[1] == time:
            if reading[0] in dropped:
                free += 1
            else:
                there.add(reading[0])
            reading = None
        if reading is None and queue and free:
            free -= 1
            reading = queue.pop(0), time + round(read)

    def wait(until) -> None:
        nonlocal time
        turn()
        while not until():
            time += tick
            turn()

    for j, (gap, turn_after, cold) in enumerate(layers):
        begin = time
        wait(lambda begin=begin, gap=gap: time == begin + gap)
        hits = [e for e, wanted in zip(ahead[j], cold.ahead, strict=True) if wanted]
        for e, wanted in zip(ahead[j], cold.ahead, strict=True):
            if not wanted:
                if e in queue:
                    queue.remove(e)
                elif e in there:
                    there.remove(e)
                    free += 1
                else:
                    dropped.add(e)
        needed = hits + [next(entry) for _ in range(len(cold.seconds) - len(hits))]
        queue += needed[len(hits) :] + (ahead[j + 1] if j + 1 < len(layers) else [])
        begin = time
        wait(lambda begin=begin, turn_after=turn_after: time == begin + turn_after)
        begin = time
        wait(lambda begin=begin, cold=cold: time == begin + cold.hot)
        for e, seconds in zip(needed, cold.seconds, strict=True):
            wait(lambda e=e: e in there)
            begin = time
            wait(lambda begin=begin, seconds=seconds: time == begin + seconds)
            there.remove(e)
            free += 1
        ends.append(time)
    return ends


@st.composite
def cold_layers(draw):
    found = []
    for _ in range(draw(st.integers(1, 3))):
        ahead = draw(st.lists(st.booleans(), max_size=4))
        late = draw(st.integers(0, 3))
        count = sum(ahead) + late
        seconds = draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
        gaps = draw(st.integers(0, 20)), draw(st.integers(0, 20))
        found.append((*gaps, Cold(draw(st.integers(0, 9)), list(seconds), ahead)))
    return found


@given(cold_layers(), st.integers(1, 4), st.integers(1, 7))
@settings(max_examples=400, deadline=None)
def test_waiting_is_what_a_reader_beside_a_computer_gives(layers, places, read):
    """Against a simulation in small steps; where two things happen at one moment, either order is right."""
    reading, now, ends = Reading(float(read), [0.0] * places), 0.0, []
    for gap, turn_after, cold in layers:
        known = now + gap
        now = known + turn_after
        waited, computed = reading.layer(known, now, cold)
        now += waited + computed
        ends.append(now)
    found = simulated(layers, places, read)
    # A read that could begin in the very moment in which it is known to be needless may be made or not.
    vain = sum(not wanted for *_, cold in layers for wanted in cold.ahead)
    assert all(abs(a - b) <= read * vain for a, b in zip(ends, found, strict=True))
    if not vain:
        assert ends == found


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 13), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_what_stays_is_what_is_needed_most(layers, experts, most, seed):
    needed = np.random.default_rng(seed).random((layers, experts))
    stays = kept(needed, [range(experts)] * layers, most)
    value = sum(needed[j, e] for j, held in enumerate(stays) for e in held)
    best = np.sort(needed.ravel())[::-1][:most].sum()
    assert sum(map(len, stays)) == min(most, needed.size)
    assert value == pytest.approx(best, abs=1e-3 * (most + 1))


def test_a_report_says_what_was_expected_of_the_reads():
    counts = [[4.0, 3.0, 2.0, 0.5, 0.0], [], [2.0, 1.0, 1.0, 0.0, 0.0]]
    reads = reads_of(counts)
    assert reads == Reads(needed=6.0, listed=4.0, ahead=3.0, vain=0.5)
    assert reads_of([[], []]) is None
    assert reads_note(None, None) == ()
    expected = Reads(needed=7, listed=5, ahead=4, vain=1)
    assert reads_note(reads, expected) == (
        "a step needed 6.0 experts from outside memory, 3.0 of them among the 4.0 that were to be read ahead; 0.5 were "
        "read in vain (expected: 7, 4, 5, 1)",
    )
    hosted = reads_of([[4.0, 3.0, 2.0, 0.5, 1.5]])
    assert hosted is not None
    assert reads_note(hosted, expected.model_copy(update={"host": 2.0}))[1] == (
        "1.5 experts more were computed by the hosts' processors, where they rest (expected: 2)"
    )


# the search ----------------------------------------------------------------------------------------------------------


@functools.cache
def machines(disk: float | None = 1e8, memory: int = 2**30):
    return cluster(MODEL, ((1.0, 0.5),), memory=memory, disk=disk)


def short(workload: Workload, share: float) -> int:
    """Bytes in which this share of a device's experts fits, beside everything else."""
    plan = solve(MODEL, machines(), workload, strategy="ep")
    return max(m.total - int((1 - share) * m.weights) for m in plan.predicted.memory)


@pytest.mark.parametrize("workload", [DECODE, PREFILL], ids=str)
def test_it_is_chosen_where_memory_is_short(workload):
    limit = short(workload, 0.5)
    plan = solve(MODEL, machines(), workload, memory_bytes=limit)
    assert {layer.strategy for layer in plan.layers} == {"offload"}
    assert plan.offload is not None
    assert plan.offload.folder == "/disk"
    assert all(0 < m.total <= m.limit for m in plan.predicted.memory)
    assert any("experts do not fit and rest in files in /disk" in known for known in plan.notes)
    assert plan.solver.bound <= plan.solver.objective
    assert Step.of(plan, machines()).seconds(list(plan.layers)) == pytest.approx(plan.solver.objective)
    assert Plan.parse(plan.to_json(), "plan") == plan
    assert plan.placements
    with pytest.raises(InfeasibleError):  # without a disk
        solve(MODEL, machines(disk=None), workload, memory_bytes=limit)


def test_the_bound_holds_for_other_residents():
    """Whatever stays, within the same memory, is no faster than the bound says."""
    limit = short(DECODE, 0.5)
    plan = solve(MODEL, machines(), DECODE, memory_bytes=limit)
    step, rng = Step.of(plan, machines()), np.random.default_rng(0)
    for _ in range(20):
        layers = []
        for layer in plan.layers:
            stays = [
                rng.permutation(held)[: len(kept)].tolist()
                for held, kept in zip(layer.slots, layer.resident, strict=True)
            ]
            resident = tuple(tuple(sorted(one)) for one in stays)
            layers.append(layer.model_copy(update={"resident": resident, "ahead": ((), ())}))
        assert step.seconds(layers) >= plan.solver.bound


def test_nothing_rests_where_everything_fits():
    plan = solve(MODEL, machines(), DECODE, strategy="offload")
    ep = solve(MODEL, machines(), DECODE, strategy="ep")
    assert plan.offload is not None
    assert plan.offload.places == (0, 0)
    assert all(layer.resident == layer.slots for layer in plan.layers)
    assert plan.solver.objective >= 0.99 * ep.solver.objective
    assert "offload" not in {name for c in solve(MODEL, machines(), DECODE).candidates for name in c.strategies}


def test_more_memory_is_no_slower():
    found = [solve(MODEL, machines(), DECODE, memory_bytes=short(DECODE, s)).solver.objective for s in (0.3, 0.6, 0.9)]
    assert found == sorted(found, reverse=True)


def test_what_cannot_be_offloaded_is_said():
    with pytest.raises(MoeplanError, match="--strategy offload: no disk was measured for devices of kind speed 1"):
        solve(MODEL, machines(disk=None), DECODE, strategy="offload")
    bare = machines()
    kinds = tuple(
        kind.model_copy(update={"operators": tuple(o for o in kind.operators if "offload" not in o.operator)})
        for kind in bare.kinds
    )
    with pytest.raises(MissingCurveError, match="moeplan profile --model tiny --dtype f32 --offload FOLDER"):
        solve(MODEL, bare.model_copy(update={"kinds": kinds}), DECODE, strategy="offload")
    with pytest.raises(InfeasibleError):
        solve(MODEL, machines(), DECODE, memory_bytes=2**16)


def test_layers_whose_experts_differ_in_size_keep_to_the_limit():
    small, large = (tiny_model(layers=2, ffn=ffn).blocks[0] for ffn in (64, 256))
    model = MODEL.model_copy(update={"blocks": (small, large)})
    machine = cluster(model, ((1.0, 0.5),), disk=1e8)
    whole = solve(model, machine, DECODE, strategy="offload")
    limit = max(m.total - m.weights // 4 for m in whole.predicted.memory)
    plan = solve(model, machine, DECODE, strategy="offload", memory_bytes=limit)
    assert all(m.total <= limit for m in plan.predicted.memory)
    assert any(layer.resident != layer.slots for layer in plan.layers)
    assert plan.solver.bound <= plan.solver.objective

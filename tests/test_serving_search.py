"""The search for how to serve: against all splits and all counts, and that nothing is proposed which does not fit."""

import json
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.described import cluster_of
from moeplan.planner.serving_search.classes import DeviceClass, classes_of
from moeplan.planner.serving_search.commands import starts
from moeplan.planner.serving_search.compared import front
from moeplan.planner.serving_search.engines import FACTS, MEMORY_FRACTION
from moeplan.planner.serving_search.footprint import GIB, Division, Sizes, Step
from moeplan.planner.serving_search.forms import Form, forms
from moeplan.planner.serving_search.offers import Offering, counts_of
from moeplan.planner.serving_search.plan import Predictor, plan_serving
from moeplan.planner.serving_search.rules import RULES, Shape, broken
from moeplan.planner.serving_search.search import Limits, choose
from moeplan.service.serving_export import export_serving
from moeplan.spec.catalogue import load_model
from moeplan.spec.described import Described, Hosts
from moeplan.spec.errors import DocumentError, InfeasibleError, MoeplanError
from moeplan.spec.serving import ServingPlan
from moeplan.spec.serving_load import ServingLoad, parse_load
from moeplan.spec.tabled import System

MODEL = load_model("qwen3-30b-a3b")
# Bytes per second and FLOP per second; memory in GiB.
GPUS = {"fast": (3.35e12, 9.9e14, 80), "faster": (4.8e12, 9.9e14, 141), "slow": (8.6e11, 3.6e14, 45)}


class Roofline:
    """Steps of one division: bytes of weights and cache over the memory's rate, FLOP over the processors'."""

    def __init__(self, system: str, division: Division, load: ServingLoad) -> None:
        self.rate, self.flops, _ = GPUS[system]
        sizes = Sizes(MODEL)
        self.weights = float(sizes.layer_weights(division).sum())
        self.cache = float(sizes.layer_cache(division, load.isl + load.osl // 2).sum()) / division.dp
        self.division, self.isl = division, load.isl

    def decode(self, batch: int) -> float:
        return (self.weights + self.cache * batch) / self.rate + 1e-3 * (self.division.gpus > 1)

    def prefill(self, prompts: int) -> float:
        return 1e-3 + 2 * MODEL.active_parameters() * self.isl * prompts / (0.5 * self.flops * self.division.gpus)


def times_of(load: ServingLoad):  # type: ignore[no-untyped-def]
    return lambda engine, system, division: Roofline(system, division, load)


def sheet(name: str) -> System:
    rate, flops, memory = GPUS[name]
    return System(name, "test", memory * GIB, rate, {"bfloat16": flops}, 4e11, 5e10, 6e10, 8)


def cluster(*hosts: tuple[str, int, int]):  # type: ignore[no-untyped-def]
    described = Described(devices=tuple(Hosts(gpu=gpu, hosts=n, gpus=g) for gpu, n, g in hosts))
    return cluster_of(described, sheet, "test", "test")


def plan(load: str, *hosts: tuple[str, int, int], **options) -> ServingPlan:  # type: ignore[no-untyped-def]
    parsed = parse_load(load)
    predictor = Predictor(times_of(parsed), None, "test")
    return plan_serving(MODEL, cluster(*hosts), parsed, predictor, **({"engine": "vllm", "apart": False} | options))


@pytest.mark.parametrize("on", [(0, 1), (1, 0), (0, 1, 1), (0, 0, 1)])
@pytest.mark.parametrize("room", [(80, 45), (30, 45), (22, 60)])
def test_layers_of_a_mixed_pipeline_as_all_splits_say(on: tuple[int, ...], room: tuple[int, int]) -> None:
    """TPOT of every split of the 48 layers, written out again: the offer's is the least of those that fit."""
    load = parse_load("serve:isl=1024,osl=256,concurrency=8")
    classes = [DeviceClass(kind, kind, 4, 1, gib * GIB, 5e10) for kind, gib in zip(("fast", "slow"), room, strict=True)]
    sizes, one = Sizes(MODEL), Division(1, 1, 1, 1)
    offering = Offering("vllm", sizes, classes, load, times_of(load))
    offers = offering.offers(Form(Shape(one, len(on)), on), [8])
    steps = [Roofline(classes[c].system, one, load) for c in on]
    batch, stages = 8 / len(on), len(on)
    best = np.inf
    for cuts in combinations(range(1, 48), stages - 1):
        layers = [b - a for a, b in zip((0, *cuts), (*cuts, 48), strict=True)]
        held = sizes.footprints(one, layers, 8, load.most_tokens, Step(8192, 8))
        if any(h.total > MEMORY_FRACTION * classes[c].memory for h, c in zip(held, on, strict=True)):
            continue
        turns = [
            n / 48 * (s.decode(batch) + batch / 256 * s.prefill(8) / 8)  # type: ignore[arg-type]
            for n, s in zip(layers, steps, strict=True)
        ]
        best = min(best, stages * max(turns))
    if best == np.inf:
        assert offers == []
        return
    joints = sum(a != b for a, b in pairwise(on))
    sends = joints * batch * 2048 * 2 / 5e10
    assert offers[0].tpot == pytest.approx(best + sends, rel=0.01)  # steps between powers of two are read


def test_choice_of_small_cases_as_all_counts_say() -> None:
    """Every number of replicas of every offer of a few forms on four fast and four slow GPUs."""
    load = parse_load("serve:isl=512,osl=128")
    classes = [DeviceClass("fast", "fast", 4, 1, 80 * GIB, 5e10), DeviceClass("slow", "slow", 4, 1, 45 * GIB, 5e10)]
    offering = Offering("vllm", Sizes(MODEL), classes, load, times_of(load))
    chosen = [
        Form(Shape(Division(2, 1, 2, 1), 1), (0,)),
        Form(Shape(Division(4, 1, 4, 1), 1), (0,)),
        Form(Shape(Division(2, 1, 2, 1), 1), (1,)),
        Form(Shape(Division(2, 1, 2, 1), 2), (0, 1)),
    ]
    for limit in (None, 0.02, 0.012):
        limits = Limits(tpot=limit)
        offers = [o for form in chosen for o in offering.offers(form, [16, 64]) if limits.allow(o)]
        best = max(
            sum(n * o.tokens for n, o in zip(counts, offers, strict=True))
            for counts in product(range(3), repeat=len(offers))
            if all(sum(n * o.form.need(2)[c] for n, o in zip(counts, offers, strict=True)) <= 4 for c in range(2))
        )
        assert choose("vllm", offers, classes, load, limits).tokens == pytest.approx(best)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["serve:isl=1024,osl=512", "serve:isl=4096,osl=256,concurrency=24", "serve:isl=256,osl=64,rate=5"]),
    st.tuples(st.sampled_from(list(GPUS)), st.integers(1, 3), st.sampled_from([1, 2, 4, 6, 8])),
    st.tuples(st.sampled_from(list(GPUS)), st.integers(1, 2), st.sampled_from([2, 4, 8])),
    st.sampled_from(list(FACTS)),
    st.sampled_from([None, True, False]),
    st.sampled_from([None, 0.03]),
)
def test_whatever_is_planned_fits_and_obeys_the_rules(load, first, second, engine, apart, tpot) -> None:  # type: ignore[no-untyped-def]
    try:
        found = plan(load, first, second, engine=engine, apart=apart, limits=Limits(tpot=tpot))
    except InfeasibleError as error:
        said = str(error)
    else:
        check(found, first, second, engine, tpot)
        return
    assert "\n" not in said
    assert MODEL.name in said


def check(found, first, second, engine, tpot) -> None:  # type: ignore[no-untyped-def]
    """Degrees, layers, memory, devices and load of a plan."""
    there = {(c.kind, c.per_host): c for c in classes_of(cluster(first, second))[0]}
    used = dict.fromkeys(there, 0)
    for r in found.replicas:
        d = r.degrees
        assert d.tp * d.dp == d.moe_tp * d.moe_ep
        assert broken(engine, MODEL, Shape(Division(d.tp, d.dp, d.moe_tp, d.moe_ep), d.pp)) is None
        assert sum(stage.layers for stage in r.stages) == 48
        assert len(r.stages) == d.pp
        for stage in r.stages:
            used[stage.kind, stage.per_host] += r.count * stage.gpus
            assert (
                stage.memory.total <= stage.memory.limit <= MEMORY_FRACTION * GPUS[stage.kind[:6].rstrip("-1")][2] * GIB
            )
        assert tpot is None or r.each.tpot_s <= tpot
    assert all(used[key] <= there[key].gpus for key in used)
    assert found.gpus == sum(used.values())
    if found.load.concurrency:
        in_flight = sum(r.count * r.concurrency for r in found.replicas)
        assert in_flight <= found.load.concurrency
        assert in_flight == found.load.concurrency or found.replicas[0].role != "both"
    if found.load.rate:
        assert found.requests_per_s >= found.load.rate * (1 - 1e-6)
    assert starts(found, "model")


@pytest.mark.parametrize("pair", [("fast", "slow"), ("fast", "faster")])
def test_unequal_treatment_is_never_worse(pair: tuple[str, str]) -> None:
    found = plan("serve:isl=1024,osl=512", *((gpu, 1, 4) for gpu in pair))
    names = [b.name for b in found.baselines]
    assert len(names) == 3
    assert names[2] == "all devices treated alike"
    assert all(found.predicted.tokens_per_s >= b.tokens_per_s * (1 - 1e-9) for b in found.baselines)
    assert found.predicted.tokens_per_s > min(b.tokens_per_s for b in found.baselines)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(
        InfeasibleError, match=r"lacks \d+\.\d GiB: on each slow weights \d+\.\d, cache .* GiB of 40\.5"
    ):
        plan("serve:isl=1024,osl=512", ("slow", 1, 1))
    with pytest.raises(InfeasibleError, match="the least TPOT"):
        plan("serve:isl=1024,osl=512", ("fast", 1, 2), limits=Limits(tpot=1e-6))
    with pytest.raises(InfeasibleError, match="all devices answer"):
        plan("serve:isl=1024,osl=512,rate=100000", ("fast", 1, 2))
    with pytest.raises(InfeasibleError, match="all devices hold"):
        plan("serve:isl=8192,osl=8192,concurrency=4000", ("fast", 1, 2))


def test_fewest_gpus() -> None:
    load = "serve:isl=1024,osl=512,concurrency=16"
    most, fewest = (plan(load, ("fast", 1, 8), limits=Limits(tpot=0.05, fewest=f)) for f in (False, True))
    assert fewest.gpus < most.gpus
    assert fewest.predicted.tpot_s <= 0.05


def test_the_front_is_not_beaten() -> None:
    load = parse_load("serve:isl=1024,osl=512")
    classes = [DeviceClass("fast", "fast", 8, 1, 80 * GIB, 5e10)]
    offering = Offering("sglang", Sizes(MODEL), classes, load, times_of(load))
    offers = [o for f in forms("sglang", MODEL, classes)[0] for o in offering.offers(f, counts_of(load, 8))]
    points = front(offers, Limits())
    assert points
    for p in points:
        assert not any(o.tpot < p.tpot and o.per_gpu > p.per_gpu for o in offers)


@pytest.mark.parametrize(
    ("engine", "shape", "said"),
    [
        ("vllm", Shape(Division(8, 1, 2, 4), 1), "whole .* or all divided"),
        ("vllm", Shape(Division(64, 1, 64, 1), 1), "heads"),
        ("sglang", Shape(Division(1, 8, 8, 1), 1), "whole experts only"),
        ("tensorrt-llm", Shape(Division(2, 4, 1, 8), 1), "one group per rank"),
        ("sglang", Shape(Division(1, 1, 1, 1), 49), "more stages"),
        ("sglang", Shape(Division(1, 2, 1, 2), 2), "without pipeline"),
    ],
)
def test_rules_say_why(engine: str, shape: Shape, said: str) -> None:
    import re

    reason = broken(engine, MODEL, shape)
    assert reason is not None
    assert re.search(said, reason)
    assert engine in RULES


def test_commands_start_what_was_planned() -> None:
    load = "serve:isl=1024,osl=512,concurrency=32"
    for engine, tensor in (("vllm", "--tensor-parallel-size"), ("sglang", "--tp-size"), ("tensorrt-llm", "--tp_size")):
        found = plan(load, ("fast", 1, 2), ("slow", 1, 2), engine=engine)
        for r, start in zip(found.replicas, starts(found, "some/model"), strict=True):
            words = list(start.command)
            asked = int(words[words.index(tensor) + 1])
            assert asked == (r.degrees.tp if engine == "vllm" else r.degrees.tp * r.degrees.dp)
            assert start.count == r.count
            assert "some/model" in words


def test_a_script_holds_no_line_that_a_name_put_there(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    """A plan may come from somebody else."""
    found = plan("serve:isl=1024,osl=512,concurrency=8", ("fast", 1, 2), engine="vllm")
    (replicas,) = found.replicas
    stage = replicas.stages[0].model_copy(update={"kind": "x\ntouch y\n#"})
    bad = found.model_copy(update={"replicas": (replicas.model_copy(update={"stages": (stage,)}),)})
    export_serving(bad, None, "m", tmp_path, False)
    lines = (tmp_path / "start.sh").read_text().splitlines()
    assert [line for line in lines if not line.startswith(("#", "vllm serve m "))] == []
    assert "touch y" in lines[1]
    assert "engines may not know" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["--trust-remote-code", "a\nb"])
def test_a_model_that_would_be_an_option(tmp_path, name: str) -> None:  # type: ignore[no-untyped-def]
    found = plan("serve:isl=1024,osl=512,concurrency=8", ("fast", 1, 2), engine="vllm")
    with pytest.raises(MoeplanError, match="give it with --model"):
        export_serving(found.model_copy(update={"asked": name}), None, None, tmp_path / "start", False)
    assert not (tmp_path / "start").exists()


def test_sizes_beyond_any_cluster_are_refused() -> None:
    found = plan("serve:isl=1024,osl=512,concurrency=8", ("fast", 1, 2)).model_dump(mode="json")
    found["replicas"][0]["count"] = 10**30
    with pytest.raises(DocumentError, match=r"replicas\[0\].count"):
        ServingPlan.parse(json.dumps({"kind": ServingPlan.kind, "version": 1} | found), "p")


def test_an_uneven_pipeline_says_its_layers() -> None:
    """Two GPUs, neither of which holds the model: one replica of two stages, of different length."""
    for engine, name in (("vllm", "VLLM_PP_LAYER_PARTITION"), ("sglang", "SGLANG_PP_LAYER_PARTITION")):
        found = plan("serve:isl=1024,osl=512", ("fast", 1, 1), ("slow", 1, 1), engine=engine, limits=Limits())
        (mixed,) = [r for r in found.replicas if len(r.stages) > 1]
        (start,) = [s for s in starts(found, "m") if s.environment]
        layers = [stage.layers for stage in mixed.stages]
        assert start.environment[name] == ",".join(map(str, layers))
        assert layers[0] != layers[1]


def test_a_model_that_no_engine_serves() -> None:
    load = parse_load("serve:isl=8,osl=8")
    with pytest.raises(MoeplanError, match="decoder-only"):
        plan_serving(load_model("switch-base-8"), cluster(("fast", 1, 1)), load, Predictor(times_of(load), None, "t"))


def test_from_names_to_commands(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The commands of docs/gpus.md on real tables: cluster, solve, explain, export."""
    pytest.importorskip("pyarrow")
    from typer.testing import CliRunner

    from moeplan.service.app import app

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, list(words), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    cluster_path, path = str(tmp_path / "c.json"), str(tmp_path / "p.json")
    run("cluster", "--device", "h100_sxm:1x2", "--device", "l40s:1x1", "-o", cluster_path)
    asked = ["solve", "-m", "gpt-oss-20b", "--cluster", cluster_path, "-o", path, "--engine", "vllm"]
    load = "serve:isl=1024,osl=256,concurrency=8"
    run(*asked, "--workload", load, "--together", "--tpot", "30ms", "--picture", str(tmp_path / "front.svg"))
    found = ServingPlan.read(path)
    assert found.predicted.tpot_s <= 0.03
    assert found.tables.startswith("aiconfigurator-core")
    assert (tmp_path / "front.svg").stat().st_size > 1000
    assert "what no other form beats" in run("explain", path)
    assert "vllm serve gpt-oss-20b" in run("export", path, "-o", str(tmp_path / "start"))
    assert (tmp_path / "start" / "start.sh").exists()
    for words, said in (
        (("export", path, "--to", "sglang"), "the plan is for vllm"),
        ((*asked, "--workload", load, "--dtype", "bf16"), "--dtype says nothing"),
        ((*asked, "--workload", load, "--precision", "fp3"), "--precision"),
        ((*asked, "--workload", load, "--ttft", "soon"), "--ttft"),
        ((*asked, "--workload", "decode:4", "--tpot", "3ms"), "--engine goes with"),
        (("explain", path, "--group", "0-1"), "leave them out"),
    ):
        with pytest.raises(MoeplanError, match=said):
            CliRunner().invoke(app, list(words), catch_exceptions=False)

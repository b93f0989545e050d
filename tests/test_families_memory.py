"""Memory of families that only Transformers computes: what is planned for a device, and what its process then holds."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from moeplan import Plan, Workload  # noqa: E402
from moeplan.benchmarks.loop import configuration  # noqa: E402
from moeplan.benchmarks.synthetic_clusters import synthetic_cluster  # noqa: E402
from moeplan.planner.search import solve  # noqa: E402
from moeplan.profiler.families import read_family  # noqa: E402
from moeplan.runtime.coherent import executor_of  # noqa: E402
from moeplan.runtime.families.net import build, located  # noqa: E402
from moeplan.runtime.families.package import without_experts  # noqa: E402
from moeplan.runtime.families.peak import peaks  # noqa: E402
from moeplan.runtime.launch import LocalLauncher, Rank  # noqa: E402
from moeplan.runtime.memory import PeakMemory, return_freed_memory  # noqa: E402
from moeplan.runtime.worker import step_inputs, weight_source  # noqa: E402
from moeplan.tests.small_families import small_config  # noqa: E402

CPU = torch.device("cpu")
# Delta rule, attention with its own scores, latent attention.
MEASURED = {"qwen3_next": "prefill:4096@512", "gpt_oss": "prefill:2048@512", "deepseek_v3": "decode:64@512"}
FEWER = {"num_hidden_layers": 4, "hidden_size": 512, "vocab_size": 4096, "max_position_embeddings": 1024}
BESIDES = 24 * 2**20  # bytes: allocator, connections, code that is loaded when it is first called
MOST_OVER = 1.6


def on_rank(rank: Rank, job: dict[str, str]) -> dict[str, int]:
    """Bytes that this process held at most in a step of each plan."""
    found = {}
    return_freed_memory()
    torch.set_num_threads(1)
    for family, text in job.items():
        plan = Plan.parse(text, family)
        build(plan.model, torch.float32)  # Transformers' code
        memory = PeakMemory(CPU)
        executor = executor_of(plan, rank.rank, weight_source(plan, plan.model, None, CPU), device=CPU, capacity=0)
        executor.cache.fill(plan.workload.context, plan.seed)
        own = step_inputs(plan)[executor.layout.own]
        for _ in range(2):
            executor.step(own, executor.layout, plan.workload.context)
        found[family] = memory.bytes()
        del executor
        rank.emit({"what": family})
    return found


def planned(family: str, workload: str) -> Plan:
    model = read_family(configuration(family) | FEWER, family, family, "")
    return solve(model, synthetic_cluster(model, 1, 2), Workload.from_text(workload), strategy="ep", dtype="f32")


@pytest.mark.timeout(600)
def test_processes_hold_what_is_planned() -> None:
    plans = {family: planned(family, workload) for family, workload in MEASURED.items()}
    job = {family: plan.to_json() for family, plan in plans.items()}
    for rank, found in enumerate(LocalLauncher(2).run("moeplan.tests.test_families_memory:on_rank", job, timeout=300)):
        for family, held in found.items():
            total = plans[family].predicted.memory[rank].total
            assert held - BESIDES <= total <= MOST_OVER * held, (family, held / 2**20, total / 2**20)


def real_peak(family: str, length: int, context: int) -> int:
    """Bytes that torch allocated at most in the layers and the model around them, as its own profiler counts."""
    net = located(transformers.AutoModelForCausalLM.from_config(small_config(family, use_cache=True)).eval())
    without_experts(net.config)
    cache = transformers.DynamicCache(config=net.config)
    with torch.no_grad():
        if context:
            net.base(input_ids=torch.zeros((1, context), dtype=torch.long), past_key_values=cache)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            net.base(input_ids=torch.zeros((1, length), dtype=torch.long), past_key_values=cache, use_cache=True)
    now = most = 0
    for event in sorted(seen.events(), key=lambda event: event.time_range.start):
        if event.name == "[memory]":
            now += event.cpu_memory_usage
            most = max(most, now)
    return most


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe", "lfm2_moe", "deepseek_v3"])
@pytest.mark.parametrize(("length", "context"), [(120, 0), (1, 100)])
def test_peaks_are_those_of_torchs_own_account(family: str, length: int, context: int) -> None:
    """Counted without memory, beside allocations of the same model with it; that has the layers' caches besides."""
    with torch.device("meta"):
        net = located(transformers.AutoModelForCausalLM.from_config(small_config(family)).eval())
    without_experts(net.config)
    counted = max(peak.values(length, context) for peak in peaks(net)) * net.model.dtype.itemsize
    layers = len(net.layers)
    assert real_peak(family, length, context) <= 1.1 * counted + layers * 4 * 64 * 2 * (length + context)
    assert counted <= 1.5 * real_peak(family, length, context)

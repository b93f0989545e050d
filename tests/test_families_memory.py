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
from moeplan.runtime.launch import LocalLauncher, Rank  # noqa: E402
from moeplan.runtime.memory import PeakMemory, return_freed_memory  # noqa: E402
from moeplan.runtime.worker import step_inputs, weight_source  # noqa: E402

CPU = torch.device("cpu")
# Delta rule, attention with its own scores, latent attention.
MEASURED = {"qwen3_next": "prefill:4096@512", "gpt_oss": "prefill:2048@512", "deepseek_v3": "decode:64@512"}
FEWER = {"num_hidden_layers": 4, "hidden_size": 512, "vocab_size": 4096, "max_position_embeddings": 1024}
TINY = FEWER | {"hidden_size": 128, "vocab_size": 256}
BESIDES = 24 * 2**20  # bytes: the allocator's own
LEAST, MOST_OVER = 0.95, 1.6


def on_rank(rank: Rank, job: dict[str, str]) -> int:
    """Bytes that this process held at most in a step of a plan, after one of a small plan, which loads all code."""
    return_freed_memory()
    torch.set_num_threads(1)
    for text in (job["small"], job["plan"]):
        plan, memory = Plan.parse(text, "plan"), PeakMemory(CPU)
        executor = executor_of(plan, rank.rank, weight_source(plan, plan.model, None, CPU), device=CPU, capacity=0)
        executor.cache.fill(plan.workload.context, plan.seed)
        own = step_inputs(plan)[executor.layout.own]
        for _ in range(2):
            executor.step(own, executor.layout, plan.workload.context)
        held = memory.bytes()
        rank.emit({"what": "a step"})
    return held


def planned(family: str, workload: str, sizes: dict[str, int]) -> Plan:
    model = read_family(configuration(family) | sizes, family, family, "")
    return solve(model, synthetic_cluster(model, 1, 2), Workload.from_text(workload), strategy="ep", dtype="f32")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", MEASURED)
def test_processes_hold_what_is_planned(family: str) -> None:
    plan, small = planned(family, MEASURED[family], FEWER), planned(family, "prefill:64@32", TINY)
    job = {"plan": plan.to_json(), "small": small.to_json()}
    held = LocalLauncher(2).run("moeplan.tests.test_families_memory:on_rank", job, timeout=300)
    bounds = [(LEAST * (at_most - BESIDES), MOST_OVER * at_most) for at_most in held]
    planned_bytes = [memory.total for memory in plan.predicted.memory]
    assert all(low <= total <= high for (low, high), total in zip(bounds, planned_bytes, strict=True)), (
        held,
        plan.predicted.memory,
    )

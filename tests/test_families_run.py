"""Models of families that only Transformers computes: profiled, solved for and run, beside Transformers' own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moeplan import Cluster, Plan, Report  # noqa: E402
from moeplan.profiler.families import read_family  # noqa: E402
from moeplan.runtime.check import planned_output, reference_output, relative_error  # noqa: E402
from moeplan.runtime.coherent import executor_of  # noqa: E402
from moeplan.runtime.families.package import own_fields  # noqa: E402
from moeplan.runtime.launch import LocalLauncher, Rank  # noqa: E402
from moeplan.runtime.worker import step_inputs, weight_source  # noqa: E402
from moeplan.service import cli  # noqa: E402
from moeplan.spec import Model  # noqa: E402
from moeplan.spec.catalogue.executed import load_executed  # noqa: E402
from moeplan.spec.executed import not_executed  # noqa: E402
from moeplan.spec.plan import LayerPlan  # noqa: E402
from moeplan.spec.routing import draw_routing  # noqa: E402
from moeplan.tests.plans import hand_made_plan  # noqa: E402
from moeplan.tests.small_families import build, small_config  # noqa: E402

CPU = torch.device("cpu")
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_next": WIDE | {
        "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "intermediate_size": 64,
    },
    "deepseek_v3": WIDE | {
        "num_hidden_layers": 3, "num_key_value_heads": 4, "head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32, "intermediate_size": 64,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": WIDE | {
        "num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32,
        "sliding_window": 16,
    },
}  # fmt: skip
STEPS = {
    "qwen3_next": ("prefill:96@32", "ep"),
    "deepseek_v3": ("decode:6@40", "sharded"),
    "gpt_oss": ("decode:5@30", "gathered"),
}
MIXERS = {"qwen3_next": {"linear_attention", "full_attention"}, "gpt_oss": {"sliding_attention", "full_attention"}}
# Their layers hand each other more than hidden states.
HANDED = ("glm_moe_dsa", "hy_v4", "zaya")
# Of every kind: latent attention, state spaces, convolutions, delta rules, windows, an index, biases, tuples, no gates.
COMPARED = (
    *("axk2", "bailing_hybrid", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoehybrid", "jamba", "kimi_linear"),
    *("lfm2_moe", "llama4_text", "minimax_m2", "nemotron_h", "qwen3_next", *HANDED),
)
TOLERANCE = 1e-4


def moeplan(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moeplan", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after the profile, and for each family solve and run."""
    here = tmp_path_factory.mktemp("families")
    for family, fields in CONFIGS.items():
        (here / family).mkdir()
        body = {"model_type": family, "torch_dtype": "float32"} | fields
        (here / family / "config.json").write_text(json.dumps(body))
    models = [argument for family in CONFIGS for argument in ("--model", f"./{family}")]
    commands = [["profile", *models, "--ranks", "2", "--budget", "15", "--accept-noise"]]
    for family, (step, strategy) in STEPS.items():
        plan = f"{family}.plan.json"
        solved = ["solve", "--model", f"./{family}", "--workload", step, "--strategy", strategy, "-o", plan]
        ran = ["run", plan, "--tolerance", "100", "--repetitions", "3", "-o", f"{family}.report.json"]
        commands += [[*solved, "--time-limit", "20"], ran]
    for command in commands:
        done = moeplan(here, *command)
        assert done.returncode == 0, done.stderr
    return here


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", CONFIGS)
def test_profile_solve_run(loop: Path, family: str) -> None:
    """The output is that of the unmodified model, every part is predicted and measured, and a plan needs no file."""
    plan, report = Plan.read(loop / f"{family}.plan.json"), Report.read(loop / f"{family}.report.json")
    assert report.check is not None
    assert report.check.passed
    assert (report.check.layers, report.check.tolerance) == (len(plan.model.layers), TOLERANCE)
    assert {layer.strategy for layer in plan.layers} == {STEPS[family][1]}
    parts = {(row.layer, row.part): row for row in report.parts}
    for i in range(len(plan.model.layers)):
        assert parts[i, "mixer"].predicted > 0
        assert parts[i, "mixer"].measured > 0
    first = plan.model.moe_layers[0]
    assert parts[first, "expert"].predicted > 0
    assert parts[first, "expert"].measured > 0
    assert parts[-1, "embed"].predicted > 0
    assert parts[-1, "head"].measured > 0
    assert not {"route", "attention", "shared"} & {row.part for row in report.parts}
    assert plan.model.family_config is not None
    assert plan.model.family_config.body["model_type"] == family
    assert any("Transformers' own modules" in note for note in plan.notes)


def test_one_curve_for_every_kind_of_layer(loop: Path) -> None:
    curves = Cluster.read(loop / "cluster.json").kinds[0].operators
    for family, kinds in MIXERS.items():
        model = load_executed(str(loop / family))
        signatures = {b.counted.signature for b in model.layers if b.counted}
        for operator in ("mixer_prefill", "mixer_decode"):
            found = [c.shape for c in curves if c.operator == operator and c.shape["signature"] in signatures]
            assert {shape["kind"] for shape in found} == kinds
            assert len(found) == len(signatures) == 2


def test_what_a_plan_cannot_ask_for(loop: Path) -> None:
    said = {
        ("solve", "--model", "./gpt_oss", "--strategy", "coherent", "--workload", "decode:4@8"): "own, whose experts",
        ("run", "gpt_oss.plan.json", "--weights", "."): "holds neither",
        ("run", "gpt_oss.plan.json", "--select", "lynx:2", "--quality-budget", "1"): "Transformers' own routers",
    }
    for command, text in said.items():
        done = moeplan(loop, *command)
        assert done.returncode == 2, done.stderr
        *progress, last = done.stderr.strip().splitlines()
        assert last.startswith("error: ")
        assert text in last
        assert all("error" not in line and "Traceback" not in line for line in progress)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"family_config": None}, "of which it knows the size only"),
        ({"transformers": "5.20.0"}, "builds other modules than version 5.20.0: read its config.json again"),
        ({"config": json.dumps({"model_type": "no_such"})}, "does not know model_type"),
    ],
)
def test_a_document_that_is_not_what_transformers_builds(fields: dict, said: str, tmp_path, monkeypatch, capfd) -> None:
    body = json.loads(small("gpt_oss").to_json())
    if fields.get("family_config", "") is None:
        body["family_config"] = None
    else:
        body["family_config"] |= fields
        body["blocks"][0]["counted"]["signature"] = "0" * 16
    (tmp_path / "model.json").write_text(json.dumps(body))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moeplan", "profile", "--model", "model.json", "--budget", "5"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    err = capfd.readouterr().err
    assert ended.value.code == 2
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("config", ["[]", "{", '{"model_type": 3}', '{"model_type": "x", "y": "' + "y" * 2**20 + '"}'])
def test_a_configuration_that_is_none(config: str, tmp_path: Path, monkeypatch, capfd) -> None:
    body = json.loads(small("gpt_oss").to_json())
    body["family_config"]["config"] = config
    (tmp_path / "model.json").write_text(json.dumps(body))
    monkeypatch.setattr(sys, "argv", ["moeplan", "models", str(tmp_path / "model.json")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    err = capfd.readouterr().err
    assert ended.value.code == 2
    assert "family_config.config" in err


def test_a_configuration_names_no_code() -> None:
    """Transformers would fetch an attention of this name."""
    body = {"model_type": "gpt_oss", "_attn_implementation": "some/kernels", "text_config": {"auto_map": {"A": "b"}}}
    assert own_fields(body | {"use_kernels": True}) == {"text_config": {}}
    fields = json.loads(json.dumps(small_config("gpt_oss").to_dict())) | {"_attn_implementation": "some/kernels"}
    model = read_family(fields, "gpt_oss", "gpt_oss", "")
    assert not_executed(model) == ""
    assert model.family_config is not None
    assert "some/kernels" not in model.family_config.config


def test_families_that_cannot_say_why() -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_local_experts": 4, "intermediate_size_mlp": 64}
    text["num_experts_per_tok"] = 2
    llama = read_family({"model_type": "llama4", "text_config": text}, "llama4", "llama4", "")
    assert "only one expert per token can be carried" in not_executed(llama)
    assert "DeepseekV4" in not_executed(small("deepseek_v4"))
    assert "cache of its own" in not_executed(small("minimax"))


@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v3", "deepseek_v32", "gpt_oss", "lfm2_moe", "nemotron_h"])
def test_what_transformers_caches_is_counted(family: str) -> None:
    """Five tokens of two sequences: the values of all tensors in the cache of a model as Transformers builds it."""
    net = build(family)
    with torch.no_grad():
        past = net(torch.full((2, 5), 3), use_cache=True).past_key_values
    held = 0
    for layer in past.layers:
        for value in vars(layer).values():
            for part in value.values() if isinstance(value, dict) else [value]:
                held += part.numel() if isinstance(part, torch.Tensor) and part.dim() > 1 else 0
    counted = [block.counted for block in small(family).layers if block.counted]
    assert held == 2 * sum(5 * c.held_values + c.state_values for c in counted)
    assert held > 0


def small(family: str) -> Model:
    """A family at a size for tests, in f32."""
    body = json.loads(json.dumps(small_config(family).to_dict())) | {"torch_dtype": "float32"}
    body.pop("dtype", None)
    return read_family(body, family, family, "")


def plan_of(
    model: Model,
    workload: str,
    tokens: tuple[int, int],
    kind: int,
    stored: int | None = None,
    dtype: str = "f32",
    **devices: Any,
) -> Plan:
    """For two ranks; kind: copies of experts, uneven columns, or gathered."""
    moe = model.moe_block().moe
    assert moe is not None
    n, columns = moe.num_experts, moe.ffn_size // 4
    kinds = (
        LayerPlan(strategy="ep", slots=(tuple(range(n // 2 + 1)), tuple(range(n // 2 - 1, n)))),
        LayerPlan(strategy="sharded", slots=((), ()), split=(columns, moe.ffn_size - columns)),
        LayerPlan(strategy="gathered", slots=(tuple(range(2)), tuple(range(2, n)))),
    )
    return hand_made_plan(
        model, workload, [kinds[kind % 3]], tokens=tokens, stored_layers=stored, dtype=dtype, **devices
    )


def error_of(plan: Plan, rank: Rank, spoil: bool = False) -> float:
    """Of the plan's output on rank 0, beside the unmodified model's; spoil: with an expert's weights doubled."""
    executor = executor_of(plan, rank.rank, weight_source(plan, plan.model, None, CPU), device=CPU, capacity=0)
    executor.cache.fill(plan.workload.context, plan.seed)
    inputs, layers = step_inputs(plan), len(plan.model.layers)
    routing = draw_routing(None, plan.model, plan.workload, plan.routing.seed)
    if spoil and rank.rank == 1:
        experts = executor.net.experts[plan.model.moe_layers[0]]
        experts.down_proj[-1] *= 2
    got = planned_output(executor, inputs, routing, plan.workload.context, layers)
    if rank.rank:
        return 0.0
    return relative_error(got, reference_output(plan, weight_source(plan, plan.model, None, CPU), inputs, routing))


def on_rank(rank: Rank, job: dict[str, Any]) -> dict[str, float]:
    """Errors of every family: a prompt divided unevenly, and a step of which one rank has nothing; then of a plan whose
    layers share storage, of one in bf16, and of a spoilt one."""
    found = {}
    for number, family in enumerate(job["families"]):
        model = small(family)
        for i, (step, tokens) in enumerate((("prefill:24@8", (16, 8)), ("decode:5@21", (5, 0)))):
            found[f"{family} {step}"] = error_of(plan_of(model, step, tokens, number + i), rank)
            rank.emit({"what": family})
    alike = Model.model_validate(job["alike"])
    for i, stored in enumerate((1, 2)):
        found[f"shared {stored}"] = error_of(plan_of(alike, "decode:4@9", (3, 1), i, stored), rank)
    found["bf16"] = error_of(plan_of(alike, "prefill:16@8", (8, 8), 0, dtype="bf16"), rank)
    found["spoilt"] = error_of(plan_of(alike, "prefill:16@8", (8, 8), 0), rank, spoil=True)
    return found


@pytest.mark.timeout(900)
def test_outputs_are_those_of_the_unmodified_model() -> None:
    minimax = small("minimax_m2").model_dump(mode="json")
    job = {"families": COMPARED, "alike": minimax}
    found = LocalLauncher(2).run("moeplan.tests.test_families_run:on_rank", job, timeout=300)[0]
    assert found.pop("spoilt") > 100 * TOLERANCE
    assert 0 < found.pop("bf16") < 5e-2
    assert len(found) == 2 * len(COMPARED) + 2
    assert {case: error for case, error in found.items() if not error <= TOLERANCE} == {}

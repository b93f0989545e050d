"""Commands that engines start with: degrees that divide the model, hosts, copies, names of engines."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.export import engine_named, export, read_back, validate
from moeplan.planner.export.vllm_ascend import own_copies
from moeplan.profiler.traces.importers import import_trace
from moeplan.service.commands import export as command
from moeplan.spec.catalogue import load_model
from moeplan.spec.errors import DocumentError, MoeplanError
from moeplan.spec.model import Attention, Block, Model, Moe
from moeplan.spec.placement import Placement, PlacementDevice
from moeplan.tests.exports import linear_placement, placement_of, random_placement, small_model

app = typer.Typer()
app.command(name="export")(command.export)
app.callback()(lambda: None)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def moeplan(*args: object) -> None:
    app(["export", *map(str, args)], standalone_mode=False)


def flags_of(command: list[str]) -> dict[str, str]:
    return {flag: value for flag, value in zip(command, [*command[1:], ""], strict=True) if flag.startswith("--")}


def attention_model(heads: int, kv_heads: int, experts: int = 24, vocab: int = 192, family: str = "qwen3_moe") -> Model:
    attention = Attention(heads=heads, kv_heads=kv_heads, head_dim=4)
    block = Block(count=1, hidden_size=4, attention=attention, moe=Moe(num_experts=experts, top_k=1, ffn_size=4))
    return Model(name="small", family=family, vocab_size=vocab, blocks=(block,))


def test_olmoe_on_3_ranks_does_not_split_16_heads_in_3(here: Path, capfd: pytest.CaptureFixture) -> None:
    model = load_model("olmoe")
    random_placement(0, 64, 3, 22, layers=16).write("place.json")
    for engine in ("vllm", "vllm-ascend"):
        moeplan("place.json", "--to", engine, "-m", "olmoe", "-o", engine)
        out, err = capfd.readouterr()
        flags = flags_of(shlex.split(out.splitlines()[-1]))
        assert flags["--tensor-parallel-size"] == "1"
        assert flags["--data-parallel-size"] == "3"
        assert "16 attention heads do not divide between 3 ranks" in err
    assert validate("vllm", Path("vllm/vllm-flags.txt"), model, 3) == (EXPERTS_OF_3_RANKS,) * 16
    wrong = "--enable-expert-parallel\n--tensor-parallel-size\n3\n--expert-placement-strategy\nlinear"
    with pytest.raises(DocumentError, match="--tensor-parallel-size: 3 does not divide 16 attention heads of 'olmoe'"):
        validate("vllm", wrong, model, 3)


EXPERTS_OF_3_RANKS = (tuple(range(22)), tuple(range(22, 43)), tuple(range(43, 64)))  # as vLLM splits 64 experts


@given(
    heads=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]),
    group=st.sampled_from([1, 2, 4]),
    ranks=st.sampled_from([2, 3, 4, 6, 8, 12]),
    vocab=st.sampled_from([64, 100, 192]),
)
@settings(max_examples=80)
def test_degrees_are_those_that_the_engines_assertions_let_pass(heads: int, group: int, ranks: int, vocab: int) -> None:
    """The assertions as the engines write them (qwen2_moe.py of SGLang and vLLM), on the flags that are printed."""
    kv_heads = heads // group if heads % group == 0 else heads
    model = attention_model(heads, kv_heads, vocab=vocab)
    placement = linear_placement(model, ranks)

    def passes(degree: int) -> bool:
        kv = kv_heads % degree == 0 if kv_heads >= degree else degree % kv_heads == 0
        return heads % degree == 0 and kv

    flags = flags_of(export(placement, "sglang", model).command)
    groups = int(flags.get("--attn-dp-size", "1"))
    assert flags["--tp-size"] == flags["--ep-size"] == str(ranks)
    assert ranks % groups == 0
    assert passes(ranks // groups)
    assert not any(passes(d) for d in range(ranks // groups + 1, ranks + 1) if ranks % d == 0)
    padded = -(-vocab // 64) * 64
    for engine in ("vllm", "vllm-ascend"):
        flags = flags_of(export(placement, engine, model).command)
        degree, data = int(flags["--tensor-parallel-size"]), int(flags.get("--data-parallel-size", "1"))
        assert degree * data == ranks
        assert passes(degree)
        assert padded % degree == 0


def test_more_ranks_than_experts_and_undivided_ffns_are_refused_where_the_engine_does() -> None:
    wide = placement_of([[[0], [1], [0], [1]]], 2)
    with pytest.raises(MoeplanError, match="4 ranks for 2 experts"):
        export(wide, "sglang", attention_model(4, 4, experts=2))
    uneven = small_model(10, 1)  # 12 % 5
    with pytest.raises(MoeplanError, match="a dense FFN of 12 between the ranks, 5 do not"):
        export(linear_placement(uneven, 5), "sglang", uneven)
    latent = small_model(10, 1, family="deepseek_v3")
    assert "--moe-dense-tp-size" in export(linear_placement(latent, 5), "sglang", latent).command


def hosts(names: str, **fields: object) -> Placement:
    devices = tuple(PlacementDevice(host=name, capacity=1) for name in names)
    return placement_of([[[e] for e in range(len(names))]] * 2, len(names), devices=devices, **fields)


def test_sglang_is_told_the_hosts(here: Path, capfd: pytest.CaptureFixture) -> None:
    small_model(4, 2).write("model.json")
    hosts("aabb").write("place.json")
    moeplan("place.json", "--to", "sglang", "-m", "model.json", "-o", "location.json")
    out, err = capfd.readouterr()
    flags = flags_of(shlex.split(out.splitlines()[-1]))
    assert (flags["--nnodes"], flags["--node-rank"]) == ("2", "0")
    assert "--dist-init-addr" in flags
    assert "--node-rank 0 to 1" in err.replace("\n", " ")
    one = export(hosts("aaaa"), "sglang", small_model(4, 2)).command
    assert "--nnodes" not in one
    with pytest.raises(MoeplanError, match=r"unequally many devices \(a: 3, b: 1\)"):
        export(hosts("aaab"), "sglang", small_model(4, 2))


def test_tensorrt_llm_takes_the_key_of_the_prediction_layer(here: Path, capfd: pytest.CaptureFixture) -> None:
    model = small_model(4, 2, dense=1, family="deepseek_v3")
    model.write("model.json")
    linear_placement(model, 2).write("place.json")
    moeplan("place.json", "--to", "trtllm", "-m", "model.json", "-o", "out")
    written = Path("out/moe_load_balancer.yaml").read_text()
    assert "  3: [0, 1, 2, 3]\n" in written  # layers 1 and 2 have experts, 3 predicts
    for text in (written, written.replace("  3: [0, 1, 2, 3]\n", "")):
        Path("file.yaml").write_text(text)
        moeplan("place.json", "--check", "file.yaml", "--to", "trt-llm", "-m", "model.json")
        assert len(read_back("tensorrt-llm", text, 2, model)) == 2
    for bad, why in (("3: [0, 1, 2, 2]", "every expert"), ("3: [0, 1]", "2 slots"), ("4: [0, 1, 2, 3]", "layer 4")):
        with pytest.raises(DocumentError, match=why):
            validate("tensorrt-llm", written.replace("3: [0, 1, 2, 3]", bad), model, 2)
    with pytest.raises(DocumentError, match="layer 3: no layer"):
        validate("tensorrt-llm", written, small_model(4, 2, dense=1), 2)


def test_vllm_ascend_says_how_often_a_rank_uses_its_own_copy() -> None:
    """By hand, tensor parallel over 2: the copy is (rank + expert) % 2, so expert 0 is its own, expert 1 never."""
    slots = (((0, 1, 2), (0, 1, 3)),)
    assert own_copies(slots, 2) == (2, 4)
    assert own_copies(slots, 1) == (4, 4)
    notes = "\n".join(export(placement_of(slots, 4), "vllm-ascend", small_model(4, 1)).notes)
    assert "its own in 2 of 4 cases" in notes
    assert "model runner V1 only" in notes


def test_deepspeed_patterns_and_zero_3() -> None:
    model = load_model("olmoe")
    exported = export(linear_placement(model, 8), "deepspeed", model)
    (text,) = exported.files.values()
    section = json.loads(text)["expert_parallel"]
    assert section["moe_layer_pattern"] == r"model\.layers\.\d+\.mlp"
    assert "preset_model" not in section
    assert np.array(read_back("deepspeed", text, 8, model)).shape == (16, 8, 8)
    assert any("ZeRO stages 0 to 3" in note for note in exported.notes)
    broken = text.replace(json.dumps(section["moe_layer_pattern"]), '"("')
    with pytest.raises(DocumentError, match="not a regular expression"):
        validate("deepspeed", broken, model, 8)
    with pytest.raises(DocumentError, match="moe_layer_pattern: missing"):
        validate("deepspeed", '{"expert_parallel": {"enabled": true, "autoep_size": 8}}', model, 8)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("trtllm", "tensorrt-llm"),
        ("trt-llm", "tensorrt-llm"),
        ("TensorRT_LLM", "tensorrt-llm"),
        ("tensorrt_llm", "tensorrt-llm"),
        ("vllm_ascend", "vllm-ascend"),
        ("vLLM", "vllm"),
        ("SGLang", "sglang"),
        ("megatron-core", "megatron"),
        ("Megatron-LM", "megatron"),
        ("deep-speed", "deepspeed"),
    ],
)
def test_engines_by_the_names_that_people_type(typed: str, name: str) -> None:
    assert engine_named(typed).name == name


def test_recordings_are_named_by_the_same_spellings(here: Path) -> None:
    Path("empty").mkdir()
    for typed in ("trtllm", "TRT-LLM", "SGLang"):
        with pytest.raises(DocumentError) as refused:
            import_trace("empty", typed)
        assert "no importer" not in str(refused.value)
    with pytest.raises(DocumentError, match="no importer 'trtlm'"):
        import_trace("empty", "trtlm")


def test_transformers_is_no_engine_to_export_to() -> None:
    with pytest.raises(MoeplanError, match="engine 'hf': unknown"):
        engine_named("hf")


def test_one_file_where_one_is_asked_for(here: Path, capfd: pytest.CaptureFixture) -> None:
    """Every engine: exactly that file, which passes the engine's rules; what must stand beside it is printed."""
    small_model(8, 2).write("model.json")
    linear_placement(load_model("model.json"), 4).write("place.json")
    for engine, name in (
        ("sglang", "location.json"),
        ("trtllm", "balancer.yaml"),
        ("trtllm", "balancer.yml"),
        ("vllm", "flags.txt"),
        ("vllm", "map.json"),
        ("vllm", "map.jsonl"),
        ("vllm-ascend", "map.json"),
        ("megatron", "permutation.json"),
        ("megatron", "flags.txt"),
        ("deepspeed", "config.json"),
    ):
        folder = Path(f"{engine}-{name}")
        moeplan("place.json", "--to", engine, "-m", "model.json", "-o", folder / name)
        out = capfd.readouterr().out
        assert [path.name for path in folder.iterdir()] == [name]
        moeplan("--check", folder / name, "--to", engine, "-m", "model.json", "--devices", 4)
        if engine == "trtllm":
            assert "enable_attention_dp: true" in out
            assert f'load_balancer: "{folder / name}"' in out
    assert sorted(path.name for path in Path().iterdir() if path.is_file()) == ["model.json", "place.json"]

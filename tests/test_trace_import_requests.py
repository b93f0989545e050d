"""Routed experts of requests: shapes that are told or refused, prompts of several choices, what other JSON is told."""

import base64
import io
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeplan.profiler.traces import import_trace
from moeplan.service import cli
from moeplan.spec import Trace
from moeplan.spec.errors import MoeplanError


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """Runs `moeplan trace import FILE ... -o trace.npz`: exit status, output and error, each in one line."""

    def call(file: Path, *args: object) -> tuple[object, str]:
        command = ["moeplan", "trace", "import", str(file), "-o", str(tmp_path / "trace.npz"), *map(str, args)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return stopped.value.code, " ".join((captured.out + captured.err).split())

    return call


def routing(rng: np.random.Generator, tokens: int, layers: int, top_k: int, experts: int) -> np.ndarray:
    return rng.random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k]


def sglang_answer(ids: np.ndarray, prompt: int, completion: int, **meta: object) -> dict[str, Any]:
    routed = base64.b64encode(ids.astype("<i4").tobytes()).decode()
    return {"meta_info": {"prompt_tokens": prompt, "completion_tokens": completion, "routed_experts": routed, **meta}}


def npy(ids: np.ndarray, dtype: type) -> str:
    np.save(buffer := io.BytesIO(), ids.astype(dtype))
    return base64.b64encode(buffer.getvalue()).decode()


def refused(pattern: str, path: Path, kind: str | None = None, **options: Any) -> None:
    with pytest.raises(MoeplanError, match=pattern):
        import_trace(path, kind, **options)


# --- SGLang: flat answers that begin inside the prompt ---


def test_answers_from_a_start_inside_the_prompt(tmp_path: Path, run: Any) -> None:
    """Prompt 64, completion 65, routed_experts_start_len 64: rows 64..127 of 48 layers, top-8 of 128."""
    ids = routing(np.random.default_rng(0), 64, 48, 8, 128)
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(sglang_answer(ids, 64, 65)))
    code, said = run(path, "--from", "sglang", "--top-k", 8)
    assert code == 2
    assert "24, 32, 48" in said
    assert "--layers or --model" in said
    assert not (tmp_path / "trace.npz").exists()
    for told in (["--layers", 48, "--top-k", 8, "--num-experts", 128], ["--model", "qwen3-30b-a3b"]):
        code, said = run(path, *told)
        assert code == 0, said
        assert "64 tokens x 48 layers, top-8 of 128" in said
        assert "48 layers x top-8 checked against the tokens of 1 of 1 answers" in said
        assert "1 answers lack rows of their first tokens (routed_experts_start_len)" in said
        assert Trace.read(tmp_path / "trace.npz").expert_ids.tolist() == ids.tolist()
    path.write_text(json.dumps(sglang_answer(ids, 64, 65, routed_experts_start_len=64)))
    code, said = run(path, "--top-k", 8)  # with the start told, only 48 layers give 64 rows
    assert code == 0, said
    assert "64 tokens x 48 layers" in said
    assert "48 is the only number" in said


def test_wrong_layers_or_top_k_are_noticed_by_the_tokens(tmp_path: Path, run: Any) -> None:
    ids = routing(np.random.default_rng(1), 64, 48, 8, 128)
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(sglang_answer(ids, 32, 33)))
    code, said = run(path, "--layers", 24, "--top-k", 8)
    assert code == 2
    assert "24 layers of top-8 give 128 rows, the answer has at most 65 tokens" in said
    code, said = run(path, "--layers", 48, "--top-k", 4)
    assert code == 2
    assert "at most 65 tokens" in said
    assert run(path, "--model", "mixtral")[0] == 2  # 32 layers of top-2
    assert run(path, "--model", "qwen3-30b-a3b", "--top-k", 4)[0] == 2  # the model says 8


@settings(max_examples=40)
@given(st.data())
def test_layers_are_right_or_asked_for(data: st.DataObject) -> None:
    """Whatever the starts, an import without --layers is the true routing or a refusal."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    layers, top_k = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 4))
    answers, arrays = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        prompt, completion = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
        start = data.draw(st.integers(0, prompt - 1)) if data.draw(st.booleans()) else 0
        arrays.append(routing(rng, max(prompt + completion - 1 - start, 1), layers, top_k, 8))
        answers.append(sglang_answer(arrays[-1], prompt, completion))
    assume(top_k > 1 or np.concatenate(arrays).any())  # with top-1 nothing but expert 0 is taken for nothing recorded
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.jsonl"
        path.write_text("\n".join(map(json.dumps, answers)))
        told = import_trace(path, "sglang", top_k=top_k, num_experts=8, layers=layers)[0]
        try:
            message, found = "", import_trace(path, "sglang", top_k=top_k, num_experts=8)[0]
        except MoeplanError as error:
            message, found = str(error), told
    assert not message or "give --layers or --model" in message
    assert found.digest() == told.digest()
    if top_k > 1:  # with top-1 a layer of zeros is taken for a dense one
        assert told.expert_ids.tolist() == np.concatenate(arrays).tolist()


def test_sglang_in_openai_format(tmp_path: Path) -> None:
    ids = routing(np.random.default_rng(2), 9, 3, 2, 8)
    routed = sglang_answer(ids, 0, 0)["meta_info"]["routed_experts"]
    usage = {"prompt_tokens": 5, "completion_tokens": 5}
    body = {"choices": [{"text": "x"}], "usage": usage, "sglext": {"routed_experts": routed}}
    (tmp_path / "a.json").write_text(json.dumps(body))
    trace, _ = import_trace(tmp_path / "a.json", layers=3, top_k=2, num_experts=8)
    assert trace.expert_ids.tolist() == ids.tolist()
    refused("at most 10 tokens", tmp_path / "a.json", layers=1, top_k=2)


# --- vLLM: several choices of a request ---


def request(form: str, prompt: np.ndarray, choices: list[np.ndarray]) -> dict[str, Any]:
    """A request whose choices each hold the prompt's rows and their own, the last token never routed."""
    whole = [np.concatenate([prompt, own]) for own in choices]
    tokens = [len(own) + 1 for own in choices]
    if form == "outputs":
        items = [{"token_ids": [7] * n, "routed_experts": w.tolist()} for n, w in zip(tokens, whole, strict=True)]
        return {"prompt_token_ids": [1] * len(prompt), "outputs": items}
    body: dict[str, Any] = {"choices": [{"routed_experts": npy(w, np.uint8)} for w in whole]}
    if form == "usage":
        body["usage"] = {"prompt_tokens": len(prompt), "completion_tokens": sum(tokens)}
    if form == "prompt":
        body["usage"] = {"prompt_tokens": len(prompt)}
    return body


@pytest.mark.parametrize("form", ["outputs", "usage", "prompt", "untold"])
def test_the_prompt_of_two_choices_counts_once(form: str, tmp_path: Path, run: Any) -> None:
    """30 prompt tokens and two choices of 10 routed ones are 50 tokens, not 80."""
    rng = np.random.default_rng(3)
    prompt, first, second = (routing(rng, n, 4, 2, 16) for n in (30, 10, 10))
    (tmp_path / "answer.json").write_text(json.dumps(request(form, prompt, [first, second])))
    code, said = run(tmp_path / "answer.json", "--from", "vllm", "--num-experts", 16)
    assert code == 0, said
    assert "50 tokens x 4 layers, top-2 of 16" in said
    assert "each prompt is counted once" in said
    assert ("does not tell its prompt_tokens: 30 rows" in said) == (form == "untold")
    trace = Trace.read(tmp_path / "trace.npz")
    assert trace.expert_ids.tolist() == np.concatenate([prompt, first, second]).tolist()
    assert trace.seq_len.tolist() == [40, 10]


def test_choices_that_agree_beyond_the_prompt_keep_their_own_tokens(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    prompt, own = routing(rng, 6, 3, 2, 8), routing(rng, 5, 3, 2, 8)
    for form, tokens in (("outputs", 16), ("usage", 16), ("prompt", 16), ("untold", 11)):
        (tmp_path / "a.json").write_text(json.dumps(request(form, prompt, [own, own])))
        trace, notes = import_trace(tmp_path / "a.json")
        assert trace.tokens == tokens, form
    assert any("11 rows that its 2 choices share" in note for note in notes)
    # routed_experts_prompt_start: two prompt rows left out
    body = request("outputs", prompt[2:], [own, own])
    body["prompt_token_ids"] = [1] * 6
    (tmp_path / "a.json").write_text(json.dumps(body))
    assert import_trace(tmp_path / "a.json")[0].tokens == 14


def test_choices_without_their_prompt_are_left_whole(tmp_path: Path) -> None:
    """Before vLLM 0.33 the prompt stood apart, and choices held their own rows."""
    rng = np.random.default_rng(5)
    prompt, first, second = (routing(rng, n, 3, 2, 8).tolist() for n in (4, 3, 2))
    body: dict[str, Any] = {"outputs": [{"routed_experts": first}, {"routed_experts": second}]}
    for apart, tokens in ((prompt, 9), (None, 5)):
        (tmp_path / "a.json").write_text(json.dumps({**body, "prompt_routed_experts": apart}))
        assert import_trace(tmp_path / "a.json")[0].tokens == tokens
    told = {"choices": body["outputs"], "usage": {"prompt_tokens": 4, "completion_tokens": 7}}
    (tmp_path / "a.json").write_text(json.dumps(told))
    assert import_trace(tmp_path / "a.json")[0].tokens == 5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32])
def test_every_integer_type_of_vllm(dtype: type, tmp_path: Path) -> None:
    ids = routing(np.random.default_rng(6), 7, 3, 2, 250)
    ids[-1] = 0  # the last token is not routed
    (tmp_path / "a.json").write_text(json.dumps({"choices": [{"routed_experts": npy(ids, dtype)}]}))
    np.savez(tmp_path / "a.npz", r0=ids.astype(dtype))
    for name in ("a.json", "a.npz"):
        trace, _ = import_trace(tmp_path / name)
        assert trace.expert_ids.tolist() == ids[:-1].tolist()
        assert trace.expert_ids.dtype == np.int32


# --- zero experts ---


def test_zero_experts_are_dropped_and_counts_remain(tmp_path: Path, run: Any) -> None:
    """LongCat: 512 experts, and ids 512..767 of identity experts."""
    ids = routing(np.random.default_rng(7), 50, 28, 12, 768)
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"routed_experts": ids.tolist()}))
    code, said = run(path, "--num-experts", 512)
    assert code == 2
    assert f"names expert {ids.max()}, but there are 512" in said
    assert "--zero-experts" in said
    assert run(path, "--zero-experts", 256)[0] == 2
    for told in (["--num-experts", 512, "--zero-experts", 256], ["--model", "longcat-flash"]):
        code, said = run(path, *told)
        assert code == 0, said
        assert "counts of 28 layers x 512 experts" in said
        assert f"{(ids >= 512).mean():.1%} of the choices are zero experts (ids from 512 on)" in said
        trace = Trace.read(tmp_path / "trace.npz")
        assert trace.counts_only
        assert trace.expert_counts.sum() == (ids < 512).sum()
        assert trace.expert_counts[3, 17] == (ids[:, 3] == 17).sum()
    np.savez(tmp_path / "a.npz", expert_ids=ids, seq_len=[0.5])
    assert import_trace(tmp_path / "a.npz", model="longcat-flash")[0].digest() == trace.digest()
    np.savez(tmp_path / "a.npz", expert_ids=ids - 1)
    refused("must not be negative, found -1", tmp_path / "a.npz", model="longcat-flash")


def test_the_model_is_checked_against_the_record(tmp_path: Path) -> None:
    ids = routing(np.random.default_rng(8), 5, 30, 8, 128)
    (tmp_path / "a.json").write_text(json.dumps({"routed_experts": ids.tolist()}))
    refused("30 layers with experts in the record, 48 in qwen3-30b-a3b", tmp_path / "a.json", model="qwen3-30b-a3b")
    refused("model qwen3-30b-a3b: top-k is 8, --top-k says 4", tmp_path / "a.json", model="qwen3-30b-a3b", top_k=4)
    refused("unknown", tmp_path / "a.json", model="nonsense")


# --- other JSON ---


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ('{"a": 1, "b": [2]}', r"holds an object with 'a', 'b': no recording.*routed_experts.*logical_count"),
        ('{"model_type": "mixtral"}', "holds an object with 'model_type': no recording"),
        ('[{"a": 1}]', "holds a list of 1, the first an object with 'a': no recording"),
        ("{}", "holds an empty object: no recording"),
        ('"text"', "expected a request's answer, got 'text'"),
        ("null", "expected a request's answer"),
        ("[1, 2, 3]", "expected integers"),
        ("[[1, 2], [3, 4]]", "a bare table of 2 rows: counts .* with --from sglang, rows of tokens as JSON lines"),
        ('[{"text": "x", "meta_info": {}}]', "no request has routed_experts: start the engine with"),
    ],
)
def test_other_json_is_told_what_it_holds_and_what_is_accepted(text: str, pattern: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(MoeplanError) as stopped:
        import_trace(path)
    assert re.search(pattern, str(stopped.value))
    assert ("no request has" in str(stopped.value)) == ("meta_info" in text)

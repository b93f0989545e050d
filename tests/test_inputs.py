"""Inputs of the committed results: shipped, made by a benchmark, or public and converted by one command."""

import hashlib
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from moeplan.benchmarks import placement_referee, public_traces
from moeplan.benchmarks.public_traces import RECORDINGS, Recording, convert
from moeplan.planner.place.score import score
from moeplan.spec.errors import DocumentError
from moeplan.spec.placement import PlacementDevice, PlacementLayer
from moeplan.spec.trace import Trace
from moeplan.website.pages import ROOT, documents

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
CODE = re.compile(r"`([^`]+)`|^ {4}(\S.*)$", re.M)
DATA = re.compile(r"[\w./-]*\w\.(?:npz|yaml|jsonl)\b")
PROGRAM = re.compile(r"(?:python|referee|baseline|yardstick) \"?(?:python )?([\w./-]+\.(?:py|json))\b")
ELSEWHERE = re.compile(r"(?<![\w.])(?:\.\./)+shared\b|(?<![\w.:/-])(?:/(?:work|home|root|tmp|mnt|opt|usr)/|~/)\w")


def unknown(text: str) -> list[str]:
    """Inputs in the code of a page that neither the repository nor a public recording has."""
    code = " ".join(quoted or indented for quoted, indented in CODE.findall(text))
    known = {f"traces/{recording.name}.npz" for recording in RECORDINGS}
    named = {*DATA.findall(code), *PROGRAM.findall(code)}
    return sorted(name for name in named if name not in known and not (ROOT / name).is_file())


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_name_inputs_that_anybody_can_have(path: Path) -> None:
    text = path.read_text()
    assert unknown(text) == []
    traces = set(re.findall(r"^(?:\| |## )((?:esft|gpt-oss|tiny_moe)/\w+)", text, re.M))
    assert traces <= {recording.name for recording in RECORDINGS} | {"tiny_moe/trace"}


@pytest.mark.parametrize("document", [name for name in documents() if not name.startswith("examples/")])
def test_no_page_names_a_folder_of_a_machine(document: str) -> None:
    assert ELSEWHERE.findall((ROOT / document).read_text()) == []


def test_inputs_from_elsewhere_are_seen() -> None:
    command = (
        "`python benchmarks/x.py --referee a.py --baseline ../b.json ../c.npz traces/esft/law.npz examples/d.yaml`"
    )
    assert unknown(command) == [
        "../b.json",
        "../c.npz",
        "a.py",
        "benchmarks/x.py",
        "examples/d.yaml",
        "traces/esft/law.npz",
    ]
    assert unknown("    python benchmarks/anytime.py traces/esft/intent.npz\n        examples/tiny_moe/trace.npz") == []
    assert ELSEWHERE.findall("x ../shared/y /work/z ~/a") == ["../shared", "/work/z", "~/a"]
    assert ELSEWHERE.findall("https://a.b/work/c shared/d /dev/null a/tmp/b") == []


def test_the_page_of_inputs_is_current() -> None:
    text = (ROOT / "docs" / "inputs.md").read_text()
    for recording in RECORDINGS:
        cells = (
            f"traces/{recording.name}.npz",
            f"{recording.folder}/{recording.files}",
            recording.sha256,
            recording.digest,
        )
        assert "| " + " | ".join(f"`{cell}`" for cell in cells) + " |" in text
        repository, commit = recording.source
        assert f"git clone https://github.com/{repository} checkouts/{repository.rpartition('/')[2]}\n" in text
        assert f"checkouts/{repository.rpartition('/')[2]} checkout {commit}\n" in text


def recorded(recording: Recording, files: dict[str, str], folder: Path) -> Recording:
    """The recording made to be of these files, in this order, with the routing of anything."""
    for name, text in files.items():
        path = folder / recording.source[0].rpartition("/")[2] / recording.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    sha256 = hashlib.sha256("".join(files.values()).encode()).hexdigest()
    made = replace(recording, sha256=sha256)
    trace = made.read([text.encode() for text in files.values()])
    return replace(made, digest=trace.digest())


def random_routing(layers: int, top_k: int, experts: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Lengths of three sequences; ids and weights [tokens, layers, top_k] in falling order of weight."""
    rng, lengths = np.random.default_rng(7), [3, 1, 5]
    ids = np.argsort(rng.random((sum(lengths), layers, experts)), axis=2)[..., :top_k]
    weights = np.sort(rng.permuted(np.arange(1, 10001))[: ids.size].reshape(ids.shape) / 10000)[..., ::-1]
    return lengths, ids, weights


def test_files_of_esft_become_a_trace(tmp_path: Path) -> None:
    lengths, ids, weights = random_routing(11, 6, 64)
    order = np.argsort(np.random.default_rng(1).random(ids.shape), axis=2)  # as recorded: in no order
    bounds = np.cumsum([0, *lengths])
    files = {}
    for layer in range(11):  # 10 and 11 stand after 9
        mixed = [np.take_along_axis(values, order, axis=2)[:, layer] for values in (ids, weights)]
        fields = [["\t".join(map(str, v[a:b].ravel())) for v in mixed] for a, b in pairwise(bounds)]
        files[f"expert_weights_{layer + 1}.txt"] = "".join("\t\t".join(pair) + "\n" for pair in fields)
    trace = convert(recorded(RECORDINGS[0], files, tmp_path), tmp_path)
    assert (trace.expert_ids == ids).all()
    assert trace.expert_weights == pytest.approx(weights)
    assert trace.seq_len.tolist() == lengths
    assert trace.num_experts == 64


def test_files_of_gpt_oss_become_a_trace(tmp_path: Path) -> None:
    lengths, ids, weights = random_routing(24, 4, 32)
    bounds = np.cumsum([0, *lengths])
    files = {}
    for name, (first, end) in zip(("A b/x", "A/x", "B/x"), pairwise(bounds), strict=True):
        tokens = [
            {
                f"layer_{j}": {"selected_experts": ids[t, j].tolist(), "selected_probs": weights[t, j].tolist()}
                for j in range(24)
            }
            for t in range(first, end)
        ]
        files[f"{name}_examples.json"] = json.dumps(
            {"router_data": [{f"token_{t}": token} for t, token in enumerate(tokens)]}
        )
    trace = convert(recorded(RECORDINGS[2], files, tmp_path), tmp_path)
    assert (trace.expert_ids == ids).all()
    assert trace.expert_weights == pytest.approx(weights)
    assert trace.seq_len.tolist() == lengths
    assert trace.num_experts == 32


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = "\t".join("012345")
    made = recorded(RECORDINGS[0], {"expert_weights_1.txt": f"{ids}\t\t{ids}\n"}, tmp_path)
    assert convert(made, tmp_path).tokens == 1
    with pytest.raises(DocumentError, match=r"no expert_weights_.*: clone https://github.com/deepseek-ai/ESFT"):
        convert(made, tmp_path / "nowhere")
    with pytest.raises(DocumentError, match=r"SHA-256 .* of 1 files, expected 58491.*: check out commit 579a771"):
        convert(RECORDINGS[0], tmp_path)
    with pytest.raises(DocumentError, match="the tables were made with 0123"):
        convert(replace(made, digest="0123"), tmp_path)
    monkeypatch.setattr("sys.argv", ["public_traces", str(tmp_path), "--output", str(tmp_path / "traces")])
    with pytest.raises(SystemExit, match="check out commit"):
        public_traces.main()
    assert not (tmp_path / "traces").exists()


@pytest.mark.parametrize("seed", range(4))
def test_the_referee_agrees_with_our_own_scores(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts, layers, tokens = 8, 3, 200
    ids = np.argsort(rng.random((tokens, layers, experts)) + np.arange(experts) / 9, axis=2)[..., :2]
    devices = [PlacementDevice(host=host, capacity=experts) for host in "aabb"]
    where = rng.permuted(np.tile(np.arange(experts) % 4, (layers, 1)), axis=1)
    slots = [tuple(tuple(np.flatnonzero(row == g).tolist()) for g in range(4)) for row in where]
    ours = score([PlacementLayer(slots=held) for held in slots], devices, Trace.of(ids, experts)).model_dump()
    place = {"devices": [{"host": host} for host in "aabb"], "layers": [{"slots": held} for held in slots]}
    theirs = placement_referee.score(place, ids, experts)
    assert theirs.keys() >= {"balance_mean", "fanout_host", "boundary_cross_device"}
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs)


def test_the_referee_divides_copies_by_their_shares() -> None:
    ids = np.zeros((1000, 2, 1), np.int64)
    slots = [[[0], [0, 1]], [[0, 1], []]]
    layers = [{"slots": slots[0], "shares": [[0.25], [0.75, 1.0]]}, {"slots": slots[1]}]
    found = placement_referee.score({"devices": [{"host": "a"}, {"host": "b"}], "layers": layers}, ids, 2)
    assert found["balance_mean"] == pytest.approx((1.5 + 2) / 2)
    assert "boundary_cross_device" not in found
    layers[1] = {"slots": [[0], []]}
    with pytest.raises(SystemExit, match="layer 1: 1 of 2 experts are held"):
        placement_referee.score({"devices": [{"host": "a"}, {"host": "b"}], "layers": layers}, ids, 2)

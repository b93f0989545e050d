"""The public recordings that tables of ``benchmarks/results`` were made with, as traces.

    python -m moeplan.benchmarks.public_traces CHECKOUTS --output traces

CHECKOUTS is a folder with a clone of each repository of ``RECORDINGS``, at its commit; ``docs/inputs.md`` has the
commands. Writes ``traces/esft/intent.npz`` and so on. Source files that are not the recorded ones, by SHA-256, are
refused before they are read; a trace whose routing is not the recorded one, by ``Trace.digest``, is not written.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeplan.profiler.traces.importers.files import natural
from moeplan.spec.errors import DocumentError
from moeplan.spec.trace import Trace

ESFT = ("deepseek-ai/ESFT", "579a7711e4b332b4c57b47e378a0cf240d85caa6")
GPT_OSS = ("AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting", "72b368f60045221f21eeb65debb27d58de92e565")


@dataclass(frozen=True)
class Recording:
    """What a trace is made of.

    files: glob below ``folder``, read in the order of their names, 9 before 10. sha256: of all their bytes, one file
    after the other. digest: ``Trace.digest`` of the result.
    """

    name: str
    source: tuple[str, str]  # repository, commit
    folder: str
    files: str
    sha256: str
    digest: str
    read: Callable[[Sequence[bytes]], Trace]


def esft(files: Sequence[bytes]) -> Trace:
    """DeepSeek-V2-Lite's 64 experts, top-6. A file is a layer, a line a sequence: ids of all its tokens with
    tabs between, an empty field, their gate weights in the same order."""
    ids, weights = [], []
    lengths: list[int] = []
    for layer in files:
        lines = [line.split("\t\t") for line in layer.decode().splitlines()]
        rows = [np.array(left.split("\t"), int).reshape(-1, 6) for left, _ in lines]
        lengths = [len(row) for row in rows]
        ids.append(np.concatenate(rows))
        weights.append(np.concatenate([np.array(right.split("\t"), float).reshape(-1, 6) for _, right in lines]))
    return _trace(np.stack(ids, axis=1), np.stack(weights, axis=1), lengths, 64)


def gpt_oss(files: Sequence[bytes]) -> Trace:
    """gpt-oss-20b's 32 experts, top-4. A file is a sequence: ``router_data`` has an object for each generated token, of
    the 24 layers' ``selected_experts`` and ``selected_probs``."""
    ids, weights = [], []
    lengths = []
    for sequence in files:
        tokens = [token for row in json.loads(sequence)["router_data"] for token in row.values()]
        layers = [[token[f"layer_{layer}"] for layer in range(len(token))] for token in tokens]
        lengths.append(len(tokens))
        ids += [[layer["selected_experts"] for layer in token] for token in layers]
        weights += [[layer["selected_probs"] for layer in token] for token in layers]
    return _trace(np.array(ids), np.array(weights), lengths, 32)


def _trace(ids: np.ndarray, weights: np.ndarray, lengths: Sequence[int], experts: int) -> Trace:
    """ids, weights: [tokens, layers, top_k], in any order of the experts of a token."""
    order = np.argsort(-weights, axis=2, kind="stable")
    ids, weights = (np.take_along_axis(values, order, axis=2) for values in (ids, weights))
    return Trace.of(ids, experts, expert_weights=weights, seq_len=np.array(lengths))


def _layers(task: str, sha256: str, digest: str) -> Recording:
    folder = f"results/expert_scores/{task}"
    return Recording(f"esft/{task}", ESFT, folder, "expert_weights_*.txt", sha256, digest, esft)


def _sequences(task: str, sha256: str, digest: str) -> Recording:
    return Recording(f"gpt-oss/{task}", GPT_OSS, f"data/{task}", "*/*_examples.json", sha256, digest, gpt_oss)


RECORDINGS = (
    _layers("intent", "584910187366651df739d08aff25f6c25da576b5eb27f6eb3499ded3fb31b75f", "3b9ed00cc9c3bdf3"),
    _layers("summary", "d66b08a55954de919e7bb4bf7362e42d7bb0074d09d1f40e336ced20a4773ca4", "86852276ada010da"),
    _sequences("gpqa_diamond", "4cc3ec56ca1f19158424048e869a7e2d2702965c4c0beefc06dee82bdfad5581", "27a4546062ef3717"),
    _sequences("mmlu_dev", "969865fd452132a5ffda25b4c12d26315f8b1d0fbc3dafd083684be554b9674c", "035cce687085afaf"),
    _sequences(
        "tulu3_persona_if", "3de7ef194aafb0e99ecbf3ece68506f89648d632bc4892cbe8c52c14b21e04f8", "b81c8f714ce3ae8f"
    ),
)


def convert(recording: Recording, checkouts: Path) -> Trace:
    """Raises DocumentError, one line, where the files or the routing in them are not the recorded ones."""
    repository, commit = recording.source
    folder = checkouts / repository.rpartition("/")[2] / recording.folder
    files = [
        path.read_bytes() for path in sorted(folder.glob(recording.files), key=lambda path: natural(path.as_posix()))
    ]
    if not files:
        raise DocumentError(f"{folder}: no {recording.files}: clone https://github.com/{repository} into {checkouts}")
    found = hashlib.sha256()
    for data in files:
        found.update(data)
    if found.hexdigest() != recording.sha256:
        raise DocumentError(
            f"{folder}: SHA-256 {found.hexdigest()} of {len(files)} files, expected {recording.sha256}: check out "
            f"commit {commit}"
        )
    trace = recording.read(files)
    if trace.digest() != recording.digest:
        raise DocumentError(f"{folder}: routing {trace.digest()}, the tables were made with {recording.digest}")
    return trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, help="folder with the clones")
    parser.add_argument("--output", type=Path, default=Path("traces"), help="folder of the traces")
    args = parser.parse_args()
    for recording in RECORDINGS:
        try:
            trace = convert(recording, args.checkouts)
            trace.write(args.output / f"{recording.name}.npz")
        except DocumentError as error:
            raise SystemExit(str(error)) from None
        size = f"{trace.tokens:,} tokens, {trace.layers} layers x {trace.num_experts} experts, top-{trace.top_k}"
        print(f"{recording.name}: {size}, routing {trace.digest()}")


if __name__ == "__main__":
    main()

"""Compiles what ``kernels_time`` will run, in many processes at once, each on a core of its own.

    python -m moeplan.benchmarks.gpu.warm SHAPE TOKENS [train]

Every configuration that tuning may try is launched once and timed by nobody; Triton keeps what it compiled on disk.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from moeplan.benchmarks.gpu.cases import SHAPES, inputs, layer_on
from moeplan.benchmarks.gpu.kernels_check import ours
from moeplan.benchmarks.kernels_alternatives import triton as method
from moeplan.runtime.kernels.gpu.config import Config
from moeplan.runtime.kernels.gpu.tuning import Launch, Tuner


@contextmanager
def tuning_by(path: Path, measure: Callable[[Launch, Config], float]) -> Iterator[None]:
    """Meanwhile a launch takes what ``measure`` finds best, and ``path`` keeps it."""
    from moeplan.runtime.kernels.gpu import call

    one = Tuner(path, measure)
    with mock.patch.object(call, "tuner", return_value=one):
        yield


def once(launch: Launch, config: Config) -> float:
    """RuntimeError where it does not fit, which tuning leaves out."""
    from triton.errors import TritonError

    try:
        launch(config)
        torch.cuda.synchronize()
    except TritonError as error:
        raise RuntimeError(str(error)) from error
    return 0.0


def main() -> None:
    name, tokens, *rest = sys.argv[1:]
    shape, device = SHAPES[name], torch.device("cuda:0")
    layer = layer_on(shape, torch.bfloat16, device)
    with tempfile.TemporaryDirectory() as folder, tuning_by(Path(folder) / "none.json", once):
        for count in map(int, tokens.split(",")):
            given = inputs(shape, torch.bfloat16, device, count, skewed=True, elsewhere=False)
            if "train" in rest:
                ours(layer, given)
            else:
                with torch.inference_mode():
                    method(layer).run(given.x, given.ids, given.gates)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()

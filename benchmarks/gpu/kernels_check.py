"""Stage 2: every Triton operator, forward and backward, against float64.

    python -m moeplan.benchmarks.gpu.kernels_check SHAPE TYPE [--dry]

prints the rows of one layer as JSON; the stage starts one such process for each, since most of the time goes into
compiling kernels, on one core each. Tiles are the default ones: what tuning chooses is checked by ``kernels_time``.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch
from torch import Tensor

from moeplan.benchmarks.gpu.cases import DRY_SHAPES, DTYPES, SHAPES, Error, Expected, Inputs, expected, inputs, layer_on
from moeplan.benchmarks.gpu.stage import FAILED, Row, Settings, judged, last_line
from moeplan.benchmarks.kernels_alternatives import Layer
from moeplan.runtime.kernels import esfk, esmm, ess, estmm, expert_ffn

STAGE = "kernels_check"
TOKENS, BY_ITSELF = (1, 7, 64, 513, 2048, 8192), (7, 513)  # and tokens of each operator's own check
# The interpreter takes seconds for each: tests/gpu_interpreted.py has the others.
DRY_TOKENS = (9,)
DRY_TYPES = {"mixtral": "bf16", "deepseek": "f32", "gpt-oss": "bf16"}
TOLERANCE = {"f32": 1e-3, "bf16": 1e-2}
# The interpreter rounds to bfloat16 towards zero, a GPU to the nearest: twice the error.
DRY_TOLERANCE = {"f32": 1e-3, "bf16": 2e-2}
PARAMETERS = ("gate_up", "down", "gate_up_bias", "down_bias")


def rows(settings: Settings) -> Iterator[Row]:
    """One process for each layer and type, at the same time; dry one after the other, in this one."""
    work = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    if settings.dry:
        for shape, dtype in DRY_TYPES.items():
            yield from check(shape, dtype, True)
        return
    running = []
    for case in work:
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 read below
        command = [sys.executable, "-P", "-m", "moeplan.benchmarks.gpu.kernels_check", *case]
        environment = os.environ | {"MOEPLAN_TUNE": "0", "OMP_NUM_THREADS": "2"}
        running.append((case, output, subprocess.Popen(command, stdout=output, stderr=2, env=environment)))
    for case, output, process in running:
        code = process.wait()
        output.seek(0)
        lines = output.read().splitlines()
        yield from (Row(**json.loads(line)) for line in lines if line.startswith("{"))
        if code:
            why = last_line("\n".join(lines)) if lines else "see the log"
            yield Row(STAGE, " ".join(case), f"exit code {code}: {why}", "", FAILED)


def check(name: str, dtype_name: str, dry: bool) -> Iterator[Row]:
    """The rows of one layer: each case as a detail, then the worst of all."""
    device = torch.device("cpu" if dry else "cuda:0")
    shape, dtype = (DRY_SHAPES if dry else SHAPES)[name], DTYPES[dtype_name]
    limit = (DRY_TOLERANCE if dry else TOLERANCE)[dtype_name]
    layer = layer_on(shape, dtype, device)
    worst = (0.0, "nothing")
    for tokens in DRY_TOKENS if dry else TOKENS:
        for skewed in (False, True):
            given = inputs(shape, dtype, device, tokens, skewed)
            errors = of_layer(layer, given)
            if skewed if dry else tokens in BY_ITSELF:
                errors |= of_operators(layer, given)
            part = max(errors, key=lambda each: errors[each])
            case = f"{tokens} tokens, {'skewed' if skewed else 'random'}"
            worst = max(worst, (errors[part], f"{part}, {case}"))
            yield _row(f"{name} {dtype_name}, {case}", errors[part], part, limit, detail=True)
    yield _row(f"{name} {dtype_name}: the worst", *worst, limit, detail=False)
    if dry and name != "deepseek":
        return
    same = repeated(layer, inputs(shape, dtype, device, DRY_TOKENS[-1] if dry else 513, True))
    yield Row(STAGE, f"{name} {dtype_name}: again", "the same bits" if same else "other bits", "the same", judged(same))


def _row(what: str, error: float, part: str, limit: float, detail: bool) -> Row:
    return Row(STAGE, what, f"{error:.1e} ({part})", f"<= {limit:g}", judged(error <= limit), detail)


class Poisoned:
    """Fresh memory holds NaN meanwhile: whoever reads what nobody has written is found out."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


def ours(layer: Layer, given: Inputs) -> dict[str, Tensor]:
    """The output and all gradients."""
    leaves = {"x": given.x, "gates": given.gates} | {
        name: value for name in PARAMETERS if (value := getattr(layer, name)) is not None
    }
    leaves = {name: value.detach().requires_grad_() for name, value in leaves.items()}
    with Poisoned():
        y = expert_ffn(
            leaves["x"],
            leaves["gate_up"],
            leaves["down"],
            given.ids,
            leaves["gates"],
            activation=layer.shape.activation,
            gate_up_bias=leaves.get("gate_up_bias"),
            down_bias=leaves.get("down_bias"),
            implementation="triton",
        )
        gradients = torch.autograd.grad(y, list(leaves.values()), given.dy)
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def of_layer(layer: Layer, given: Inputs) -> dict[str, float]:
    """Relative errors of the output and of every gradient of ``expert_ffn``."""
    got = ours(layer, given)
    errors = {name: Error() for name in got}
    for found in expected(layer, given):
        if isinstance(found, Expected):
            for name, want in zip(("y", "x", "gates"), found, strict=True):
                errors[name].add(got[name], want)
        else:
            e, gradients = found
            for name, want in gradients.items():
                errors[name].add(got[name][e].reshape(want.shape), want)
    return {("y" if name == "y" else f"gradient of {name}"): error.relative for name, error in errors.items()}


def of_operators(layer: Layer, given: Inputs) -> dict[str, float]:
    """Relative errors of ``esmm``, ``ess``, ``estmm`` and ``esfk`` over the first projection."""
    weight = layer.gate_up.flatten(1, 2)
    bias = None if layer.gate_up_bias is None else layer.gate_up_bias.flatten(1)
    experts, outputs, _ = weight.shape
    ids = given.ids
    dy = torch.randn(*ids.shape, outputs, generator=torch.Generator().manual_seed(3)).to(given.x)
    with Poisoned():
        y = esmm(given.x, weight, ids, bias=bias, implementation="triton")
        sums = ess(dy, ids, experts, implementation="triton")
        product = estmm(given.x, dy, ids, experts, implementation="triton")
        dx, dweight, dbias = esfk(given.x, weight, dy, ids, with_bias=True, implementation="triton")
    assert dbias is not None
    errors = {name: Error() for name in ("esmm", "ess", "estmm", "esfk x", "esfk weight", "esfk bias")}
    back = torch.zeros(given.x.shape, dtype=torch.float64, device=given.x.device)
    errors["esmm"].add(y[ids < 0], torch.zeros_like(y[ids < 0]))
    for e in range(experts):
        token, choice = torch.where(ids == e)
        rows, wide, dout = given.x[token].double(), weight[e].double(), dy[token, choice].double()
        errors["esmm"].add(y[token, choice], rows @ wide.t() + (0 if bias is None else bias[e].double()))
        for name, got in (("ess", sums), ("esfk bias", dbias)):
            errors[name].add(got[e], dout.sum(0))
        for name, got in (("estmm", product), ("esfk weight", dweight)):
            errors[name].add(got[e], dout.t() @ rows)
        back.index_add_(0, token, dout @ wide)
    errors["esfk x"].add(dx, back)
    return {name: error.relative for name, error in errors.items()}


def repeated(layer: Layer, given: Inputs) -> bool:
    """Whether the same call gives the same bits."""
    first, second = ours(layer, given), ours(layer, given)
    return all(torch.equal(first[name], second[name]) for name in first)


def main() -> None:
    name, dtype, *rest = sys.argv[1:]
    for row in check(name, dtype, "--dry" in rest):
        print(json.dumps(row._asdict()), flush=True)


if __name__ == "__main__":
    main()

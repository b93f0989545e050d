"""Every operator of the C++ kernels on one problem, beside the reference in float64. Run as a program: a fuzz."""

import random
import sys

import torch
from torch import Tensor

from moeplan.runtime.kernels.cpp.implementation import CppKernels
from moeplan.runtime.kernels.cpp.library import ISAS, load
from moeplan.runtime.kernels.interface import Kernels
from moeplan.runtime.kernels.reference import ReferenceKernels
from moeplan.tests.kernel_cases import FFNS, Problem, problem

TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the largest value: the float32 sums, and a few roundings to the type between them.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def isas() -> list[str]:
    """Instruction sets that this machine runs."""
    return [name for name, number in ISAS.items() if number <= load().moeplan_level()]


def everything(kernels: Kernels, p: Problem, activation: str) -> dict[str, Tensor]:
    """Forward, backward and all projections, for rows of a token and for rows of a choice."""
    y, saved = kernels.forward(*p, activation, True)
    dy = normal(y.shape, 1).to(y.dtype)
    gradients = kernels.backward(dy, *p, saved, activation)
    results = {"y": y} | {f"d{name}": g for name, g in gradients._asdict().items() if g is not None}
    weight = p.gate_up.flatten(1, 2)
    bias = None if p.gate_up_bias is None else p.gate_up_bias.flatten(1)
    experts, outputs, inputs = weight.shape
    dout = normal((*p.ids.shape, outputs), 2).to(y.dtype)
    for x in (p.x, normal((*p.ids.shape, inputs), 3).to(y.dtype)):
        results[f"esmm {x.ndim}"] = kernels.esmm(x, weight, bias, p.ids)
        dx, dweight, dbias = kernels.esfk(x, weight, dout, p.ids, True)
        results |= {f"esfk x {x.ndim}": dx, f"esfk weight {x.ndim}": dweight, f"esfk bias {x.ndim}": dbias}
        results[f"estmm {x.ndim}"] = kernels.estmm(x, dout, p.ids, experts)
    results["ess"] = kernels.ess(dout, p.ids, experts)
    return results


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def too_far(p: Problem, activation: str, isa: str) -> dict[str, float]:
    """Results that differ from the reference by more than their type allows, with the difference."""
    want = everything(ReferenceKernels(), p.to(torch.float64), activation)
    got = everything(CppKernels(isa), p, activation)
    assert list(got) == list(want)
    far = {}
    for name, value in got.items():
        assert value.shape == want[name].shape
        if value.numel():
            scale = want[name].abs().max().clamp(min=1e-30)
            difference = ((value.double() - want[name]).abs().max() / scale).item()
            if not difference <= TOLERANCE[p.x.dtype]:
                far[name] = difference
    return far


def fuzz(seed: int) -> None:
    """A random problem on every type and instruction set; AssertionError names what is wrong."""
    rng = random.Random(seed)
    tokens, model = rng.choice([0, 1, 3, 8, 9, 40, 150]), rng.choice([1, 7, 16, 31, 32, 64, 100, 272])
    ffn, experts, top_k = rng.choice([0, 1, 15, 16, 32, 64, 130, 272]), rng.choice([0, 1, 3, 8]), rng.choice([1, 2, 4])
    matrices, activation = rng.choice(FFNS)
    torch.set_num_threads(rng.choice([1, 2]))
    p = problem(tokens, experts, top_k, model, ffn, matrices, biases=rng.random() < 0.5, seed=seed)
    if rng.random() < 0.3:
        p = p._replace(ids=p.ids.clamp(max=0).int())  # all on one expert
    for dtype in TYPES:
        for isa in isas():
            far = too_far(p.to(dtype), activation, isa)
            sizes = {"T": tokens, "D": model, "E": experts, "K": top_k, "H": ffn, "M": matrices}
            assert not far, f"seed {seed} {dtype} {isa} {activation} {sizes}: {far}"


if __name__ == "__main__":
    for number in range(int(sys.argv[1])):
        fuzz(number)
    print("fuzz: done")

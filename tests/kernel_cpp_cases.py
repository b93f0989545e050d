"""Every operator of the C++ kernels on one problem, beside the reference in float64. Run as a program: a fuzz."""

import random
import sys

import torch
from torch import Tensor

from moeplan.runtime.kernels.cpp.implementation import CppKernels
from moeplan.runtime.kernels.cpp.library import ISAS, load
from moeplan.runtime.kernels.interface import Kernels
from moeplan.runtime.kernels.reference import ReferenceKernels
from moeplan.tests.kernel_cases import FFNS, LAYOUTS, MORE_FFNS, Problem, problem

TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the largest value: the float32 sums, and a few roundings to the type between them.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def isas() -> list[str]:
    """Instruction sets that this machine runs."""
    return [name for name, number in ISAS.items() if number <= load().moeplan_level()]


def everything(kernels: Kernels, p: Problem, activation: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Forward, backward and all projections, for rows of a token and for rows of a choice; of values of ``dtype``."""

    def normal(shape: tuple[int, ...], seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(p.x.dtype)

    y, saved = kernels.forward(*p, activation, True)
    dy = normal(y.shape, 1)
    gradients = kernels.backward(dy, *p, saved, activation)
    results = {"y": y} | {f"d{name}": g for name, g in gradients._asdict().items() if g is not None}
    weight = p.gate_up.flatten(1, 2).contiguous()
    bias = None if p.gate_up_bias is None else p.gate_up_bias.flatten(1).contiguous()
    experts, outputs, inputs = weight.shape
    dout = normal((*p.ids.shape, outputs), 2)
    for x in (p.x, normal((*p.ids.shape, inputs), 3)):
        results[f"esmm {x.ndim}"] = kernels.esmm(x, weight, bias, p.ids)
        dx, dweight, dbias = kernels.esfk(x, weight, dout, p.ids, True)
        results |= {f"esfk x {x.ndim}": dx, f"esfk weight {x.ndim}": dweight, f"esfk bias {x.ndim}": dbias}
        results[f"estmm {x.ndim}"] = kernels.estmm(x, dout, p.ids, experts)
    results["ess"] = kernels.ess(dout, p.ids, experts)
    return results


def too_far(p: Problem, activation: str, isa: str, vendor_from: int = 0) -> dict[str, float]:
    """Results that differ from the reference by more than their type allows, with the difference.

    What terms that cancel leave may be small beside them: there a difference counts where it is several times what
    rounding the arguments once would make.
    """
    dtype = p.x.dtype
    want = everything(ReferenceKernels(), p.to(torch.float64), activation, dtype)
    got = everything(CppKernels(isa, vendor_from), p, activation, dtype)
    assert list(got) == list(want)
    assert all(got[name].shape == want[name].shape for name in want)
    far = {name: d for name in want if not (d := distance(got[name], want[name])) <= TOLERANCE[dtype]}
    for seed in range(3) if far else ():
        rounded = everything(ReferenceKernels(), perturbed(p, seed), activation, dtype)
        far = {name: d for name, d in far.items() if not d <= 4 * distance(rounded[name], want[name])}
    return far


def distance(got: Tensor, want: Tensor) -> float:
    """Largest difference, over the largest value."""
    if not want.numel():
        return 0.0
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def perturbed(p: Problem, seed: int) -> Problem:
    """In float64, every number off by about a rounding of the problem's type."""
    generator, eps = torch.Generator().manual_seed(seed), torch.finfo(p.x.dtype).eps
    exact = p.to(torch.float64)
    noise = {n: 1 + eps * torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in exact.floats().items()}
    return exact._replace(**{n: t * noise[n] for n, t in exact.floats().items()})


def fuzz(seed: int) -> None:
    """A random problem on every type and instruction set; AssertionError names what is wrong."""
    rng = random.Random(seed)
    tokens, model = rng.choice([0, 1, 3, 8, 9, 40, 150, 300]), rng.choice([0, 1, 7, 16, 31, 32, 64, 100, 272])
    ffn, experts, top_k = rng.choice([0, 1, 15, 16, 32, 64, 130, 272]), rng.choice([0, 1, 3, 8]), rng.choice([1, 2, 4])
    matrices, activation = rng.choice((*FFNS, *MORE_FFNS))
    lies = rng.choice((None, *LAYOUTS))
    torch.set_num_threads(rng.choice([1, 2]))
    p = problem(tokens, experts, top_k, model, ffn, matrices, biases=rng.random() < 0.5, seed=seed)
    if rng.random() < 0.3:
        p = p._replace(ids=p.ids.clamp(max=0).int())  # all on one expert
    if lies:
        p = p.lying(*lies)
    for dtype in TYPES:
        for isa in isas():
            vendor_from = rng.choice([0, 1])
            far = too_far(p.to(dtype), activation, isa, vendor_from)
            sizes = {"T": tokens, "D": model, "E": experts, "K": top_k, "H": ffn, "M": matrices}
            assert not far, f"seed {seed} {dtype} {isa} {vendor_from=} {activation} {lies} {sizes}: {far}"


if __name__ == "__main__":
    for number in range(int(sys.argv[1])):
        fuzz(number)
    print("fuzz: done")

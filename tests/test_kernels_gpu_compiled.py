"""The Triton kernels compiled for sm_80 and sm_90, without a GPU.

Nothing is spilled, shared memory fits, products are done by matrix instructions, and every option compiles.
"""

from dataclasses import replace

import pytest

from moeplan.runtime.kernels.gpu.activation import constants
from moeplan.runtime.kernels.gpu.compiled import SHARED, compile_case
from moeplan.runtime.kernels.gpu.specialisations import Case, cases

REGISTERS = 64 * 1024
# Rows of the tile from which Hopper's wgmma can take it; fewer go through mma.sync.
WGMMA_ROWS = 64
# The first of each kernel: bfloat16, the lowest tiles.
SMALLEST = {case.kernel.__name__: case for case in reversed(list(cases(80)))}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("arch", SHARED)
def test_resources_and_instructions(arch, dtype):
    found = [(case, compile_case(case, arch)) for case in cases(arch) if str(case.dtype) == f"torch.{dtype}"]
    assert {case.kernel.__name__ for case, _ in found} >= {"esmm_kernel", "project_kernel", "esfk_kernel"}
    for case, built in found:
        assert built.spilled == 0, str(built)
        assert built.shared <= SHARED[arch], str(built)
        assert built.registers * 32 * case.config.warps <= REGISTERS, str(built)
        weight_gradient = case.kernel.__name__ == "esfk_kernel"
        if case.height:
            few = arch < 90 or case.height < WGMMA_ROWS
            assert (built.mma > 0) == few, str(built)
            # A weight's gradient has the weight's sizes: its tile is large however few the rows are.
            assert (built.wgmma > 0) == (arch >= 90 and (not few or weight_gradient)), str(built)


def without(kernel: str, *pointers: str) -> Case:
    case = SMALLEST[kernel]
    return replace(case, pointers={**case.pointers, **dict.fromkeys(pointers)})


def with_constants(kernel: str, **constants: object) -> Case:
    case = SMALLEST[kernel]
    return replace(case, constants=case.constants | constants)


@pytest.mark.parametrize(
    "case",
    [
        without("esmm_kernel", "bias", "gates"),
        without("project_kernel", "bias", "saved"),
        without("esfk_kernel", "gates", "dx", "dbias"),
        without("esfk_kernel", "x", "weight", "gates", "dx", "dweight"),
        without("activate_kernel", "gates"),
        without("activate_backward_kernel", "down_bias"),
    ],
)
def test_what_is_not_given(case):
    assert compile_case(case, 80).spilled == 0


@pytest.mark.parametrize("kernel", ["project_kernel", "activate_kernel", "activate_backward_kernel"])
@pytest.mark.parametrize(
    ("matrices", "activation"),
    [
        (1, "silu"),
        (2, "gelu"),
        (2, "relu"),
        (2, "swiglu_clamped"),
        (1, "relu2"),
        (2, "gelu_tanh"),
        (2, "swiglu_clamped(1.0, 10.0, 0.0)"),
    ],
)
def test_activations(kernel, matrices, activation):
    assert compile_case(with_constants(kernel, MATRICES=matrices, **constants(activation)), 80).spilled == 0


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_layouts(arch, mixed, transposed):
    """The first projection of any layout: no spills, matrix instructions, at the lowest and highest tiles."""
    for case in cases(arch):
        if (
            case.kernel.__name__ == "project_kernel"
            and str(case.dtype) == "torch.bfloat16"
            and "ragged" not in case.label
        ):
            ways = {"TRANSPOSED": transposed, "MIXED": mixed}
            built = compile_case(replace(case, constants=case.constants | ways), arch)
            assert built.spilled == 0, str(built)
            assert built.shared <= SHARED[arch], str(built)
            assert built.mma + built.wgmma > 0, str(built)


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("kernel", ["esmm_kernel", "esfk_kernel"])
def test_transposed_weights(arch, kernel):
    for case in cases(arch):
        if case.kernel.__name__ == kernel and str(case.dtype) == "torch.bfloat16" and "ragged" not in case.label:
            built = compile_case(replace(case, constants=case.constants | {"TRANSPOSED": True}), arch)
            assert built.spilled == 0, str(built)
            assert built.shared <= SHARED[arch], str(built)
            assert built.mma + built.wgmma > 0, str(built)


@pytest.mark.parametrize("kernel", ["activate_kernel", "activate_backward_kernel"])
def test_mixed_columns(kernel):
    assert compile_case(with_constants(kernel, MIXED=True), 80).spilled == 0


@pytest.mark.parametrize("kernel", SMALLEST)
def test_sizes_of_one(kernel):
    """Triton makes an integer argument of 1 a constant, which not all that works with integers takes."""
    case = SMALLEST[kernel]
    given = {*case.pointers, *case.constants}
    sizes = [p.name for p in case.kernel.params if p.name not in given and not p.do_not_specialize]
    uneven = dict.fromkeys(("EVEN_DEPTH", "EVEN_COLUMNS", "EVEN_ROWS"), False)
    masked = {name: value for name, value in uneven.items() if name in case.constants}
    assert compile_case(with_constants(kernel, **dict.fromkeys(sizes, 1), **masked), 80).spilled == 0

"""The operators on CPUs through the C++ library: checks, allocates the results, passes pointers.

Letters and meaning as in ``interface``. Results do not depend on the number of threads, but for the last digits of what
MKL multiplies (``vendor_from``).
"""

import ctypes
import os
from typing import Any

import torch
from torch import Tensor

from ....spec import MoeplanError
from .. import memory
from ..activation import parse_activation
from ..interface import Gradients
from ..reindex import active_experts
from ..stored import layout, like_weights, lying
from .library import BAD_ID, level, load

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
VENDOR_FROM = 4096
"""Columns of the wider matrix at which MKL's larger blocks begin to pay: Mixtral's model has so many."""
_ACTIVATIONS = {"silu": 0, "gelu": 1, "relu": 2, "swiglu_clamped": 3, "gelu_tanh": 4, "relu2": 5}


class CppKernels:
    """See ``interface.Kernels``. ``isa``: "avx2", "avx512" or "amx", by default what MOEPLAN_CPU_ISA says, else the
    best that the processor has. ``vendor_from``: MKL multiplies the float32 rows of experts with 128 or more (256 in a
    backward) where the model or its FFN is so wide (0: never), torch has it and the processor is Intel's."""

    name = "cpp"

    def __init__(self, isa: str | None = None, vendor_from: int = VENDOR_FROM) -> None:
        self._library = load()
        self._level = level(isa or os.environ.get("MOEPLAN_CPU_ISA") or None)
        self._vendor_from = vendor_from

    def scratch_bytes(self) -> int:
        """Bytes beyond arguments and results that the calling thread's last call used at once."""
        return self._library.moeplan_scratch_bytes()

    def multiply_adds(self) -> int:
        """What the products of the calling thread's last call multiplied, with the rows and columns that fill up
        tiles: half the ``flops`` and ``padding`` that ``counting`` foresees."""
        return self._library.moeplan_multiply_adds()

    def esmm(self, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
        x, ids = x.contiguous(), ids.contiguous()
        _check_weights("esmm", weight=weight)
        experts, outputs, inputs = weight.shape
        y = x.new_empty(*ids.shape, outputs)
        bias = None if bias is None else bias.contiguous()
        pointers = (x.data_ptr(), weight.data_ptr(), _pointer(bias), ids.data_ptr(), y.data_ptr())
        self._project("esmm", self._library.moeplan_project, pointers, x, ids, experts, inputs, outputs)
        return y

    def ess(self, dy: Tensor, ids: Tensor, experts: int) -> Tensor:
        dy, ids = dy.contiguous(), ids.contiguous()
        sums = dy.new_empty(experts, dy.shape[2])
        self._gradients("ess", dy, None, dy, ids, experts, 0, None, None, sums)
        return sums

    def estmm(self, x: Tensor, dy: Tensor, ids: Tensor, experts: int) -> Tensor:
        x, dy, ids = x.contiguous(), dy.contiguous(), ids.contiguous()
        active = active_experts(ids, experts, "estmm")
        buffer = memory.gradient((experts, dy.shape[2], x.shape[-1]), x.dtype, x.device, active)
        self._gradients("estmm", x, None, dy, ids, experts, x.shape[-1], None, buffer, None)
        return buffer.tensor

    def esfk(
        self, x: Tensor, weight: Tensor, dy: Tensor, ids: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x, dy, ids = x.contiguous(), dy.contiguous(), ids.contiguous()
        _check_weights("esfk", weight=weight)
        experts, outputs, inputs = weight.shape
        active = active_experts(ids, experts, "esfk")
        dx, buffer = torch.empty_like(x), memory.gradient(weight.shape, weight.dtype, weight.device, active)
        dbias = weight.new_empty(experts, outputs) if with_bias else None
        self._gradients("esfk", x, weight, dy, ids, experts, inputs, dx, buffer, dbias)
        return dx, buffer.tensor, dbias

    def forward(
        self,
        x: Tensor,
        gate_up: Tensor,
        gate_up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        ids: Tensor,
        weights: Tensor,
        activation: str,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
        lies, kind, numbers = layout(gate_up, down), *_activation(activation)
        gate_up_bias, down_bias = _contiguous(gate_up_bias), _contiguous(down_bias)
        experts, matrices, ffn, model = gate_up.shape
        y = torch.empty_like(x)
        saved = memory.empty((ids.numel() if save else 0, matrices * ffn), x.dtype, x.device)
        status = self._library.moeplan_forward(
            x.data_ptr(),
            gate_up.data_ptr(),
            _pointer(gate_up_bias),
            down.data_ptr(),
            _pointer(down_bias),
            ids.data_ptr(),
            weights.data_ptr(),
            y.data_ptr(),
            saved.data_ptr() if save else None,
            numbers,
            ids.element_size(),
            _type("expert_ffn", x),
            self._level,
            torch.get_num_threads(),
            self._vendor_from,
            kind,
            *lies,
            len(x),
            model,
            experts,
            ids.shape[1],
            ffn,
            matrices,
        )
        if status:
            self._fail("expert_ffn", status, experts)
        return y, saved

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        gate_up: Tensor,
        gate_up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        ids: Tensor,
        weights: Tensor,
        saved: Tensor,
        activation: str,
    ) -> Gradients:
        dy, x, ids, weights = dy.contiguous(), x.contiguous(), ids.contiguous(), weights.contiguous()
        saved, down_bias = saved.contiguous(), _contiguous(down_bias)
        lies, kind, numbers = layout(gate_up, down), *_activation(activation)
        experts, matrices, ffn, model = gate_up.shape
        active = active_experts(ids, experts, "expert_ffn")
        shapes = lying(gate_up, lies).shape, (down.transpose(1, 2) if lies.down_transposed else down).shape
        dgate_up, ddown = (memory.gradient(shape, x.dtype, x.device, active) for shape in shapes)
        # As the weights lie, whose views they become below.
        gradients = Gradients(
            torch.empty_like(x),
            dgate_up.tensor,
            None if gate_up_bias is None else gate_up.new_empty(experts, matrices * ffn),
            ddown.tensor,
            None if down_bias is None else down.new_empty(experts, model),
            torch.empty_like(weights),
        )
        status = self._library.moeplan_backward(
            dy.data_ptr(),
            x.data_ptr(),
            gate_up.data_ptr(),
            down.data_ptr(),
            _pointer(down_bias),
            saved.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            *map(_pointer, gradients),
            numbers,
            ids.element_size(),
            _type("expert_ffn", x),
            self._level,
            torch.get_num_threads(),
            self._vendor_from,
            kind,
            *lies,
            len(x),
            model,
            experts,
            ids.shape[1],
            ffn,
            matrices,
            dgate_up.mapped,
        )
        if status:
            self._fail("expert_ffn", status, experts)
        up, bias, back = like_weights(gradients.gate_up, gradients.gate_up_bias, gradients.down, matrices, lies)
        return gradients._replace(gate_up=up, gate_up_bias=bias, down=back)

    def _gradients(
        self,
        function: str,
        x: Tensor,
        weight: Tensor | None,
        dy: Tensor,
        ids: Tensor,
        experts: int,
        inputs: int,
        dx: Tensor | None,
        buffer: memory.GradientBuffer | None,
        dbias: Tensor | None,
    ) -> None:
        dweight, mapped = buffer or (None, False)
        pointers = tuple(map(_pointer, (x, weight, dy, ids, dx, dweight, dbias)))
        call = self._library.moeplan_project_backward
        self._project(function, call, pointers, x, ids, experts, inputs, dy.shape[2], mapped)

    def _project(
        self,
        function: str,
        call: Any,
        pointers: tuple[int | None, ...],
        x: Tensor,
        ids: Tensor,
        experts: int,
        inputs: int,
        outputs: int,
        *more: int,
    ) -> None:
        status = call(
            *pointers,
            ids.element_size(),
            _type(function, x),
            self._level,
            torch.get_num_threads(),
            ids.shape[0],
            experts,
            ids.shape[1],
            inputs,
            outputs,
            x.ndim == 3,
            *more,
        )
        if status:
            self._fail(function, status, experts)

    def _fail(self, function: str, status: int, experts: int) -> None:
        if status == BAD_ID:
            got = self._library.moeplan_bad_id()
            raise MoeplanError(f"{function}: ids: expected -1..{experts - 1}, got {got}")
        raise MoeplanError(f"{function}: out of memory for the kernel's scratch")


def _activation(activation: str) -> tuple[int, Any]:
    """Its number and a pointer to what it is given: slope, limit, shift."""
    kind, *numbers = parse_activation(activation)
    return _ACTIVATIONS[kind], ctypes.cast((ctypes.c_float * 3)(*numbers), ctypes.c_void_p)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _type(function: str, x: Tensor) -> int:
    try:
        return _TYPES[x.dtype]
    except KeyError:
        raise MoeplanError(f"{function}: x: expected one of {sorted(map(str, _TYPES))}, got {x.dtype}") from None


def _check_weights(function: str, **weights: Tensor) -> None:
    """Pointers know no strides, and copying a layer's experts at every call would go unseen."""
    for name, weight in weights.items():
        if not weight.is_contiguous():
            raise MoeplanError(f"{function}: {name}: expected contiguous, got strides {list(weight.stride())}")

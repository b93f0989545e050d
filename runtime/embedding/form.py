"""Experts modules of Transformers: which modules of a model they are, and how one keeps its weights.

Since version 5 the experts of a layer are one module, called with hidden states [T, D], expert ids [T, K] and gate
weights [T, K], that says how its tensors lie (``transformers.integrations.moe.use_experts_implementation``).

E experts, D model, F FFN columns, M matrices into the FFN (2 gated, 1 plain).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...spec.errors import MoeplanError
from .adapters import describe

ELSE = "`moeplan place`, `explain`, `compare` and `export` work for it"
DOOR = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What every experts module says about itself."""


class Form(NamedTuple):
    """How a module keeps its experts.

    wide: [E, M F, D], [E, D, M F] where transposed; down: [E, D, F], [E, F, D] where transposed; their biases
    [E, M F] and [E, D]. concatenated: gate, then up; else column by column (gate 0, up 0, gate 1, ...). post_norm: a
    norm follows every expert's output.
    """

    experts: int
    hidden: int
    ffn: int
    gated: bool
    bias: bool
    transposed: bool
    concatenated: bool
    post_norm: bool

    @property
    def matrices(self) -> int:
        return 2 if self.gated else 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the module's tensors: wide, down, and their biases where it has some."""
        wide = "gate_up_proj" if self.gated else "up_proj"
        return (wide, "down_proj", f"{wide}_bias", "down_proj_bias") if self.bias else (wide, "down_proj")

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the tensors, in the order of ``names``."""
        e, wide, d = self.experts, self.matrices * self.ffn, self.hidden
        both = ((e, d, wide), (e, self.ffn, d)) if self.transposed else ((e, wide, d), (e, d, self.ffn))
        return (*both, (e, wide), (e, d)) if self.bias else both


def experts_modules(net: nn.Module) -> dict[str, nn.Module]:
    """The experts modules of a model, by name, in the order of its layers.

    Raises MoeplanError, naming class and family, for a model that has none, or experts of another kind besides.
    """
    describe(net)
    found, others = {}, {}
    for name, module in net.named_modules():
        kind = type(module).__name__
        if is_experts(module):
            found[name] = module
        elif kind.endswith("Experts") and "Shared" not in kind:
            others[kind] = name
    family = getattr(getattr(net, "config", None), "model_type", type(net).__name__)
    if others:
        kind, name = next(iter(others.items()))
        raise MoeplanError(
            f"{family}: its experts ({kind}, {name}) are not called through Transformers' experts interface, so that "
            f"no plan can be applied; {ELSE}"
        )
    if not found:
        raise MoeplanError(f"{family}: the model has no experts: give a mixture-of-experts model")
    return found


def is_experts(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), bool) for name in DOOR)


def form_of(name: str, module: nn.Module) -> Form:
    """Raises MoeplanError, naming the module, for tensors that do not have the form that it says they have."""
    down = getattr(module, "down_proj", None)
    if not isinstance(down, Tensor) or down.dim() != 3:
        raise MoeplanError(f"{name}.down_proj: expected a tensor [experts, model, ffn], got {_shown(down)}; {ELSE}")
    said = {key: bool(getattr(module, key)) for key in DOOR}
    rows, columns = (down.shape[2], down.shape[1]) if said["is_transposed"] else (down.shape[1], down.shape[2])
    form = Form(
        experts=down.shape[0],
        hidden=rows,
        ffn=columns,
        gated=said["has_gate"],
        bias=said["has_bias"],
        transposed=said["is_transposed"],
        concatenated=said["is_concatenated"],
        post_norm=bool(getattr(module, "has_post_expert_norm", False)),
    )
    own = dict(module.named_parameters(recurse=False))
    for key, shape in zip(form.names, form.shapes(), strict=True):
        if key not in own or tuple(own[key].shape) != shape:
            raise MoeplanError(f"{name}.{key}: expected {list(shape)}, got {_shown(own.get(key))}; {ELSE}")
    for key, tensor in own.items():
        if key not in form.names:
            raise MoeplanError(f"{name}.{key}: moeplan does not know what this parameter is for; {ELSE}")
        check_tensor(f"{name}.{key}", tensor)
    return form


def check_tensor(name: str, tensor: Tensor) -> None:
    """Plain, present and not quantised."""
    if type(tensor.data) is not Tensor:
        kind = type(tensor.data).__name__
        raise MoeplanError(f"{name} is a {kind}: apply the plan to a model that is not yet split or wrapped")
    if tensor.is_meta:
        raise MoeplanError(f"{name} is on the meta device: load the model's weights first")
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise MoeplanError(f"{name} is {tensor.dtype}: load the model dequantised; {ELSE}")


def tensors_of(module: nn.Module, form: Form) -> Iterator[Tensor]:
    """The module's tensors in the order of ``Form.names``."""
    return (getattr(module, key) for key in form.names)


def _shown(tensor: object) -> str:
    return str(list(tensor.shape)) if isinstance(tensor, Tensor) else "none"

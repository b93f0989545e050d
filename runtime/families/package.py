"""Transformers, which is an extra of moeplan, and the experts of its models."""

from typing import Any

import torch
from torch import Tensor, nn

from ...spec.document import show
from ...spec.errors import MoeplanError

DOOR = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
"""What Transformers' experts interface puts on modules whose implementation can be chosen."""
CODE = ("auto_map", "attn_implementation", "experts_implementation", "use_kernels")
"""Fields of a configuration that name code, which a hub may have to be asked for; so do some that begin with "_"."""
FLOAT, FLOATS = "__float__", ("Infinity", "-Infinity", "NaN")
"""How Transformers writes numbers that JSON does not have: an object of this one field."""
WITHOUT_EXPERTS = "moeplan_without_experts"
"""Name of the implementation that computes nothing, so that a layer's other parts can be timed."""


def import_transformers(asked: str) -> Any:
    """The package, silenced; asked: what needs it, for the error."""
    try:
        import transformers
    except ImportError:
        raise MoeplanError(f"{asked} is computed by Transformers: pip install 'moeplan[hf]'") from None
    transformers.utils.logging.set_verbosity_error()
    return transformers


def through_the_door(experts: nn.Module) -> bool:
    """Whether Transformers lets its users choose how these experts are computed."""
    return all(hasattr(experts, name) for name in DOOR)


def without_experts(config: Any) -> None:
    """Have a configuration's experts give zeros, from now on."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(WITHOUT_EXPERTS, _nothing)
    config._experts_implementation = WITHOUT_EXPERTS


def _nothing(experts: nn.Module, hidden_states: Tensor, *routing: Tensor) -> Tensor:
    """[T, D] zeros in the place of [T, D] outputs."""
    return torch.zeros_like(hidden_states)


def configuration(transformers: Any, body: dict[str, Any], where: str) -> Any:
    """The configuration of a parsed ``config.json``; where: names it in errors. No code that comes with it is run."""
    family = body.get("model_type")
    if family not in transformers.CONFIG_MAPPING:
        raise MoeplanError(f"{where}: Transformers {transformers.__version__} does not know model_type {show(family)}")
    try:
        return transformers.AutoConfig.for_model(family, **own_fields(body))
    except Exception as error:
        raise MoeplanError(
            f"{where}: Transformers {transformers.__version__} refuses its configuration ({first_line(error)})"
        ) from None


def own_fields(body: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that are arguments of its class, but those that name code to fetch."""
    return {key: value for key, value in without_code(body).items() if key != "model_type"}


def without_code(body: dict[str, Any]) -> dict[str, Any]:
    """A configuration, its parts included, without fields that name code to fetch."""
    return {key: _plain(value) for key, value in body.items() if not str(key).startswith("_") and key not in CODE}


def _plain(value: Any) -> Any:
    """Infinity is written as an object, since JSON has none."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    if list(value) == [FLOAT] and value[FLOAT] in FLOATS:
        return float(value[FLOAT])
    return without_code(value)


def first_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]

"""Which of the kernels' activations a module computes: by its values, not by the name of its class.

A module has a function of its own between its matrices, often with numbers that its configuration sets (a limit, a
slope). The kernels' one counts as the same where it gives the same values from far below the clamps to far above.
"""

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..kernels.activation import ACTIVATIONS, activate, clamped
from .form import Form

TOLERANCE = 1e-5  # of float32: the exact and the approximated GELU differ by 1e-3
_found: "WeakKeyDictionary[nn.Module, str | None]" = WeakKeyDictionary()


def activation_of(module: nn.Module, form: Form) -> str | None:
    """The text of ``kernels.activation``; None where the kernels have none. Asked of a module once."""
    if module not in _found:
        _found[module] = _search(module, form)
    return _found[module]


def _search(module: nn.Module, form: Form) -> str | None:
    act = getattr(module, "act_fn", None)
    if isinstance(act, nn.Module) and any(True for _ in (*act.parameters(), *act.buffers())):
        return None  # learned: not a function of its input alone
    with torch.no_grad():
        probe = _probe(form.matrices)
        lying = probe if form.concatenated else probe.unflatten(1, (form.matrices, -1)).transpose(1, 2).flatten(1)
        try:
            wanted = module._apply_gate(lying) if form.gated else module.act_fn(lying)  # type: ignore[operator]
        except (RuntimeError, TypeError, AttributeError):
            return None  # it asks for more than its input
        if not isinstance(wanted, Tensor) or wanted.shape != (len(probe), probe.shape[1] // form.matrices):
            return None
        for text in _candidates(module, form):
            if torch.allclose(activate(probe, form.matrices, text), wanted.float(), rtol=TOLERANCE, atol=TOLERANCE):
                return text
    return None


def _candidates(module: nn.Module, form: Form) -> Iterator[str]:
    yield from ACTIVATIONS
    if not form.gated:
        return
    for limit in _numbers(module, ("limit", "swiglu_limit")):
        yield clamped(1.0, limit, 0.0)
        for slope in _numbers(module, ("alpha", "swiglu_alpha")):
            yield clamped(slope, limit, 1.0)


def _numbers(module: nn.Module, names: tuple[str, ...]) -> list[float]:
    values = (getattr(module, name, None) for name in names)
    return [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < 1e30]


def _probe(matrices: int) -> Tensor:
    """[n, M 64]: gates, and for each all ups: closer around 0, and far beyond any clamp in use."""
    far = torch.tensor([60.0, 100.0, 300.0, 1e3, 1e4])
    values = torch.cat([torch.linspace(-40, 40, 39), torch.linspace(-1.5, 1.5, 15), far, -far])
    ups = torch.stack([values.roll(i) for i in range(len(values))])
    return torch.cat([values.expand(len(values), -1), ups], 1) if matrices == 2 else ups

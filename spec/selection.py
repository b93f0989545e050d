"""Selection: batch-aware choice of experts in decoding steps, asked for by rule and number (Lynx, piggyback).

It changes the model's output, so that nothing but a user asks for it; the rules themselves are in
``runtime.selection``.
"""

import re
from typing import Literal

from pydantic import Field

from .document import Part, show
from .errors import MoeplanError
from .model import Model
from .workload import Workload

Rule = Literal["lynx", "piggyback"]
_FORM = re.compile(r"(lynx|piggyback):([0-9]{1,6})")


class Selection(Part):
    """``lynx``: the batch uses at most ``keep`` experts of a layer. ``piggyback``: every token keeps its first ``keep``
    experts, and takes others only where the batch uses them anyway."""

    rule: Rule
    keep: int = Field(ge=1)

    @classmethod
    def from_text(cls, text: str) -> "Selection":
        """``lynx:EXPERTS`` or ``piggyback:CHOICES``."""
        match = _FORM.fullmatch(text.strip())
        if not match or int(match[2]) < 1:
            raise MoeplanError(
                f"selection {show(text)}: expected lynx:EXPERTS (of a layer, for the batch) or piggyback:CHOICES "
                "(of a token, always kept), such as lynx:16 or piggyback:2"
            )
        return cls.model_validate({"rule": match[1], "keep": int(match[2])})

    def check(self, model: Model, workload: Workload) -> None:
        """Raise MoeplanError where this makes no sense for the model or the step."""
        if workload.phase != "decode":
            raise MoeplanError(
                f"selection {self}: only decoding steps select, the plan is for {workload}: solve for decode:SEQUENCES"
            )
        if not model.vocab_size:
            raise MoeplanError(f"selection {self}: {model.name} has no vocabulary whose distribution could be compared")
        for i in model.moe_layers:
            moe = model.layers[i].moe
            assert moe is not None
            if moe.zero_experts:
                raise MoeplanError(
                    f"selection {self}: layer {i} of {model.name} has identity experts, which cost nothing: only "
                    "models without them are selected for"
                )
            if self.rule == "lynx" and not moe.top_k <= self.keep <= moe.num_experts:
                raise MoeplanError(
                    f"selection {self}: layer {i} of {model.name} has {moe.num_experts} experts, of which a token "
                    f"uses {moe.top_k}: give lynx:{moe.top_k} to lynx:{moe.num_experts}"
                )
            if self.rule == "piggyback" and self.keep > moe.top_k:
                raise MoeplanError(
                    f"selection {self}: a token of layer {i} of {model.name} uses {moe.top_k} experts: give "
                    f"piggyback:1 to piggyback:{moe.top_k}"
                )

    def __str__(self) -> str:
        return f"{self.rule}:{self.keep}"

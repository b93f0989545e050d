"""Workload: what one step of the job looks like."""

import re
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from .document import Document, show
from .errors import MoeplanError

DEFAULT_PROMPT = 128
DEFAULT_CONTEXT = 512
MAX_TOKENS = 9_999_999
_FORM = re.compile(r"(prefill|decode):([0-9]+)(?:@([0-9]+))?")


class Workload(Document):
    """One step: ``tokens`` new tokens in ``sequences`` equal sequences, each with ``context`` tokens before them."""

    kind: ClassVar[str] = "moeplan.workload"

    phase: Literal["prefill", "decode"]
    tokens: int = Field(ge=1, le=MAX_TOKENS)
    sequences: int = Field(ge=1, le=MAX_TOKENS)
    context: int = Field(0, ge=0, le=MAX_TOKENS)

    @model_validator(mode="after")
    def _consistent(self) -> "Workload":
        if self.tokens % self.sequences:
            raise ValueError(f"tokens ({self.tokens}) must be a multiple of sequences ({self.sequences})")
        if self.phase == "decode" and self.tokens != self.sequences:
            raise ValueError("a decode step has one token per sequence")
        if self.phase == "prefill" and self.context:
            raise ValueError("a prefill step starts from an empty context")
        return self

    @property
    def length(self) -> int:
        """New tokens of each sequence."""
        return self.tokens // self.sequences

    @classmethod
    def from_text(cls, text: str) -> "Workload":
        """``prefill:TOKENS[@LENGTH]`` or ``decode:SEQUENCES[@CONTEXT]``.

        ``prefill:512`` is 512 tokens in prompts of 128 (``prefill:512@512`` is one prompt); ``decode:32@2048`` is one
        token for each of 32 sequences with 2,048 tokens of context.
        """
        match = _FORM.fullmatch(text.strip())
        if not match:
            raise MoeplanError(f"workload {show(text)}: expected prefill:TOKENS[@LENGTH] or decode:SEQUENCES[@CONTEXT]")
        if any(len(number.lstrip("0")) > len(str(MAX_TOKENS)) for number in match.groups("")[1:]):
            raise MoeplanError(f"workload {show(text)}: at most {MAX_TOKENS:,} tokens, sequences or context")
        phase, count, detail = match[1], int(match[2]), int(match[3]) if match[3] else None
        if count == 0 or (detail == 0 and phase == "prefill"):
            raise MoeplanError(f"workload {text!r}: tokens, sequences and length must be at least 1")
        if phase == "decode":
            context = DEFAULT_CONTEXT if detail is None else detail
            return cls(phase="decode", tokens=count, sequences=count, context=context)
        length = detail or min(DEFAULT_PROMPT, count)
        if count % length:
            raise MoeplanError(f"workload {text!r}: {count} tokens do not divide into prompts of {length} tokens")
        return cls(phase="prefill", tokens=count, sequences=count // length)

    def __str__(self) -> str:
        return f"{self.phase}:{self.tokens}@{self.context if self.phase == 'decode' else self.length}"

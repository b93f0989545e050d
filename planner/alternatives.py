"""What a search compares: one alternative and its predicted seconds."""

from typing import NamedTuple

from ..spec.plan import STRATEGIES, Candidate, Degrees, LayerPlan
from .step import Step


class Choice(NamedTuple):
    """One alternative and its predicted seconds, whether it fits or not; no plans where nothing fits."""

    candidate: Candidate
    step: Step
    plans: list[LayerPlan]
    seconds: float

    @classmethod
    def of(cls, name: str, step: Step, degree: int, plans: list[LayerPlan], seconds: float, reason: str) -> "Choice":
        """degree: consecutive devices that together hold all experts; reason: why it does not fit, "" if it does."""
        used = [plan.strategy for plan in plans]
        candidate = Candidate(
            name=name,
            degrees=Degrees(tensor=step.layout.tensor, data=step.layout.devices // step.layout.tensor, expert=degree),
            strategies={strategy: used.count(strategy) for strategy in STRATEGIES if strategy in used},
            tokens=step.layout.tokens,
            step_seconds=None if reason else seconds,
            reason=reason,
        )
        return cls(candidate, step, plans, seconds)


def keep(choices: list[Choice], choice: Choice) -> None:
    """Add it; of two of one name the faster stays, in the place of the first."""
    known = next((i for i, other in enumerate(choices) if other.candidate.name == choice.candidate.name), None)
    if known is None:
        choices.append(choice)
    elif choice.seconds < choices[known].seconds:
        choices[known] = choice

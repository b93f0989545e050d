"""Load: what else a machine did while something was measured on it."""

from collections.abc import Sequence

from pydantic import Field

from .document import Part

NOTABLE = 0.05  # of the processors' time: more of it with others is worth a note
COARSE = 0.1  # seconds of a processor that ticks of the kernel's clock and its own housekeeping may feign


class Load(Part):
    """What others took of the processors that a rank may use, over ``seconds``; of several ranks the worst.

    None where the system does not tell.
    """

    seconds: float = Field(ge=0, description="how long it was watched")
    foreign: float | None = Field(
        None, description="part of the processors' time that other programs had; none: unknown"
    )
    steal: float | None = Field(None, description="part that the hypervisor gave to other virtual machines")
    pressure: float | None = Field(None, description="part of the time in which something waited for a processor (PSI)")
    throttled: float | None = Field(None, description="part of the time in which a cgroup's quota held a rank back")
    missing: tuple[str, ...] = Field((), description="sources that this system does not have")

    @property
    def taken(self) -> float:
        """Part of the processors' time that the ranks could not have; what is unknown counts as nothing."""
        return (self.foreign or 0.0) + (self.steal or 0.0)

    @property
    def disturbed(self) -> bool:
        """Whether others took enough to be worth a note: more than a few percent, and than a short watch can tell."""
        return self.taken > NOTABLE + COARSE / max(self.seconds, COARSE)

    @property
    def takers(self) -> str:
        """Who had the processors, as text; empty where nobody is known to."""
        taken = {"other programs": self.foreign or 0.0, "other virtual machines": self.steal or 0.0}
        return ", ".join(f"{who} used {part:.0%} of the cores" for who, part in taken.items() if part >= 0.005)


def note(load: Load | None, when: str, again: str) -> tuple[str, ...]:
    """One line where others took a part worth a note, ``when`` it was, and what to do ``again``."""
    if load is None or not load.disturbed:
        return ()
    return (f"{load.takers} {when}; {again} again on an idle machine",)


def worst(loads: Sequence[Load]) -> Load:
    """The largest of each kind; ``missing`` names what any of them lacked."""

    def most(name: str) -> float | None:
        return max((value for load in loads if (value := getattr(load, name)) is not None), default=None)

    return Load(
        seconds=max(load.seconds for load in loads),
        foreign=most("foreign"),
        steal=most("steal"),
        pressure=most("pressure"),
        throttled=most("throttled"),
        missing=tuple(dict.fromkeys(name for load in loads for name in load.missing)),
    )

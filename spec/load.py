"""Load: what else a machine did while something was measured on it."""

from collections.abc import Sequence

from pydantic import Field

from .document import Part


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

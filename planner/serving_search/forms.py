"""Forms of a replica: degrees of one engine and the classes of devices that its stages stand on.

Stages of one replica have equal degrees, as engines demand; they may stand on different classes, each with its own
number of layers. Within a stage all GPUs are of one class: tensor parallelism waits for the slowest at every layer.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...spec.model import Model
from .classes import DeviceClass
from .rules import Shape, broken, shapes

STAGES = (1, 2, 4)  # of a replica on one class
MIXED_STAGES = (2, 3, 4)


@dataclass(frozen=True)
class Form:
    """shape: degrees; on: [S] number of the class of each stage."""

    shape: Shape
    on: tuple[int, ...]

    @property
    def mixed(self) -> bool:
        return len(set(self.on)) > 1

    @property
    def gpus(self) -> int:
        return self.shape.division.gpus * self.shape.pp

    def need(self, classes: int) -> list[int]:
        """[classes] GPUs of each."""
        stages = Counter(self.on)
        return [stages[c] * self.shape.division.gpus for c in range(classes)]


def forms(engine: str, model: Model, classes: Sequence[DeviceClass]) -> tuple[list[Form], Counter[str]]:
    """All that the engine accepts and the devices suffice for; and how many break which rule."""
    found, refused = list[Form](), Counter[str]()
    for form in _all(classes):
        reason = broken(engine, model, form.shape)
        if reason is None:
            found.append(form)
        else:
            refused[reason] += 1
    return found, refused


def _all(classes: Sequence[DeviceClass]) -> Iterator[Form]:
    for c, one in enumerate(classes):
        for shape in shapes(one.sizes(), max(STAGES)):
            inside = shape.division.tp <= one.per_host
            if inside and shape.pp in STAGES and shape.division.gpus * shape.pp <= one.gpus:
                yield Form(shape, (c,) * shape.pp)
    for a in range(len(classes)):
        for b in range(len(classes)):
            if a != b:
                yield from _mixed(classes, a, b)


def _mixed(classes: Sequence[DeviceClass], a: int, b: int) -> Iterator[Form]:
    """First stages on class a, last ones on class b."""
    common = tuple(sorted(set(classes[a].sizes()) & set(classes[b].sizes())))
    inside = tuple(size for size in common if size <= min(classes[a].per_host, classes[b].per_host))
    for shape in shapes(inside, 1):
        size = shape.division.gpus
        if shape.division.dp > 1:
            continue
        for stages in MIXED_STAGES:
            for first in range(1, stages):
                if first * size <= classes[a].gpus and (stages - first) * size <= classes[b].gpus:
                    yield Form(Shape(shape.division, stages), (a,) * first + (b,) * (stages - first))

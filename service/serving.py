"""``moeplan solve --workload serve:...``: how a model is served on GPUs of measured tables."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ..spec.catalogue import load_model
from ..spec.cluster import Cluster
from ..spec.errors import MoeplanError
from ..spec.quantities import parse_seconds
from ..spec.serving import ServingPlan
from ..spec.serving_load import parse_load
from .console import Event, note, out, print_json, progress, say


@dataclass(frozen=True)
class Serving:
    """The options of ``solve`` that only such a workload has, as they were given."""

    engine: str | None
    precision: str | None
    ttft: str | None
    tpot: str | None
    fewest: bool
    apart: bool | None
    tables: Path | None
    picture: Path | None

    def check_unused(self) -> None:
        """Raises MoeplanError where one was given without such a workload."""
        for name, value in vars(self).items():
            if value is not None and value is not False:
                option = "apart or --together" if name == "apart" else name
                raise MoeplanError(f"--{option} goes with a workload serve:..., leave it out")

    def solve(self, model: str, cluster: Path, workload: str, output: Path, as_json: bool, others: list[str]) -> None:
        """Plan, write, print. others: options that were given and say nothing here."""
        if others:
            raise MoeplanError(f"{others[0]} says nothing of a workload serve:..., leave it out")
        with progress("solving") as show:
            plan = self.plan(model, Cluster.read(cluster), workload, show)
        plan.write(output)
        if self.picture:
            from .pages.serving_picture import draw

            draw(plan, self.picture)
        if as_json:
            print_json(plan.model_dump(mode="json"))
            return
        from .pages.serving import page

        out.print(page(plan))
        for known in plan.notes:
            note(known)
        if self.picture:
            say(f"wrote {self.picture}")
        say(f"wrote {output}; `moeplan explain {output}` says why, `moeplan export {output}` starts it")

    def plan(self, model: str, cluster: Cluster, workload: str, show: Callable[[Event], None]) -> ServingPlan:
        """The plan. Raises MoeplanError."""
        from ..planner.serving_search.plan import plan_serving
        from ..planner.serving_search.precision import Precision, in_precision, precision_of
        from ..planner.serving_search.search import Limits
        from ..planner.serving_search.times import predictor_of
        from .tabled import tables_of

        load = parse_load(workload)
        named = load_model(model)
        if self.precision is not None and self.precision not in get_args(Precision):
            raise MoeplanError(f"--precision {self.precision!r}: expected one of {', '.join(get_args(Precision))}")
        precision: Precision | None = self.precision  # type: ignore[assignment]
        limits = Limits(
            parse_seconds(self.ttft, "--ttft") if self.ttft else None,
            parse_seconds(self.tpot, "--tpot") if self.tpot else None,
            self.fewest,
        )
        source = tables_of(self.tables)
        served = in_precision(named, precision)
        return plan_serving(
            named,
            cluster,
            load,
            predictor_of(source.tables, source.name, served, precision or precision_of(named), load),
            asked=model,
            engine=self.engine,
            precision=precision,
            limits=limits,
            apart=self.apart,
            progress=show,
        )

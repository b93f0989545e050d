"""How long the search for how to serve takes, and what unequal treatment of mixed GPUs is predicted to gain.

python -m moeplan.benchmarks.serving_search             10,000 GPUs of two types, three engines
python -m moeplan.benchmarks.serving_search --mixed     H100 with L40S, H100 with H200: against simpler choices
"""

import argparse
import time

from moeplan.benchmarks.hardware import processor
from moeplan.planner.described import cluster_of
from moeplan.planner.serving_search.engines import FACTS
from moeplan.planner.serving_search.plan import plan_serving
from moeplan.planner.serving_search.precision import precision_of
from moeplan.planner.serving_search.times import predictor_of
from moeplan.service.tabled import tables_of
from moeplan.spec.catalogue import load_model
from moeplan.spec.described import Described, parse_device
from moeplan.spec.serving import ServingPlan
from moeplan.spec.serving_load import parse_load

LARGE = ("h100_sxm:1000x8", "l40s:250x8")
MIXED = (("h100_sxm:1x8", "l40s:1x8"), ("h100_sxm:1x8", "h200_sxm:1x8"), ("h100_sxm:1x2", "l40s:1x2"))


def solve(model: str, devices: tuple[str, ...], load: str, engine: str | None, apart: bool | None) -> ServingPlan:
    """One plan, with the tables opened anew."""
    source = tables_of(None)
    described = Described(devices=tuple(parse_device(text) for text in devices))
    cluster = cluster_of(described, source.tables.system, source.name, "benchmark")
    named, parsed = load_model(model), parse_load(load)
    predictor = predictor_of(source.tables, source.name, named, precision_of(named), parsed)
    return plan_serving(named, cluster, parsed, predictor, asked=model, engine=engine, apart=apart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mixed", action="store_true", help="the mixed clusters instead of the large one")
    parser.add_argument("--model", default="gpt-oss-120b")
    parser.add_argument("--load", default="serve:isl=1024,osl=512")
    args = parser.parse_args()
    print(f"{processor()}; {args.model}, {args.load}\n")
    if args.mixed:
        print("| GPUs | engine | plan tokens/s | fast half only | all alike | layers of mixed pipelines |")
        print("|---|---|--:|--:|--:|---|")
        for devices in MIXED:
            print(mixed_row(args.model, devices, args.load))
        return
    print("| GPUs | engines | forms | offers | tokens/s | gap | seconds |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    start = time.perf_counter()
    plan = solve(args.model, LARGE, args.load, None, None)
    seconds, s = time.perf_counter() - start, plan.solver
    gap = abs(s.bound - s.objective) / s.objective
    print(
        f"| {plan.gpus_there:,} | {len(FACTS)} | {s.forms} of {plan.engine} | {s.offers:,} | "
        f"{plan.predicted.tokens_per_s:,.0f} | {gap:.2%} | {seconds:.1f} |"
    )


def mixed_row(model: str, devices: tuple[str, ...], load: str) -> str:
    plan = solve(model, devices, load, None, False)
    tokens = plan.predicted.tokens_per_s
    by_name = {b.name: b.tokens_per_s for b in plan.baselines}
    alone = max((v for name, v in by_name.items() if name.startswith("only")), default=0.0)
    alike = by_name.get("all devices treated alike", 0.0)
    gains = [f"{value:,.0f} (x {tokens / value:.2f})" if value else "none fits" for value in (alone, alike)]
    mixed = [r for r in plan.replicas if len({s.kind for s in r.stages}) > 1]
    uneven = "; ".join(" + ".join(str(s.layers) for s in r.stages) for r in mixed)
    return f"| {' + '.join(devices)} | {plan.engine} | {tokens:,.0f} | {' | '.join(gains)} | {uneven or 'none'} |"


if __name__ == "__main__":
    main()

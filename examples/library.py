"""moeplan from Python: place experts by a recorded trace, then measure, solve and run the tiny example's model.

python examples/library.py              the placement alone, in about ten seconds
python examples/library.py --measure    the whole loop on this machine, in about two minutes
"""

import argparse
from pathlib import Path

from moeplan import Trace, place, profile, run, solve

TRACE = Path(__file__).parent / "tiny_moe" / "trace.npz"


def main() -> None:
    """Prints tables; writes nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure this machine, solve and run there")
    options = parser.parse_args()

    trace = Trace.read(TRACE)
    print(f"{trace.tokens} tokens, {trace.layers} layers of {trace.num_experts} experts, top-{trace.top_k}\n")
    placement = place(trace, devices=4, hosts=2, fit=(0, 0.5), time_limit=5)
    print(placement.scores_frame()[["balance_mean", "boundary_cross_device", "boundary_cross_host"]].round(3))
    if not options.measure:
        return

    cluster = profile("tiny-moe", ranks=2, budget_seconds=30)
    plan = solve("tiny-moe", cluster, "prefill:2048", trace, time_limit=20)
    print(plan.candidates_frame()[["name", "step_seconds"]].head())
    report = run(plan, trace=trace, tolerance=1.0)
    print(report.parts_frame().groupby("part")[["predicted", "measured"]].sum().round(4))
    print(f"step: predicted {plan.predicted.step_seconds:.4f} s, measured {report.step.measured:.4f} s")


if __name__ == "__main__":
    main()

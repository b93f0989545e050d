"""Stage 5: ``moeplan solve`` and ``moeplan run`` on what was profiled: one device, prefill and decode at the model's
true dimensions; output against the plain reference, prediction against measurement."""

from collections.abc import Iterator

from moeplan.benchmarks.gpu.profiling import model_of
from moeplan.benchmarks.gpu.stage import FAILED, TOLD, Row, Settings, judged, last_line, moeplan
from moeplan.spec import Report

STAGE = "running"
WORKLOADS = {"prefill": "prefill:2048", "decode": "decode:64@1024"}
DRY_WORKLOADS = {"decode": "decode:4@128"}
NEAR = 0.15  # |predicted / measured - 1|


def rows(settings: Settings) -> Iterator[Row]:
    for name, workload in (DRY_WORKLOADS if settings.dry else WORKLOADS).items():
        yield from solve_and_run(settings, STAGE, name, workload)


def solve_and_run(settings: Settings, stage: str, name: str, workload: str, *options: str) -> Iterator[Row]:
    """options: more of ``solve``."""
    plan, output = settings.folder / f"plan-{name}.json", settings.folder / f"report-{name}.json"
    cluster = settings.folder / "cluster.json"
    found = moeplan(
        *("solve", "--model", model_of(settings), "--cluster", str(cluster), "--workload", workload, *options),
        *("--time-limit", "20", "--output", str(plan)),
    )
    if found.returncode:
        yield Row(stage, f"solve {workload}", last_line(found.stdout), "exit code 0", FAILED)
        return
    # The tolerance is judged here; exit code 1 says that something is beyond it, and the report is there all the same.
    repetitions = "2" if settings.dry else "20"
    arguments = ("--repetitions", repetitions, "--tolerance", str(NEAR), "--timeout", "120", "--output", str(output))
    found = moeplan("run", str(plan), *arguments)
    if found.returncode not in (0, 1) or not output.exists():
        yield Row(stage, f"run {workload}", last_line(found.stdout), "exit code 0 or 1", FAILED)
        return
    yield from told(Report.read(output), stage, workload, settings)


def told(report: Report, stage: str, workload: str, settings: Settings) -> Iterator[Row]:
    step, check = report.step, report.check
    figure = f"{1e3 * step.predicted:.4g} ms, {1e3 * step.measured:.4g} ms, {step.error:+.1%}, spread {step.spread:.0%}"
    good = TOLD if settings.dry else judged(abs(step.error) <= NEAR)
    yield Row(stage, f"{workload}: predicted, measured", figure, "within 15 %", good)
    if check is None:
        yield Row(stage, f"{workload}: output", "not checked", "", FAILED)
    else:
        figure = f"{check.relative_error:.1e} after {check.layers} layers"
        yield Row(
            stage, f"{workload}: output, of the reference", figure, f"<= {check.tolerance:g}", judged(check.passed)
        )
    parts = dict.fromkeys(part.part for part in report.parts)
    for part in parts:
        mine = [p for p in report.parts if p.part == part]
        predicted, measured = (1e3 * sum(getattr(p, field) for p in mine) for field in ("predicted", "measured"))
        yield Row(stage, f"{workload}: {part}", f"{predicted:.4g} ms, {measured:.4g} ms", detail=True)

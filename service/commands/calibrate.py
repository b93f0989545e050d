"""``moeplan calibrate``: predictions corrected by a few measurements of the user's own."""

from pathlib import Path
from typing import Annotated

import typer

from ...planner.calibrate.calibrate import calibrate as corrected_by
from ...planner.calibrate.of_plan import of_plan, of_serving_plan
from ...spec.calibration import Calibration, ServedTimes
from ...spec.claims import replacing
from ...spec.document import parse_object, read_text
from ...spec.errors import MoeplanError
from ...spec.output import write_atomically
from ...spec.plan import Plan
from ...spec.serving import ServingPlan
from ..console import note, out, print_json, say
from ..options import output_option
from ..pages.calibration import factors_text, points_table

FEW = 4  # points; what more of them bring is little


def calibrate(
    predictions: Annotated[
        Path, typer.Argument(help="CSV with columns isl, osl, concurrency, ttft_ms, tpot_ms; or a plan of `solve`.")
    ],
    measured: Annotated[
        list[Path] | None,
        typer.Option(
            help="Your own points, as often as there are files: of `vllm bench serve --save-result`, SGLang's "
            "bench_serving, genai-perf, or a CSV with these columns."
        ),
    ] = None,
    use: Annotated[
        Path | None, typer.Option(help="Apply this correction, which `calibrate` wrote, in place of making one.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests in flight, where a measured file does not tell.")
    ] = None,
    corrected: Annotated[
        Path | None, output_option("Write the predictions, corrected, as CSV with these columns.", "--corrected")
    ] = None,
    output: Annotated[Path, output_option("The correction.")] = Path("calibration.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the correction as JSON instead of tables.")] = False,
) -> None:
    """Correct predicted times of a served model by one to four measurements of your own.

    Example: `moeplan calibrate predicted.csv --measured bench.json --corrected corrected.csv`

    With a correction that was made: `moeplan calibrate others.csv --use calibration.json --corrected corrected.csv`
    """
    if use is not None:
        _apply(use, predictions, measured, corrected)
        return
    if not measured:
        raise MoeplanError("give your own measurements with --measured, or a correction that is made with --use")
    from ...profiler.serving_results import read_served

    points = [point for path in measured for point in read_served(path, concurrency)]
    predicted, source = _predictions(predictions, points)
    found = corrected_by(predicted, points, source=source)
    found.write(output)
    if corrected is not None:
        _write_csv(corrected, [found.corrected(times) for times in predicted])
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    out.print(points_table(found))
    out.print(factors_text(found), soft_wrap=True)
    if found.skipped:
        note(f"{found.skipped} of {len(points)} measurements are of loads that are not predicted, and were left out")
    if len(found.points) == 1:
        note("with one point nothing can be left out: the error after the correction is not known; measure a second")
    elif len(found.points) > FEW:
        note(f"{len(found.points)} points: three factors are no better known by more than about {FEW}")
    say(f"wrote {output}" + (f" and {corrected}" if corrected else ""))


def _apply(use: Path, predictions: Path, measured: list[Path] | None, corrected: Path | None) -> None:
    if measured or corrected is None:
        raise MoeplanError("--use goes with --corrected, where the result is written, and without --measured")
    with replacing(use):  # by default the output has its name, and nothing is written there
        known = Calibration.read(use)
    from ...profiler.serving_results import read_served

    _write_csv(corrected, [known.corrected(times) for times in read_served(predictions)])
    say(f"wrote {corrected}")


def _predictions(path: Path, measurements: list[ServedTimes]) -> tuple[list[ServedTimes], str]:
    """Those of a CSV, or of a plan, and what names them."""
    text = read_text(path, Plan.hint())
    if text.lstrip()[:1] != "{":
        from ...profiler.serving_results import read_served

        return read_served(path), str(path)
    if parse_object(text, str(path)).get("kind") == ServingPlan.kind:
        served = ServingPlan.parse(text, str(path))
        return [of_serving_plan(served)], f"{path} ({served.digest()})"
    plan = Plan.parse(text, str(path))
    return of_plan(plan, measurements), f"{path} ({plan.digest()})"


def _write_csv(path: Path, rows: list[ServedTimes]) -> None:
    from ...profiler.serving_results import COLUMNS

    lines = [",".join(COLUMNS)]
    for times in rows:
        cells = (getattr(times, name) for name in COLUMNS)
        lines.append(",".join(_cell(cell) for cell in cells))
    text = ("\n".join(lines) + "\n").encode()
    write_atomically(path, lambda file: file.write(text))


def _cell(value: float | int | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.6g}"

"""The picture of a ServingPlan: TPOT along, tokens per second and GPU up, for the replicas of the front."""

from pathlib import Path

from ...spec.picture import plain, save_picture
from ...spec.serving import ServingPlan
from .serving import TITLES, degrees

COLOURS = ("#1f4e79", "#c0722c", "#3c7a3c", "#7a3c6e", "#6b6b6b")


def draw(plan: ServingPlan, path: Path) -> None:
    """Points by the kinds that they stand on; the plan's own replicas as stars."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    points = plan.front
    axes.plot([p.each.tpot_s * 1e3 for p in points], [p.each.tokens_per_s_per_gpu for p in points], color="#bbbbbb")
    groups = dict.fromkeys(" + ".join(dict.fromkeys(p.kinds)) for p in points)
    for colour, group in zip(COLOURS * len(groups), groups, strict=False):
        mine = [p for p in points if " + ".join(dict.fromkeys(p.kinds)) == group]
        at = [p.each.tpot_s * 1e3 for p in mine], [p.each.tokens_per_s_per_gpu for p in mine]
        axes.plot(*at, "o", color=colour, markersize=5, label=plain(group))
    chosen = [r for r in plan.replicas if r.role == "both"]
    if chosen:
        at = [r.each.tpot_s * 1e3 for r in chosen], [r.each.tokens_per_s_per_gpu for r in chosen]
        axes.plot(*at, "*", color="black", markersize=13, label="in the plan", linestyle="none")
    for i in (0, len(points) // 2, len(points) - 1) if points else ():
        p = points[i]
        text = f"{TITLES[p.engine]}: {degrees(p.degrees)}, {p.concurrency}"
        at_point = (p.each.tpot_s * 1e3, p.each.tokens_per_s_per_gpu)
        axes.annotate(plain(text), at_point, xytext=(6, -10), textcoords="offset points", fontsize=8)
    if plan.tpot_limit_s:
        axes.axvline(plan.tpot_limit_s * 1e3, color="#a33", linestyle=":", label="limit")
    axes.set_xscale("log")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis(FormatStrFormatter("%.3g"))
    axes.set_xlabel("TPOT, ms between output tokens")
    axes.set_ylabel("output tokens per second and GPU")
    axes.set_title(plain(f"{plan.model} in {plan.precision}, {plan.load}"), fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    save_picture(figure, path)

"""Figures of a run, as SVG or PNG.

Matplotlib is imported where a figure is drawn, and only its object interface is used: no window, no state of its own.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from hftcli.comparing.comparison import Comparison
from hftcli.comparing.forgetting import ForgettingMatrix, compute_metrics
from hftcli.comparing.points import Point
from hftcli.comparing.statistics import Estimate
from hftcli.errors import InputError
from hftcli.reporting.headline import list_trained
from hftcli.runs.files import write_bytes
from hftcli.runs.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FORMATS = (".svg", ".png")
# Each scale runs from light to less light in one hue, so that it reads with every kind of colour vision and in grey, and black
# numbers stand out on all of it.
SEEN, UNSEEN = ("#eef5fc", "#4292c6"), ("#f8f8f8", "#cccccc")
# Okabe and Ito's, which differ for every kind of colour vision; markers tell methods apart in grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, PAPER, MUTED, OUTLINE = "#000000", "#ffffff", "#555555", "#d55e00"


def check_figure_path(path: Path) -> None:
    """Raises: InputError: no format that figures are written in."""
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: a figure ends in {' or '.join(FORMATS)}, got '{path.suffix}'")


def draw_matrix(matrix: ForgettingMatrix, path: Path) -> None:
    """The forgetting matrix as a heat map in points: a row per model, a column per task.

    The score right after a task's own round is outlined, scores before it are grey, and what was not measured is left blank.

    Raises:
        InputError: see check_figure_path.
    """
    check_figure_path(path)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    num_rows, num_tasks = len(matrix.tasks) + 1, len(matrix.tasks)
    seen, unseen = (LinearSegmentedColormap.from_list("scores", colours) for colours in (SEEN, UNSEEN))
    figure = Figure(figsize=(2.4 + 0.72 * num_tasks, 1.9 + 0.44 * num_rows), layout="constrained", facecolor=PAPER)
    axes = figure.add_subplot()
    for t, row in enumerate(matrix.scores):
        for i, score in enumerate(row):
            if score is None:
                continue
            fill = (seen if t > i else unseen)(score)
            axes.add_patch(Rectangle((i - 0.5, t - 0.5), 1, 1, facecolor=fill, edgecolor=PAPER, linewidth=1))
            axes.text(
                i, t, f"{100 * score:.1f}", ha="center", va="center_baseline", fontsize=9, color=INK,
                fontweight="bold" if t == i + 1 else "normal",
            )  # fmt: skip
    for i in range(matrix.num_rounds):
        axes.add_patch(Rectangle((i - 0.47, i + 0.53), 0.94, 0.94, fill=False, edgecolor=OUTLINE, linewidth=2, zorder=3))
    axes.set_xlim(-0.5, num_tasks - 0.5)
    axes.set_ylim(num_rows - 0.5, -0.5)
    axes.set_xticks(range(num_tasks), matrix.tasks, rotation=35, ha="left", rotation_mode="anchor")
    axes.set_yticks(range(num_rows), ("base", *(f"after {task}" for task in matrix.tasks)))
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.axhline(0.5, color=INK, linewidth=0.8)
    scale = ScalarMappable(Normalize(0, 100), seen)
    bar = figure.colorbar(scale, ax=axes, fraction=0.04, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=9)
    bar.set_label("points", fontsize=9)
    figure.supxlabel(_describe(matrix), fontsize=9, color=MUTED)
    _save(figure, path)


def draw_frontier(comparison: Comparison, path: Path) -> None:
    """Learning against forgetting: a dot per run, a mean with its intervals per setting, a line per frontier.

    Raises:
        InputError: see check_figure_path.
    """
    check_figure_path(path)
    _save(_lay_frontier(comparison), path)


def render_frontier(comparison: Comparison) -> bytes:
    """The figure of `draw_frontier` as SVG."""
    return _render(_lay_frontier(comparison), ".svg")


def _lay_frontier(comparison: Comparison) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.0), layout="constrained", facecolor=PAPER)
    axes = figure.add_subplot()
    unit = comparison.unit
    for index, method in enumerate(comparison.methods):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        runs = [point for setting in method.settings for point in setting.points]
        learning, forgetting = ([unit.factor * value for value in values] for values in zip(*map(_place, runs), strict=True))
        axes.scatter(learning, forgetting, s=14, color=colour, marker=marker, alpha=0.35, linewidth=0)
        means = [(unit.factor * setting.learning.mean, unit.factor * setting.forgetting.mean) for setting in method.settings]
        for setting, (x, y) in zip(method.settings, means, strict=True):
            widths = [_measure_arms(estimate, unit.factor) for estimate in (setting.learning, setting.forgetting)]
            axes.errorbar(
                x, y, xerr=widths[0], yerr=widths[1], color=colour, marker=marker, markersize=7, linewidth=0,
                elinewidth=0.8, alpha=0.8,
            )  # fmt: skip
        line = [means[place] for place in method.frontier]
        axes.plot(*zip(*line, strict=True), color=colour, marker=marker, markersize=7, linewidth=1.6, label=method.name)
    axes.set_xlabel(f"learning: gain on what was trained, {unit.name}", fontsize=10)
    axes.set_ylabel(f"forgetting: loss of what was known, {unit.name}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=UNSEEN[1], linewidth=0.5)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9, loc="best")
    figure.supxlabel(
        "small: runs; large: means over seeds with 95 % intervals; lines: frontiers. Better is right and down.",
        fontsize=9, color=MUTED,
    )  # fmt: skip
    return figure


def draw_run(run: Run, path: Path) -> None:
    """What a run of one round learned and forgot: each task before and after, and the loss over the steps.

    Raises:
        InputError: see check_figure_path.
    """
    check_figure_path(path)
    from matplotlib.figure import Figure

    (round_,) = run.rounds
    scores, trained_on = round_.read_scores(), list_trained([round_])
    tasks = [
        (name, before.score, after.score)
        for name, before in scores.before.items()
        if before.score is not None and (after := scores.after.get(name)) is not None and after.score is not None
    ]
    metrics = round_.read_metrics() if round_.metrics_path.exists() else []
    losses = [(row["step"], row["loss"]) for row in metrics if "loss" in row]
    figure = Figure(figsize=(9.0, 1.9 + 0.34 * max(len(tasks), 3)), layout="constrained", facecolor=PAPER)
    known, trained = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, (name, first, last) in enumerate(tasks):
        colour = COLOURS[0] if name in trained_on else COLOURS[1]
        known.plot([100 * first, 100 * last], [place, place], color=colour, linewidth=1.5)
        known.plot(100 * first, place, "o", color=PAPER, markeredgecolor=colour, markersize=7)
        known.plot(100 * last, place, "o", color=colour, markersize=7)
    known.set_yticks(range(len(tasks)), [Path(name).name if name.endswith(".jsonl") else name for name, _, _ in tasks])
    known.set_ylim(len(tasks) - 0.5, -0.5)
    known.set_xlim(-3, 103)
    known.set_xlabel("points; hollow before, filled after; blue: trained on", fontsize=9)
    if losses:
        trained.plot(*zip(*losses, strict=True), color=COLOURS[0], linewidth=1.2)
    trained.set_xlabel("optimizer steps", fontsize=9)
    trained.set_ylabel("loss", fontsize=9)
    for axes in (known, trained):
        axes.tick_params(labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=UNSEEN[1], linewidth=0.5)
        axes.set_axisbelow(True)
    _save(figure, path)


def _place(point: Point) -> tuple[float, float]:
    return point.learning, point.forgetting


def _measure_arms(estimate: Estimate, factor: float) -> list[list[float]] | None:
    if estimate.interval is None:
        return None
    low, high = estimate.interval
    return [[factor * (estimate.mean - low)], [factor * (high - estimate.mean)]]


def _render(figure: "Figure", suffix: str) -> bytes:
    from matplotlib import rc_context

    image = io.BytesIO()
    # Text stays text, and the same matrix gives the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hft"}):
        metadata = {"Date": None} if suffix == ".svg" else {}
        figure.savefig(image, format=suffix[1:], dpi=150, metadata=metadata)
    return image.getvalue()


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, _render(figure, path.suffix))


def _describe(matrix: ForgettingMatrix) -> str:
    metrics = compute_metrics(matrix.tasks, matrix.scores)
    named = (("OP", metrics.op, ".1f"), ("BWT", metrics.bwt, "+z.1f"), ("forgetting", metrics.forgetting, "+z.1f"))
    numbers = "   ".join(f"{name} {100 * value:{form}}" for name, value, form in named if value is not None)
    return f"{numbers}\noutlined: right after its own round; grey: before it".lstrip()

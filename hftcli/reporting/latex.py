"""The tables of runs as LaTeX, with booktabs: scores before and after, the forgetting matrix with its metrics, several runs."""

from collections.abc import Sequence
from pathlib import Path

from hftcli.comparing.forgetting import ForgettingMatrix, compute_metrics, read_matrix
from hftcli.comparing.statistics import POINTS
from hftcli.reporting.headline import describe_start, list_changes
from hftcli.runs.run import Run, find_rounds

ESCAPES = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def escape(text: str) -> str:
    """Text as LaTeX prints it; numbers get their minus."""
    return "".join(ESCAPES.get(sign, sign) for sign in text)


def make_tables(places: Sequence[Path]) -> str:
    """The tables of runs, or of matrix files.

    Raises:
        InputError: one is neither, or none of its rounds is finished.
    """
    tables = []
    for place in places:
        run = Run(place)
        if run.recipe_path.exists() and not run.matrix_path.exists():
            find_rounds(place)
            tables.append(make_change_table(run))
        else:
            tables.append(make_matrix_table(read_matrix(place), place.resolve().name))
    return "% needs \\usepackage{booktabs}\n" + "\n\n".join(tables)


def make_change_table(run: Run) -> str:
    """Scores before and after, with the interval of the change."""
    rows = [
        (escape(change.task), change.before, change.after, _sign(change.change.removesuffix(" points")), _sign(change.interval))
        for change in list_changes(run)
    ]
    name = escape(run.folder.resolve().name)
    caption = f"{name}: scores in points, or in nats per token where a cell says so, before and after training; "
    if start := describe_start(run):
        caption += f"before: {start}; "
    caption += "95\\,\\% intervals over the questions."
    return _lay_out("lrrrr", ("task", "before", "after", "change", "95\\,\\% interval"), rows, caption)


def make_matrix_table(matrix: ForgettingMatrix, name: str) -> str:
    """A row per model, a column per task; below it the metrics."""
    columns = (*matrix.tasks, *matrix.general)
    general = tuple(matrix.general.values())
    rows = []
    for place, (row, label) in enumerate(zip(matrix.scores, matrix.row_names, strict=True)):
        shown = [POINTS.show(value) for value in (*row, *(column[place] for column in general))]
        if place:
            shown[place - 1] = f"\\textbf{{{shown[place - 1]}}}"
        rows.append((escape(label if place == 0 else f"after {label}"), *shown))
    found = compute_metrics(matrix.tasks, matrix.scores)
    kinds = (("OP", found.op, False), ("BWT", found.bwt, True), ("forgetting", found.forgetting, True))
    numbers = ", ".join(f"{name} {_sign(POINTS.show(value, signed))}" for name, value, signed in kinds if value is not None)
    caption = f"{escape(name)}: scores in points after each round, right after a task's own in bold. {numbers}."
    return _lay_out("l" + "r" * len(columns), ("model", *map(escape, columns)), rows, caption)


def _sign(text: str) -> str:
    """Numbers with a minus that is one."""
    return text.replace("-", "$-$").replace("+", "$+$")


def _lay_out(form: str, heading: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    lines = [" & ".join(row) + r" \\" for row in rows]
    return "\n".join(
        [
            r"\begin{table}", r"  \centering", f"  \\caption{{{caption}}}", f"  \\begin{{tabular}}{{{form}}}", r"    \toprule",
            f"    {' & '.join(heading)} \\\\", r"    \midrule", *(f"    {line}" for line in lines), r"    \bottomrule",
            r"  \end{tabular}", r"\end{table}",
        ]
    )  # fmt: skip

"""The figure shows every number of the matrix, readably."""

import re
import struct

import pytest
from matplotlib.colors import LinearSegmentedColormap
from reporting.contrast import compute_luminance
from written_runs import FACTS, SKILL, complete_round, write_run

from hftcli.comparing.forgetting import ForgettingMatrix
from hftcli.errors import InputError
from hftcli.reporting.figures import INK, SEEN, UNSEEN, draw_matrix, draw_run
from hftcli.runs.run import Run


def make_matrix(num_tasks: int, num_rows: int | None = None) -> ForgettingMatrix:
    rows = [[(t * num_tasks + i) / 1000 for i in range(num_tasks)] for t in range(num_rows or num_tasks + 1)]
    rows[0][0] = None
    return ForgettingMatrix(tasks=[f"task {i}" for i in range(num_tasks)], scores=rows)


def read_texts(path) -> list[str]:
    return re.findall(r"<text[^>]*>(.*?)</text>", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("num_tasks", [2, 15])
def test_svg_holds_every_name_and_number(tmp_path, num_tasks):
    matrix, path = make_matrix(num_tasks), tmp_path / "figures" / "matrix.svg"
    draw_matrix(matrix, path)
    texts = read_texts(path)
    assert {"base", *matrix.tasks, *(f"after {task}" for task in matrix.tasks)} <= set(texts)
    numbers = [f"{100 * score:.1f}" for row in matrix.scores for score in row if score is not None]
    assert set(numbers) <= set(texts)
    assert [file.name for file in path.parent.iterdir()] == ["matrix.svg"]


def test_the_same_matrix_gives_the_same_file(tmp_path):
    for name in ("one.svg", "two.svg"):
        draw_matrix(make_matrix(2), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_png_of_a_run_in_progress(tmp_path):
    path = tmp_path / "matrix.png"
    draw_matrix(make_matrix(3, num_rows=2), path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > height > 200


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"ends in .svg or .png, got '.jpg'"):
        draw_matrix(make_matrix(2), tmp_path / "matrix.jpg")
    assert not list(tmp_path.iterdir())


def test_every_number_has_the_contrast_that_wcag_asks_for():
    """At least 4.5 : 1 (WCAG 2.2, 1.4.3) on every colour of both scales, which grow darker with the score."""
    for colours in (SEEN, UNSEEN):
        scale = LinearSegmentedColormap.from_list("scores", colours)
        fills = [compute_luminance(scale(points / 100)[:3]) for points in range(101)]
        assert min(fills) + 0.05 >= 4.5 * (compute_luminance(INK) + 0.05)
        assert fills == sorted(fills, reverse=True)


def test_a_run_of_one_round_has_a_figure_of_its_own(tmp_path):
    run = Run(write_run(tmp_path / "run"))
    complete_round(run, 0)
    draw_run(run, tmp_path / "run.svg")
    assert {FACTS, SKILL, "optimizer steps", "loss"} <= set(read_texts(tmp_path / "run.svg"))
    draw_run(run, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")

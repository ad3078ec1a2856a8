"""The matrix and its metrics: by hand, against published tables, and where something is missing."""

import numpy as np
import pytest
from comparing.matrices import ROWS, TASKS, make_rows, name_tasks, write
from pydantic import ValidationError

from hftcli.comparing.forgetting import ForgettingMatrix, compute_metrics, read_matrix
from hftcli.errors import InputError
from hftcli.runs.files import write_model
from hftcli.runs.run import Run

# TRACE's eight tasks in order 1: C-STANCE FOMC MeetingBank Py150 ScienceQA NumGLUE-cm NumGLUE-ds 20Minuten
DIAGONALS = {
    "7B SeqFT": (0.5, 0.735, 0.523, 0.58, 0.764, 0.383, 0.582, 0.408),
    "13B SeqFT": (0.469, 0.754, 0.533, 0.568, 0.8, 0.333, 0.618, 0.408),
    "7B LoRA": (0.511, 0.713, 0.51, 0.578, 0.68, 0.37, 0.486, 0.37),
}
FINALS = {
    "7B SeqFT": (0.454, 0.609, 0.457, 0.512, 0.637, 0.272, 0.548, 0.408),
    "13B SeqFT": (0.5, 0.717, 0.351, 0.547, 0.55, 0.296, 0.622, 0.408),
    "7B LoRA": (0.277, 0.24, 0.121, 0.004, 0.0, 0.0, 0.0, 0.37),
    "13B LoRA": (0.124, 0.0, 0.122, 0.249, 0.68, 0.259, 0.386, 0.417),
    "7B Replay": (0.5, 0.8, 0.51, 0.55, 0.785, 0.37, 0.52, 0.406),
    "13B Replay": (0.51, 0.813, 0.482, 0.523, 0.792, 0.396, 0.606, 0.407),
}


def fail(folder, content) -> InputError:
    with pytest.raises(InputError) as caught:
        read_matrix(write(folder, content))
    assert caught.value.exit_code == 2
    assert caught.value.fix
    return caught.value


def test_metrics_by_hand():
    found = compute_metrics(TASKS, ROWS)
    assert found.op == pytest.approx((0.40 + 0.55 + 0.90) / 3)
    assert found.bwt == pytest.approx((-0.20 + 0.05) / 2)
    assert found.bwt_over_t == pytest.approx((-0.20 + 0.05) / 3)
    assert found.bwt_clipped == pytest.approx(-0.20 / 3)
    assert found.forgetting == pytest.approx(((0.70 - 0.40) + (0.50 - 0.55)) / 2)
    assert found.fwt == pytest.approx(((0.30 - 0.20) + (0.35 - 0.30)) / 2)
    assert found.plasticity == pytest.approx((0.60 + 0.50 + 0.90) / 3)
    first, last = found.per_task["a"], found.per_task["c"]
    assert (first.learned, first.final, first.fwt) == (0.60, 0.40, None)
    assert (first.bwt, first.forgetting) == (pytest.approx(-0.20), pytest.approx(0.30))
    assert (last.bwt, last.forgetting, last.fwt) == (None, None, pytest.approx(0.05))


def test_forgetting_does_not_depend_on_what_was_measured_before():
    """Chaudhry et al. never count the model before training; what it knew is in the loss from the peak."""
    rows = ((0.9, 0.2, 0.1), (0.5, 0.3, 0.1), (0.4, 0.8, 0.2), (0.3, 0.6, 0.7))
    found = compute_metrics(("a", "b", "c"), rows)
    assert found.forgetting == pytest.approx(((0.5 - 0.3) + (0.8 - 0.6)) / 2)
    assert found.loss_from_peak == pytest.approx(((0.9 - 0.3) + (0.8 - 0.6)) / 2)
    unmeasured = compute_metrics(("a", "b", "c"), ((None, None, None), (0.5, None, None), *rows[2:]))
    assert unmeasured.forgetting == found.forgetting
    assert unmeasured.loss_from_peak == pytest.approx(((0.5 - 0.3) + (0.8 - 0.6)) / 2)


def test_for_likelihoods_lower_is_better():
    """Levels stay in nats; a gain in likelihood is a fall in nats, and a positive forgetting is a loss in both."""
    nats = ((2.0, 3.0), (0.5, 2.5), (0.75, 0.4))
    found = compute_metrics(("a", "b"), nats, lower_is_better=True)
    assert (found.op, found.plasticity) == (pytest.approx(0.575), pytest.approx(0.45))
    assert (found.bwt, found.bwt_clipped) == (pytest.approx(-0.25), pytest.approx(-0.125))
    assert (found.forgetting, found.fwt) == (pytest.approx(0.25), pytest.approx(0.5))


@pytest.mark.parametrize(
    ("model", "op", "bwt"),
    [
        ("7B SeqFT", 48.7, -8.3),
        ("13B SeqFT", 49.9, -7.0),
        ("7B LoRA", 12.7, -45.8),  # as its own table has it; the paper's Table 1 prints -45.7 for the same rows
        ("13B LoRA", 28.0, None),  # its diagonal, like those below, is not at hand
        ("7B Replay", 55.5, None),
        ("13B Replay", 56.6, None),
    ],
)
def test_published_trace_numbers(model, op, bwt):
    """arXiv 2310.06762, Table 1 with the tables of its appendix, to the printed precision."""
    final, diagonal = FINALS[model], DIAGONALS.get(model, (None,) * 8)
    rows = [[None] * 8 for _ in range(9)]
    for i in range(8):
        rows[i + 1][i] = diagonal[i]
    rows[8] = final
    found = compute_metrics(name_tasks(8), rows)
    # Half a unit of the last digit, and a rounding of the sum: 12.65 is printed as 12.7.
    assert abs(100 * found.op - op) <= 0.05 + 1e-9
    if bwt is None:
        assert found.bwt is None
    else:
        assert abs(100 * found.bwt - bwt) <= 0.05 + 1e-9
        assert found.bwt_over_t == pytest.approx(found.bwt * 7 / 8)
    assert found.forgetting is None
    assert found.fwt is None


@pytest.mark.parametrize("num_tasks", [2, 3, 8, 15])
@pytest.mark.parametrize("lower_is_better", [False, True])
def test_metrics_equal_the_formulas_in_numpy(num_tasks, lower_is_better):
    rows = make_rows(num_tasks, seed=num_tasks)
    found = compute_metrics(name_tasks(num_tasks), rows, lower_is_better)
    R = np.array(rows) * (-1 if lower_is_better else 1)  # (T + 1, T)
    learned = np.diagonal(R, offset=-1)
    change = R[-1] - learned
    assert found.bwt == pytest.approx(change[:-1].mean())
    assert found.bwt_over_t == pytest.approx(change.mean())
    assert found.bwt_clipped == pytest.approx(np.minimum(change, 0).mean())
    since = [R[i + 1 : -1, i].max() for i in range(num_tasks - 1)]
    assert found.forgetting == pytest.approx((since - R[-1][:-1]).mean())
    assert found.loss_from_peak == pytest.approx((R[:-1].max(axis=0) - R[-1])[:-1].mean())
    assert found.fwt == pytest.approx((np.diagonal(R) - R[0])[1:].mean())
    assert found.op == pytest.approx(np.mean(rows[-1]))
    assert found.plasticity == pytest.approx(abs(learned.mean()))


def test_a_missing_value_gives_none_and_never_another_number():
    """Whichever value is blanked, a metric keeps its number or has none; the loss from the peak alone takes earlier scores."""
    rows, tasks = make_rows(4, seed=0), name_tasks(4)
    whole = compute_metrics(tasks, rows).model_dump(exclude={"per_task"})
    num_lost = dict.fromkeys(whole, 0)
    for t in range(5):
        for i in range(4):
            holed = [[None if (row, column) == (t, i) else rows[row][column] for column in range(4)] for row in range(5)]
            for name, value in compute_metrics(tasks, holed).model_dump(exclude={"per_task"}).items():
                num_lost[name] += value is None
                if name == "loss_from_peak" and t <= i:
                    assert value <= whole[name]
                else:
                    assert value in (None, whole[name])
    assert num_lost == {
        "op": 4, "bwt": 6, "bwt_over_t": 6, "bwt_clipped": 6, "forgetting": 9, "loss_from_peak": 9, "fwt": 6, "plasticity": 4,
    }  # fmt: skip


def test_one_task_has_no_transfer():
    found = compute_metrics(("a",), ((0.2,), (0.7,)))
    assert (found.op, found.plasticity) == (0.7, 0.7)
    assert (found.bwt, found.bwt_over_t, found.bwt_clipped, found.forgetting, found.fwt) == (None,) * 5


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_a_run_in_progress_has_parts_and_no_metrics(num_rows):
    found = compute_metrics(TASKS, ROWS[:num_rows])
    assert (found.op, found.bwt, found.forgetting, found.plasticity) == (None,) * 4
    learned = [part.learned for part in found.per_task.values()]
    assert learned == [0.60, 0.50, 0.90][: num_rows - 1] + [None] * (4 - num_rows)


def test_a_file_reads_back_the_same(tmp_path):
    matrix = ForgettingMatrix(
        tasks=TASKS, scores=ROWS, lenient=ROWS, nll=ROWS, general={"tinyworld/facts": (1.0, 0.9, None, 0.4)},
        general_nll={"tinyworld/facts": (0.1, 0.2, 0.3, 4.0)},
    )  # fmt: skip
    write_model(Run(tmp_path).matrix_path, matrix)
    assert read_matrix(tmp_path) == read_matrix(tmp_path / "forgetting.json") == matrix
    bare = read_matrix(write(tmp_path, {"tasks": TASKS, "scores": ROWS}))
    assert (bare.scores, bare.lenient, bare.general) == (ROWS, None, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [*ROWS, ROWS[0]]}, "scores has 5 rows; 3 tasks have at most 4, the first of the base model"),
        ({"scores": []}, "scores is empty: its first row is the base model's"),
        ({"scores": [*ROWS[:2], (0.1, 0.2)]}, "scores[2] has 2 values for 3 tasks"),
        ({"scores": list(zip(*ROWS, strict=True))}, "scores has 4 columns for 3 tasks: transpose it"),
        ({"scores": [(0.1, 0.2, -0.1)]}, "scores[0][2]: input should be greater than or equal to 0, got -0.1"),
        ({"scores": [(0.1, 0.2, "0.5")]}, "scores[0][2]: input should be a valid number, got '0.5'"),
        ({"scores": [(0.1, 0.2, True)]}, "scores[0][2]: input should be a valid number, got True"),
        ({"scores": [(0.1, 0.2, float("nan"))]}, "scores[0][2]: input should be "),
        ({"tasks": ["a", "b", "a"]}, "tasks: 'a' is named 2 times"),
        ({"tasks": []}, "tasks is empty"),
        ({"lenient": ROWS[:3]}, "lenient has 3 rows, scores has 4"),
        ({"nll": [*ROWS[:3], (1.0, 2.0)]}, "nll[3] has 2 values for 3 tasks"),
        ({"nll": [*ROWS[:3], (1.0, 2.0, -1.0)]}, "nll[3][2]: input should be greater than or equal to 0, got -1.0"),
        ({"general": {"facts": [1.0]}}, "general.facts has 1 values, scores has 4 rows"),
        ({"general": {"a": [1.0] * 4}}, "general.a is one of tasks"),
        ({"score": ROWS}, "unknown key 'score' (did you mean 'scores'?)"),
    ],
)
def test_a_fault_names_its_place(tmp_path, change, message):
    assert f"matrix.json: {message}" in fail(tmp_path, {"tasks": TASKS, "scores": ROWS, **change}).message


def test_points_are_told_from_shares(tmp_path):
    error = fail(tmp_path, {"tasks": TASKS, "scores": [[48.7, 60.0, 51.2]] * 4})
    assert "scores[0][0]: input should be less than or equal to 1, got 48.7" in error.message
    assert error.message.endswith("... and 7 more")
    assert "divide them by 100" in error.fix


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "not JSON"),
        ('{"tasks": ["a"], "scores": [[0.1]', "not JSON"),
        ("[[0.1]]", "not a JSON object"),
        ('{"tasks": ["a"]}', "scores is missing"),
    ],
)
def test_what_is_no_matrix_file(tmp_path, content, message):
    assert message in fail(tmp_path, content).message


def test_a_place_without_a_matrix(tmp_path):
    with pytest.raises(InputError, match="holds no forgetting.json"):
        read_matrix(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        read_matrix(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not JSON"):
        read_matrix(tmp_path / "binary.json")


def test_a_wrong_matrix_cannot_be_made():
    with pytest.raises(ValidationError, match="has 5 rows"):
        ForgettingMatrix(tasks=TASKS, scores=(*ROWS, ROWS[0]))

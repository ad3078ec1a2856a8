"""The check of rows counts what is wrong, and finds the embedded sequence clean."""

from tasks.written_tasks import find, write_task

from hftcli.tasks.check import check_sequence, format_report


def test_the_check_counts_what_is_wrong(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "task.yaml").write_text("cue: ' A:'")
    rows = {
        "train": [("a A:", "1"), ("a A:", "1"), ("a A:", "2"), ("b A:", "1"), ("  A:", "1"), ("c A:", " ")],
        "eval": [("d A:", "1"), ("e A:", "1")],
        "test": [("a A:", "2"), ("b A:", "9"), ("b A:", "8"), ("e A:", "1")],
    }
    root = write_task(
        tmp_path / "task",
        **{split: [{"prompt": prompt, "answer": answer} for prompt, answer in pairs] for split, pairs in rows.items()},
    )
    report = check_sequence(("task", "tinyworld/skill"), root)
    first = report.tasks[0]
    assert (first.num_train, first.num_eval, first.num_test) == (6, 2, 4)
    assert (first.num_duplicates, first.num_test_in_train, first.num_eval_in_test, first.num_empty) == (1, 3, 1, 2)
    assert "task: 3 of 4 test prompts are also trained on." in report.warnings
    assert all(warning in format_report(report) for warning in report.warnings)
    assert report.tasks[1].num_eval is None


def test_the_embedded_sequence_is_clean():
    assert check_sequence(find("tinyworld").tasks).warnings == ()


def test_the_cleaned_sample_of_trace_only_lacks_rows(trace_root):
    report = check_sequence(find("trace", trace_root).tasks, trace_root)
    wrong = [warning for warning in report.warnings if "the official set has" not in warning]
    assert wrong == []
    fomc = next(task for task in report.tasks if task.task == "trace/FOMC")
    assert (fomc.num_train, fomc.num_eval, fomc.num_test, fomc.num_official) == (500, 100, 100, (5000, 496, 496))

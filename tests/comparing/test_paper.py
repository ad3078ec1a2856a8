"""The paper's pipelines: their commands are hft's own, and their tables take what was run."""

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from written_runs import write_run

from hftcli.commands.cli import spell_out
from hftcli.comparing.paper import ASKED, PIPELINES, list_commands, list_rows
from hftcli.errors import InputError
from hftcli.recipe.loading import load_recipe


@pytest.mark.parametrize("name", PIPELINES)
def test_every_command_is_a_recipe_that_loads(name):
    commands = list(list_commands(name, 2, Path("runs/paper")))
    trained = [shlex.split(command) for command in commands if command.startswith("hft ") and " eval " not in command]
    assert len(trained) == 2 * 2 * len(PIPELINES[name].variants)
    outputs = set()
    for words in trained:
        options = spell_out(words[3:], {"--set", "--model", "--output", "--num-processes"})
        given = [value for option, value in pairwise(options) if option == "--set"]
        recipe = load_recipe(words[2], given, PIPELINES[name].command)
        assert recipe.freeze.seed == recipe.train.seed
        outputs.add(words[words.index("--output") + 1])
    assert len(outputs) == len(trained)


def test_the_table_of_fine_tuning_has_means_over_seeds(tmp_path):
    for seed, points in ((1, 0.5), (2, 0.7)):
        folder = tmp_path / "sft" / f"half-{seed}"
        folder.mkdir(parents=True)
        tasks = {task: {"score": points, "lenient": None, "nll": None, "num_examples": 10} for task in ASKED}
        (folder / "evaluation.json").write_text(json.dumps({"tasks": tasks, "model": "m"}))
    rows = {row[0]: row[1:] for row in list_rows("sft", tmp_path)}
    assert rows["mmlu"][:3] == ("48.5", "50.8", "")
    # Student's t of one degree of freedom: 12.706 standard errors of 0.1.
    assert rows["mmlu"][3] == "60.0 ± 127.1 (2 seeds)"
    # (3.2 + 26.4) / 2 and (6.2 + 32.8) / 2.
    assert rows["basic knowledge, mean of two"][:2] == ("14.8", "19.5")


def test_the_table_of_trace_has_op_and_bwt(tmp_path):
    write_run(tmp_path / "trace" / "seqft-full-1", objective="continual")
    matrix = {"tasks": ["a", "b"], "scores": [[0.0, 0.0], [0.8, 0.1], [0.5, 0.9]]}
    (tmp_path / "trace" / "seqft-full-1" / "forgetting.json").write_text(json.dumps(matrix))
    rows = {row[0]: row[1:] for row in list_rows("trace", tmp_path)}
    assert rows["seqft OP"] == ("45.7", "51.3", "70.0 (1 seed)", "")
    assert rows["seqft BWT"][2] == "-30.0 (1 seed)"


def test_nothing_that_was_run_is_said(tmp_path):
    with pytest.raises(InputError, match="holds no finished run of this pipeline"):
        list_rows("dpo", tmp_path)


def test_the_table_takes_no_number_of_seeds(hft, tmp_path):
    """It has all that were run, three or not; and the commands are of three seeds where nothing else is said."""
    for seeds in (1, 3):
        said = hft("paper", "sft", "--table", "--seeds", seeds, "--output", tmp_path, code=2).stderr
        assert "--table shows every seed" in said
        assert "drop --seeds" in said
    said = hft("paper", "sft", "--table", "--output", tmp_path, code=2).stderr
    assert "holds no finished run" in said
    commands = hft("paper", "sft").stdout
    assert set(re.findall(r"freeze\.seed (\d+)", commands)) == {"1", "2", "3"}

"""The paper's tables as pipelines: the commands of each, and what was run beside what the paper reports.

The numbers are those of arXiv 2404.18466, Llama-2-7B, in points of 100, as summaries of it have them whose means agree. The
paper names its benchmarks and not their prompts; here they are asked as lm-evaluation-harness asks them. Two are left out:
HumanEval, whose programs it would run here, and HotpotQA, which it has not without its texts. So the means of general abilities
are of five and not six, those of basic knowledge of two and not three. Where the paper gives its own means alone, the table
says so.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from hftcli import PACKAGE
from hftcli.comparing.forgetting import compute_metrics, read_matrix
from hftcli.comparing.points import ScoredTasks
from hftcli.comparing.statistics import POINTS, estimate_mean
from hftcli.errors import InputError

SHARES = {"full": 1.0, "half": 0.5}
GENERAL = ("harness:mmlu", "harness:gsm8k", "harness:bbh", "harness:tydiqa_goldp", "harness:truthfulqa_mc2")
KNOWLEDGE = ("harness:nq_open", "harness:triviaqa")
ASKED = (*GENERAL, *KNOWLEDGE)
EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Reported:
    """What the paper reports of a measure.

    Attributes:
        tasks: whose mean it is; none for a metric of the matrix, which `name` ends with.
    """

    name: str
    full: float
    half: float
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pipeline:
    """A table of the paper.

    Attributes:
        command: that trains.
        recipe: that ships with hft.
        needs: what of the commands must be filled in, and how.
        variants: settings besides the share, by name.
        reported: the paper's numbers.
    """

    command: str
    recipe: str
    reported: tuple[Reported, ...]
    needs: tuple[str, ...] = ()
    variants: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"": ()})


def find_script(name: str) -> str:
    """The command that runs a script of hft's: in the package when it is installed, at the top of a checkout."""
    folder = next(place / "scripts" for place in (PACKAGE, PACKAGE.parent) if (place / "scripts" / name).exists())
    return shlex.join(["python", str(folder / name)])


PIPELINES = {
    "sft": Pipeline(
        command="sft",
        recipe="tulu",
        needs=("`hf auth login` with access to meta-llama/Llama-2-7b-hf",),
        reported=(
            *(
                Reported(task.removeprefix("harness:"), full, half, (task,))
                for task, full, half in zip(
                    ASKED, (48.5, 25.0, 42.2, 51.2, 41.7, 3.2, 26.4), (50.8, 30.5, 43.6, 52.3, 45.4, 6.2, 32.8),
                    strict=True,
                )
            ),
            Reported("general abilities, mean of five", 41.7, 44.5, GENERAL),  # computed from the rows above
            Reported("basic knowledge, mean of two", 14.8, 19.5, KNOWLEDGE),
        ),
    ),
    "dpo": Pipeline(
        command="dpo",
        recipe="ultrafeedback",
        needs=("the runs of `hft paper sft`: each starts from the one of its own share and seed",),
        reported=(
            Reported("general abilities, mean of five (paper: six)", 41.9, 41.7, GENERAL),
            Reported("basic knowledge, mean of two (paper: three)", 10.7, 12.5, KNOWLEDGE),
        ),
    ),
    "trace": Pipeline(
        command="continual",
        recipe="trace",
        needs=(
            "`hf auth login` with access to meta-llama/Llama-2-7b-chat-hf",
            f"TRACE: {find_script('prepare_trace.py')} TRACE-Benchmark.zip --output TRACE_FOLDER",
        ),
        variants={
            "seqft": (),
            "gem": ("--set", "method.gem={}", "--num-processes", "1"),
            "replay": (
                "--method.replay.fraction", "0.1", "--method.replay.when", "after", "--method.replay.extra", "trace/Lima",
            ),
        },
        reported=(
            Reported("seqft OP", 45.7, 51.3), Reported("seqft BWT", -10.2, -5.6), Reported("gem OP", 48.2, 50.2),
            Reported("gem BWT", -7.9, -5.9), Reported("replay OP", 54.3, 54.1), Reported("replay BWT", 1.4, 2.1),
        ),
    ),
}  # fmt: skip


def name_run(name: str, variant: str, share: str, seed: int, output: Path) -> Path:
    """The folder of one run of a pipeline."""
    return output / name / "-".join(filter(None, (variant, share, str(seed))))


def list_commands(name: str, num_seeds: int, output: Path) -> Iterator[str]:
    """The commands of a pipeline in their order; each goes on where it stopped when it is given again."""
    pipeline = PIPELINES[name]
    for variant, settings in pipeline.variants.items():
        for seed in range(1, num_seeds + 1):
            for share, fraction in SHARES.items():
                run = name_run(name, variant, share, seed, output)
                command = ["hft", pipeline.command, pipeline.recipe, "--freeze.trainable_fraction", str(fraction)]
                command += ["--freeze.seed", str(seed), "--train.seed", str(seed), *settings]
                if name == "dpo":
                    command += ["--model", str(name_run("sft", "", share, seed, output))]
                if name == "trace":
                    command += ["--data.root", "TRACE_FOLDER"]
                yield shlex.join([*command, "--output", str(run)])
                if name != "trace":
                    asked = ["--tasks", ",".join(ASKED), "--output", str(run / EVALUATION)]
                    done = shlex.quote(str(run / EVALUATION))
                    yield f"[ -e {done} ] || " + shlex.join(["hft", "eval", "--model", str(run), *asked])


def read_values(name: str, reported: Reported, share: str, output: Path) -> list[float]:
    """What the runs of a share that are there gave, in [0, 1] or a difference of such, one for each seed."""
    variant = reported.name.split(" ")[0] if name == "trace" else ""
    found = []
    for run in sorted((output / name).glob("-".join(filter(None, (variant, share, "*"))))):
        if name == "trace":
            if not (run / "forgetting.json").exists():
                continue
            matrix = read_matrix(run)
            value = getattr(compute_metrics(matrix.tasks, matrix.scores), reported.name.split(" ")[1].lower())
        else:
            if not (run / EVALUATION).exists():
                continue
            tasks = ScoredTasks.model_validate_json((run / EVALUATION).read_text(encoding="utf-8")).tasks
            scores = [tasks[task].score for task in reported.tasks if task in tasks]
            known = [score for score in scores if score is not None]
            value = fmean(known) if len(known) == len(reported.tasks) else None
        if value is not None:
            found.append(value)
    return found


def list_rows(name: str, output: Path) -> list[tuple[str, ...]]:
    """A row for each measure: the paper's full and half, and what was run, means over the seeds with 95 % intervals.

    Raises:
        InputError: nothing was run.
    """
    rows = []
    is_empty = True
    for reported in PIPELINES[name].reported:
        cells = [reported.name, f"{reported.full:.1f}", f"{reported.half:.1f}"]
        for share in SHARES:
            values = read_values(name, reported, share, output)
            is_empty = is_empty and not values
            cells.append(_show(values))
        rows.append(tuple(cells))
    if is_empty:
        raise InputError(f"{output / name} holds no finished run of this pipeline", f"hft paper {name} prints its commands")
    return rows


def _show(values: Sequence[float]) -> str:
    if not values:
        return ""
    estimate = estimate_mean(values)
    shown = POINTS.show(estimate.mean)
    if estimate.interval is None:
        return f"{shown} (1 seed)"
    return f"{shown} ± {POINTS.show(estimate.interval[1] - estimate.mean)} ({len(values)} seeds)"

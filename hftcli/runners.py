"""From a recipe to a finished run: rounds are prepared as files, launched one after another, and read back."""

import logging
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hftcli import PACKAGE
from hftcli.comparing.forgetting import ForgettingMatrix, assemble_matrix, shorten_task
from hftcli.errors import ModelError, VerificationError
from hftcli.freezing.activations import Network
from hftcli.freezing.budget import Budget
from hftcli.freezing.held import NOTHING_WIDE, Held
from hftcli.freezing.narrowing import narrow_plan
from hftcli.freezing.positions import read_config
from hftcli.freezing.redrawing import choose_plan
from hftcli.freezing.roles import Parameter, assign_roles, check_family
from hftcli.freezing.rule import FreezeRule
from hftcli.launching.carrying import check_reference, check_round
from hftcli.launching.cluster import describe_nodes, make_nodes
from hftcli.launching.command import count_ranks, find_free_port, resolve_launch, worker_command, worker_environment
from hftcli.launching.hosts import collect_environment
from hftcli.launching.planning import apply_fit, bound_batch, choose_fit, make_budget
from hftcli.launching.processes import passing_signals
from hftcli.launching.watch import launch_round
from hftcli.measuring.evaluation import Subject
from hftcli.recipe.evaluation import EvalSection
from hftcli.recipe.recipe import Recipe
from hftcli.recipe.sections import QUICK_START, ROW_KEYS, DataSection, LaunchSection
from hftcli.reporting.card import write_card
from hftcli.reporting.figures import draw_matrix
from hftcli.reporting.page import write_page
from hftcli.runs.files import write_model
from hftcli.runs.history import read_history
from hftcli.runs.measured import split_tasks
from hftcli.runs.records import Manifest, RoundResult
from hftcli.runs.run import Round, Run
from hftcli.runs.spec import EarlierRound, Progress, RoundSpec, Scoring
from hftcli.runs.verification import Verification
from hftcli.runs.versions import list_versions
from hftcli.tasks import check_tasks, find_sequence, is_task, load_task
from hftcli.tasks.asking import check_acting
from hftcli.tasks.check import check_sequence

SMALL_GRADIENT = 1e-6  # AdamW's steps shrink with gradients whose weights have less than its epsilon of 1e-8
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run begins: a model, and how many rounds of hft it has behind it."""

    path: str
    num_rounds: int = 0
    parent: str | None = None


def run_single(recipe: Recipe, on_progress: Callable[[Round, Progress], None]) -> Run:
    """Supervised fine-tuning or preference optimization: one round.

    Raises:
        HftError: see errors.py; what was finished before is kept.
    """
    run, round_ = prepare_single(recipe)
    finish_round(run, round_, on_progress)
    write_page(run, run.page_path)
    return run


def run_recipe(recipe: Recipe, on_progress: Callable[[Round, Progress], None]) -> Run:
    """Whatever a recipe asks for, from where it stopped.

    Raises:
        HftError: see errors.py; what was finished before is kept.
    """
    if recipe.objective != "continual":
        return run_single(recipe, on_progress)
    run = prepare_continual(recipe)
    finish_continual(run, on_progress)
    return run


def prepare_single(recipe: Recipe) -> tuple[Run, Round]:
    """Check what can be checked without a model, and write the run's and the round's files."""
    start, run = resolve_start(recipe.model.place), Run(recipe.folder)
    launch = resolve_launch(recipe.launch)
    check_start(start, recipe.freeze)
    data = recipe.data.relocate(_make_absolute)
    check_tasks(recipe.eval.tasks, data.root)
    check_way(recipe.eval, recipe.eval.tasks, data.root)
    spec = RoundSpec(
        objective=recipe.objective,
        index=start.num_rounds,
        model=recipe.model.model_copy(update={"path": start.path, "revision": None}),
        data=data,
        freeze=recipe.freeze.relocate(_settle_rows),
        train=bound_batch(recipe.train, launch.num_ranks),
        launch=launch,
        checkpoint=recipe.checkpoint,
        method=recipe.method,
        scoring=Scoring(
            before=recipe.eval.tasks,
            after=recipe.eval.tasks,
            max_examples=recipe.eval.max_examples,
            temperature=recipe.eval.temperature or 0.0,
            asking=run.settle_asking(recipe.eval),
            **split_tasks(recipe),
        ),
        stop=recipe.stop,
        dpo=recipe.dpo,
        reference=recipe.reference,
        held_out=make_held_out_section(recipe),
    )
    check_reference(spec)
    check_round(spec)
    spec.num_accumulation_steps  # noqa: B018  a batch that does not divide is refused before anything is written
    run.claim(recipe, spec.launch, make_manifest(start.parent))
    round_ = run.round(f"00-{recipe.objective}")
    round_.folder.mkdir(parents=True, exist_ok=True)
    if not round_.is_done:
        write_model(round_.spec_path, spec)
    return run, round_


def check_way(asked: EvalSection, names: Sequence[str], root: str | None) -> None:
    """Raises: InputError: a setting changes how none of the tasks is asked."""
    if asked.chat is not None or asked.max_new_tokens is not None or asked.temperature:  # which alone need the rows
        check_acting([load_task(name, root) for name in names], asked.asking, asked.temperature)


def prepare_continual(recipe: Recipe) -> Run:
    """Check what can be checked without a model, and write the files of a run with a round for each task.

    Each round starts from the checkpoint of the one before, so that all of them can be written at once.
    """
    assert recipe.continual is not None
    start = resolve_start(recipe.model.place)
    check_start(start, recipe.freeze)
    root = recipe.data.root and _make_absolute(recipe.data.root)
    sequence = find_sequence(recipe.continual, root)
    check_tasks(recipe.eval.tasks, root)
    check_way(recipe.eval, (*sequence.tasks, *recipe.eval.tasks), root)
    temperature = recipe.eval.temperature if recipe.eval.temperature is not None else sequence.temperature
    launch, run = resolve_launch(recipe.launch), Run(recipe.folder)
    rounds = [run.round(f"{place:02d}-{shorten_task(task)}") for place, task in enumerate(sequence.tasks)]
    specs = []
    for place, task in enumerate(sequence.tasks):
        epochs = {"num_train_epochs": sequence.epochs[task]} if sequence.epochs else {}
        path = str(rounds[place - 1].checkpoint.resolve()) if place else start.path
        spec = RoundSpec(
            objective="sft",
            index=start.num_rounds + place,
            model=recipe.model.model_copy(update={"path": path, "revision": None}),
            data=recipe.data.model_copy(update={"root": root}),
            freeze=recipe.freeze.relocate(_settle_rows),
            train=bound_batch(recipe.train, launch.num_ranks).model_copy(update=epochs),
            launch=launch,
            checkpoint=recipe.checkpoint,
            task=task,
            method=recipe.method,
            earlier=tuple(
                EarlierRound(task=earlier, folder=str(round_.folder.resolve()))
                for earlier, round_ in zip(sequence.tasks[:place], rounds, strict=False)
            ),
            scoring=Scoring(
                before=() if place else tuple(dict.fromkeys((*sequence.tasks, *recipe.eval.tasks))),
                # The next task too: what transfers to it.
                after=tuple(dict.fromkeys((*sequence.tasks[: place + 2], *recipe.eval.tasks))),
                likelihood=tuple(name for name in sequence.tasks[place + 2 :] if name not in recipe.eval.tasks),
                max_examples=recipe.eval.max_examples,
                temperature=temperature,
                asking=run.settle_asking(recipe.eval),
                **split_tasks(recipe, task, sequence.tasks[:place]),
            ),
            stop=recipe.stop,
        )
        check_round(spec)
        spec.num_accumulation_steps  # noqa: B018  a batch that does not divide is refused before anything is written
        specs.append(spec)
    manifest = make_manifest(start.parent).model_copy(update={"sequence": check_sequence(sequence.tasks, root)})
    run.claim(recipe, launch, manifest)
    for round_, spec in zip(rounds, specs, strict=True):
        round_.folder.mkdir(parents=True, exist_ok=True)
        if not round_.is_done:
            write_model(round_.spec_path, spec)
    return run


def finish_continual(run: Run, on_progress: Callable[[Round, Progress], None]) -> ForgettingMatrix:
    """Run the rounds that are not done, one after another; the matrix is on disk after each.

    Raises:
        HftError: see errors.py; finished rounds are kept.
    """
    for round_ in run.rounds:
        finish_round(run, round_, on_progress)
        matrix = assemble_matrix(run)
        write_model(run.matrix_path, matrix)
        for name in ("forgetting.svg", "forgetting.png"):
            draw_matrix(matrix, run.figures / name)
        write_page(run, run.page_path)
    return matrix


def make_held_out_section(recipe: Recipe) -> DataSection | None:
    """The held-out rows, to be cut as the training rows are."""
    held_out = recipe.eval.held_out
    if held_out.path is None:
        return None
    shared = recipe.data.model_dump(include={"max_length", *ROW_KEYS, "pattern", "drop_identical"})
    return DataSection(**held_out.model_dump() | shared | {"path": _make_absolute(held_out.path)})


def finish_round(run: Run, round_: Round, on_progress: Callable[[Round, Progress], None]) -> RoundResult:
    """Run a round unless it is done, take it into the manifest, and remove what nothing goes on from any more.

    Raises:
        VerificationError: something frozen moved, or something trained did not.
    """
    if round_.is_done:
        result = round_.read_result()
        if round_.name not in run.read_manifest().rounds:  # the front was killed in between
            run.record(round_, result)
    else:
        launch = round_.read_spec().launch
        with passing_signals(round_):
            result = launch_round(round_, launch, lambda progress: on_progress(round_, progress))
            run.record(round_, result)
    run.remove_spent(round_, result)
    if not result.verification.passed:
        verification = result.verification
        raise VerificationError(
            f"{round_.folder}: {len(verification.violations)} frozen parameters moved, {len(verification.unmoved)} trained "
            f"ones did not, {len(verification.faults)} faults in all",
            f"hft verify {round_.folder} names them" + _explain_stillness(round_, verification),
        )
    write_card(run, round_)
    return result


def _explain_stillness(round_: Round, verification: Verification) -> str:
    """Why what trains did not move, where that is the only fault and the log says it."""
    norms = [row["grad_norm"] for row in round_.read_metrics() if "grad_norm" in row] if round_.metrics_path.exists() else []
    if verification.faults != verification.unmoved or not norms or max(norms) > SMALL_GRADIENT:
        return ""
    return (
        f"; the gradients' norm was {max(norms):.1e} at most, so that steps were less than a weight's last digit: the loss "
        "taught nothing (see what `method` leaves of it), or the rows were known already"
    )


def resolve_start(path: str) -> Start:
    """What `model.path` means: a finished run, the embedded model, a folder, or a hub id, which is left to the worker.

    Raises:
        ModelError: no such folder, a run that is not finished, or a checkpoint whose round was not verified.
    """
    start = find_start(path)
    if not is_verified(start):
        raise ModelError(
            f"model.path {path}: {Path(start.path).parent} did not pass its verification",
            f"`hft verify {Path(start.path).parent}` names what is wrong; give another start, or run it again in a new folder",
        )
    return start


def is_verified(start: Start) -> bool:
    """Whether nothing was wrong with the round that wrote a start; of one that no round wrote, nothing is known."""
    round_ = Round(Path(start.path).parent)
    is_known = Path(start.path) == round_.checkpoint and round_.spec_path.exists() and round_.is_done
    return not is_known or round_.read_result().verification.passed


def find_start(path: str) -> Start:
    """`resolve_start`, be it verified or not."""
    if path == QUICK_START:  # a folder of the user's own by that name is ./tinyworld
        path = str(PACKAGE / QUICK_START / "model")
    folder = Path(path)
    if Run(folder).recipe_path.exists():
        last = Run(folder).last_finished
        if last is None or last != Run(folder).rounds[-1]:
            raise ModelError(f"model.path {path} is a run that is not finished", "run its recipe again: it goes on")
        return Start(str(last.checkpoint.resolve()), last.read_spec().index + 1, str(folder.resolve()))
    if folder.is_dir():
        config = folder / "config.json"
        if not config.is_file():
            raise ModelError(f"model.path {path} has no config.json", "give a Hugging Face folder or a finished run")
        history, place = read_history(folder), str(folder.resolve())
        return Start(place, history.num_rounds, place if history.rounds else None)
    if not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*(@[\w./-]+)?", path):
        raise ModelError(f"model.path {path}: no such folder", "give a folder, a finished run, or a hub id (owner/name)")
    return Start(path)


def check_start(start: Start, rule: FreezeRule) -> None:
    """Raises: ModelError: nothing says what the parameters of a folder's family are; a hub id is left to the worker."""
    config = Path(start.path) / "config.json"
    if config.is_file():
        check_family(read_config(config).get("model_type", "unknown"), rule.roles)


def resolve_subject(path: str) -> Subject:
    """What `hft eval --model` means: a finished run, which knows what it started from, or any folder or hub id.

    Raises:
        ModelError: a run that is not finished.
    """
    run = Run(Path(path))
    if not run.recipe_path.exists():
        return Subject(resolve_start(path).path if path == QUICK_START else path)
    last = find_start(path)
    if not is_verified(last):
        logger.warning("%s was not verified: `hft verify %s` names what is wrong", path, path)
    first = run.rounds[0]
    spec = first.read_spec()
    return Subject(last.path, first.find_start(), spec.data.root, spec.data.max_length)


def plan_recipe(
    recipe: Recipe, start: Start, model_type: str, parameters: Sequence[Parameter], num_heads: int,
    is_faster_in_bfloat16: bool = True, held: Held = NOTHING_WIDE,
) -> Budget:  # fmt: skip
    """What the recipe's next round would train, and its cost on the recipe's devices, which need not be this machine's.

    They are taken for GPUs. With `train.fit: auto`, the micro-batch is that which fits into `train.memory_bytes`, if given.

    Args:
        is_faster_in_bfloat16: whether this machine computes in bfloat16 where `train.bf16` is null; others are taken to.
        held: how one process holds the start, see `Held`.
    """
    units = assign_roles(model_type, parameters, recipe.freeze.roles)
    plan = choose_plan(units, recipe.freeze, start.num_rounds, num_heads)
    if (lora := recipe.method.lora or recipe.method.olora) is not None:
        plan = narrow_plan(plan, units, lora.target_modules, recipe.method.open_fraction, num_heads)
    num_processes = count_ranks(recipe.launch)
    recipe = recipe.model_copy(update={"train": bound_batch(recipe.train, num_processes)})
    network = Network(model_type, units, num_heads, held)
    mixed = recipe.train.bf16 if recipe.train.bf16 is not None else is_faster_in_bfloat16 or recipe.launch.is_elsewhere
    budget = make_budget(recipe, network, plan, num_processes, mixed)
    if recipe.train.fit is None or recipe.train.memory_bytes is None:
        return budget
    train = apply_fit(recipe.train, choose_fit(recipe, budget, recipe.train.memory_bytes))
    return make_budget(recipe.model_copy(update={"train": train}), network, plan, num_processes, mixed)


def count_rounds(recipe: Recipe) -> int:
    """Raises: InputError: a task is unknown, or its rows are missing."""
    return len(find_sequence(recipe.continual, recipe.data.root).tasks) if recipe.continual else 1


def make_manifest(parent: str | None) -> Manifest:
    """The manifest of a run that begins now, with no round yet."""
    return Manifest(
        command=tuple(sys.argv),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=list_versions(),
        python=platform.python_version(),
        platform=platform.platform(),
        parent=parent,
    )


def describe_launch(round_: Round) -> str:
    """The command that would run a prepared round, on every host of a hostfile, as one would type it.

    Raises:
        InputError: a faulty hostfile or `.deepspeed_env`, or several machines with no way to reach them.
    """
    launch, environment = round_.read_spec().launch, worker_environment(round_.read_spec().launch)
    if launch.hostfile:
        nodes = make_nodes(round_.folder, launch, find_free_port(), collect_environment({**os.environ, **environment}))
        return describe_nodes(nodes)
    num_nodes, _ = launch.shape
    if num_nodes > 1 and not launch.slurm:
        return f"# on each of the {num_nodes} machines\n{_describe_torchrun(round_, launch)}"
    assignments = [f"{key}={shlex.quote(value)}" for key, value in environment.items()]
    return " ".join([*assignments, shlex.join(worker_command(round_.folder, launch, find_free_port()))])


def _describe_torchrun(round_: Round, launch: LaunchSection) -> str:
    options = f"--nnodes {launch.num_nodes} --nproc_per_node {launch.num_processes}"
    place = "--node_rank NODE_RANK --master_addr MASTER_ADDR --master_port MASTER_PORT"
    return f"torchrun {options} {place} -m hftcli.training.worker {shlex.quote(str(round_.folder))}"


def _make_absolute(path: str) -> str:
    """A prepared round can be launched from any folder."""
    is_local = Path(path).exists() and not path.startswith(f"{QUICK_START}/")
    return str(Path(path).resolve()) if is_local else path


def _settle_rows(path: str) -> str:
    """Where `freeze` finds its rows; the name of a task stays, be there a folder by that name."""
    return path if is_task(path) else _make_absolute(path)

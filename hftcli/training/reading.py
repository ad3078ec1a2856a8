"""A round before it has weights: what its files say, its rows as tokens, and whatever of it can be known to fail.

`hft --dry-run` reads a round so, and a worker does the same before it joins the others.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from hftcli.data.cache import default_cache
from hftcli.data.checks import check_positions, check_token_ids, check_tokenizer
from hftcli.data.encoding import NO_SWITCH
from hftcli.data.ends import find_trained_ends
from hftcli.data.formats import FORMATS, PAIRS_FIX
from hftcli.data.prepare import prepare_dataset, prepare_pairs, prepare_task
from hftcli.data.rows import read_choices
from hftcli.data.sources import name_path_alone
from hftcli.data.templates import set_chat_template
from hftcli.data.tokens import Progress
from hftcli.errors import DataError, InputError, ModelError
from hftcli.freezing.activations import Network
from hftcli.freezing.directions import KeepRule
from hftcli.freezing.redrawing import choose_plan
from hftcli.freezing.roles import Unit, assign_roles
from hftcli.freezing.rule import ImportanceRule
from hftcli.freezing.selection import FreezePlan
from hftcli.launching.carrying import check_sorting
from hftcli.launching.packages import check_packages
from hftcli.launching.planning import NO_GPU_TO_FIT, apply_fit, choose_fit, make_budget
from hftcli.measuring.questions import TokenizedTask, add_ends, hold_out, report_faults, tokenize_task
from hftcli.methods import make_methods
from hftcli.methods.method import draw_rows
from hftcli.models.checkpoint import WITHOUT_ROUTER_LOSS
from hftcli.models.configs import read_ends
from hftcli.models.description import describe_model, fetch_checkpoint, load_tokenizer
from hftcli.models.device import is_mixed
from hftcli.models.reader import foresee_held
from hftcli.recipe.asking import AskingSection
from hftcli.recipe.sections import ROW_KEYS, DataSection, TrainSection
from hftcli.runs.records import DataReport, FitReport
from hftcli.runs.scores import HELD_OUT
from hftcli.runs.spec import RoundSpec
from hftcli.tasks import is_task, load_task
from hftcli.tasks.asking import put_task
from hftcli.tasks.general import FORMS, SUFFIX, read_lines
from hftcli.training.overlap import count_shared, list_named
from hftcli.training.own_rows import find_turn
from hftcli.training.stages import Assignment, Rows

logger = logging.getLogger(__name__)

# What a DataError calls rows that are read as those of `data` are.
DATA_KEY = re.compile(r"\bdata\.(?=path|name|split|revision|max_examples)")
NO_PAIRS = "give rows that `hft sft` trains on, or texts"


def read_assignment(spec: RoundSpec, needs_weights: bool = True) -> Assignment:
    """What the files say.

    Args:
        needs_weights: False where they may stay on the hub.

    Raises:
        InputError: something of it would fail later.
    """
    check_packages(spec.train, spec.launch)
    check_offloading(spec)
    start = fetch_checkpoint(spec.model.path, needs_weights)
    description = describe_model(str(start))
    check_positions(spec.data.max_length, description.max_positions)
    check_kernel(spec, start)
    check_router(spec, start)
    check_grain(spec, start)
    units = assign_roles(description.model_type, description.parameters, spec.freeze.roles)
    check_packing(spec, units)
    plan = choose_plan(units, spec.freeze, spec.index, description.num_heads)
    methods = make_methods(spec)
    for method in methods:
        plan = method.narrow_plan(plan, units, description.num_heads)
    for method in methods:
        method.check_start(start, plan)
    held = foresee_held(spec.model, str(start), (parameter.name for parameter in description.parameters))
    network = Network(description.model_type, units, description.num_heads, held)
    spec, fit = fit_round(spec, network, plan)
    tokenizer = load_tokenizer(start)
    check_tokenizer(tokenizer, description.num_embeddings)
    set_chat_template(tokenizer, spec.model.chat_template)
    chat_template = tokenizer.chat_template
    find_turn(spec, tokenizer)
    scoring = spec.scoring
    asked = {}
    for name in dict.fromkeys(scoring.before + scoring.after + scoring.likelihood):
        questions = put_task(name, spec.data.root, scoring.max_examples, scoring.asking, tokenizer.chat_template is not None)
        asked[name] = tokenize_task(questions, spec.data.max_length, tokenizer)
    return Assignment(spec, start, plan, network, methods, fit, tokenizer, description.num_embeddings, asked, chat_template)


def list_settings(spec: RoundSpec) -> tuple[str, dict[str, Any]]:
    """The section that holds the fields of the objective's own trainer, and what is given of them."""
    return ("train", spec.train.extra) if spec.dpo is None else ("dpo", spec.dpo.extra)


def check_offloading(spec: RoundSpec) -> None:
    """Raises: InputError: activations are to go where they are already."""
    section, settings = list_settings(spec)
    if settings.get("activation_offloading") and not torch.cuda.is_available():
        raise InputError(
            f"{section}.activation_offloading moves what a GPU keeps into the machine's memory, and there is no GPU", "drop it"
        )


def check_kernel(spec: RoundSpec, start: Path) -> None:
    """Raises: InputError: the attention kernel is unknown, is not here, or does not serve the model or the precision."""
    kernel = spec.model.attn_implementation
    if kernel is None:
        return
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(start), attn_implementation=kernel)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"model.attn_implementation {kernel}: {reason}", "install it, or take sdpa, which every machine has"
        ) from None
    if "flash" in kernel and not is_mixed(spec):
        raise ModelError(
            f"model.attn_implementation {kernel} computes in bfloat16 alone, and this round computes in float32",
            "take sdpa, or set train.bf16: true",
        )


def check_packing(spec: RoundSpec, units: Iterable[Unit]) -> None:
    """Raises: ModelError: rows would run into one another."""
    if spec.train.packing and spec.dpo is None and any(unit.role == "mixer" for unit in units):
        raise ModelError(
            "train.packing lays several rows into one, and this model's linear attention or state-space layers know no border "
            "between them",
            "set train.packing: false",
        )


def check_grain(spec: RoundSpec, start: Path) -> None:
    """Raises: ModelError: the matrices are quantized, so that nothing can be added to them."""
    source = f"freeze.grain: {spec.freeze.grain_name}" if spec.freeze.divides else "method.lora.quiet"
    is_divided = spec.freeze.divides or spec.method.open_fraction
    if is_divided and "quantization_config" in AutoConfig.from_pretrained(start).to_dict():
        raise ModelError(
            f"{source} trains parts of the matrices of {start}, and its config.json says that they are quantized",
            "give the checkpoint that it was quantized from",
        )


def check_router(spec: RoundSpec, start: Path) -> None:
    """Raises: InputError: a weight for a loss that the model does not have."""
    section, settings = list_settings(spec)
    weight = settings.get("router_aux_loss_coef")
    config = AutoConfig.from_pretrained(start).get_text_config()
    if weight and config.model_type in WITHOUT_ROUTER_LOSS:
        raise InputError(
            f"{section}.router_aux_loss_coef is {weight:g}, and transformers computes no such loss for {config.model_type}",
            "drop it",
        )
    if weight and "output_router_logits" not in config.to_dict():
        raise InputError(
            f"{section}.router_aux_loss_coef is {weight:g}, and the model is no mixture of experts: it routes nothing",
            "drop it",
        )
    own = 0 if config.model_type in WITHOUT_ROUTER_LOSS else getattr(config, "router_aux_loss_coef", 0)
    is_routed = "output_router_logits" in config.to_dict() and (own if weight is None else weight)
    if is_routed and spec.dpo is None and settings.get("label_smoothing_factor"):
        raise InputError(
            "train.label_smoothing_factor: TRL then leaves the loss of the model's router out of the gradient, and logs it",
            "drop it, or do without the router's loss on purpose: train.router_aux_loss_coef: 0",
        )


def fit_round(spec: RoundSpec, network: Network, plan: FreezePlan) -> tuple[RoundSpec, FitReport | None]:
    """The round with its loss kernel, and where it asks for that its micro-batch and checkpointing, chosen for this machine.

    Raises:
        InputError: nothing fits, or too little for a loss that sorts, or there is neither a GPU nor `train.memory_bytes`.
    """
    has_gpu = torch.cuda.is_available()
    budget = make_budget(spec, network, plan, spec.launch.num_ranks, is_mixed(spec), has_gpu)
    if spec.train.fit is None:
        return spec.model_copy(update={"train": spec.train.model_copy(update={"loss_kernel": budget.work.loss})}), None
    memory_bytes = spec.train.memory_bytes
    if memory_bytes is None:
        if not has_gpu:
            raise InputError(*NO_GPU_TO_FIT)
        # All ranks must choose alike, so the smallest device of the machine counts, and nothing that changes.
        devices = range(torch.cuda.device_count())
        memory_bytes = min(torch.cuda.get_device_properties(device).total_memory for device in devices)
    fit = choose_fit(spec, budget, memory_bytes, has_gpu)
    spec = spec.model_copy(update={"train": apply_fit(spec.train, fit)})
    check_sorting(spec)
    return spec, fit


def tokenize_rows(task: Assignment, on_progress: Progress) -> Rows:
    """Rows to tokens, which the cache keeps: whoever comes second finds them there.

    Args:
        on_progress: called with rows done and in all.

    Raises:
        DataError: a row or a file is not what it should be.
    """
    spec, tokenizer, cache = task.spec, task.tokenizer, default_cache()
    dataset, report = prepare_rows(spec, tokenizer, on_progress)
    check_token_ids(report, tokenizer, task.num_embeddings)
    by_task, digests = {spec.task: dataset} if spec.task is not None else {}, [report.tokens_digest]
    for name in dict.fromkeys(name for method in task.methods for name in method.needed_tasks):
        needed = load_task(name, spec.data.root, "train", spec.data.max_examples)
        by_task[name], needed_report = prepare_task(needed, spec.data, tokenizer, cache)
        digests.append(needed_report.tokens_digest)
    own, pairs, asked = dataset, None, dict(task.asked)
    for method in task.methods:
        dataset = method.prepare_rows(dataset, by_task)
    freeze = spec.freeze
    kept, kept_digest = read_named(spec, tokenizer, "freeze.keep", freeze.keep) if freeze.keep else (None, "")
    scored, scored_digest = None, ""
    if freeze.importance is not None and freeze.importance.path is not None:
        scored, scored_digest = read_named(spec, tokenizer, "freeze.importance", freeze.importance)
    report = note_named(report, spec, task.asked)
    with naming("eval.held_out"):
        if spec.held_out and spec.objective == "dpo":
            pairs, held_out = prepare_pairs(spec.held_out, tokenizer, cache)
            check_token_ids(held_out, tokenizer, task.num_embeddings)
            say_lost("eval.held_out", held_out, spec.held_out.max_length)
            report = note_shared(report, pairs, own)
        elif spec.held_out and spec.held_out.pattern is not None:
            policy = spec.held_out.special_tokens_in_text
            asked[HELD_OUT] = tokenize_task(read_choices(HELD_OUT, spec.held_out), spec.data.max_length, tokenizer, policy)
        elif spec.held_out:
            unpacked = spec.train.model_copy(update={"packing": False})
            sequences, held_out = prepare_dataset(spec.held_out, unpacked, tokenizer, cache, is_held_out=True)
            check_token_ids(held_out, tokenizer, task.num_embeddings)
            say_lost("eval.held_out", held_out, spec.held_out.max_length)
            asked[HELD_OUT] = hold_out(sequences)
            report = note_shared(report, sequences, own)
    ends = find_trained_ends(dataset, spec.data.max_length, tokenizer)
    asked = {name: add_ends(questions, (*read_ends(task.start), *ends), tokenizer) for name, questions in asked.items()}
    for questions in asked.values():
        report_faults(questions, spec.scoring.asking.strict)
    return Rows(dataset, own, report, "+".join(digests), asked, pairs, ends, kept, kept_digest, scored, scored_digest)


def say_lost(key: str, report: DataReport, max_length: int) -> None:
    """Say how many of the rows that a key names are not read, or not to their end: no table shows it, as of those that train.

    Args:
        max_length: tokens to which rows are cut.
    """
    if report.num_dropped or report.num_truncated:
        logger.warning(
            "%s: of %d rows, %d are left out and %d are cut: they have more than data.max_length, %d tokens",
            key, report.num_rows, report.num_dropped, report.num_truncated, max_length,
        )  # fmt: skip


def note_shared(report: DataReport, held_out: Dataset, trained: Dataset) -> DataReport:
    """The report with how many held-out sequences, or pairs, are also trained on, which is said."""
    num_shared = count_shared(held_out, trained)
    if num_shared:
        unit = "pairs" if "prompt_ids" in held_out.column_names else "sequences"
        logger.warning("eval.held_out: %d of %d held-out %s are also trained on", num_shared, len(held_out), unit)
    return report.model_copy(update={"num_held_out": len(held_out), "num_held_out_in_train": num_shared})


def note_named(report: DataReport, spec: RoundSpec, asked: Mapping[str, TokenizedTask]) -> DataReport:
    """The report with how many questions are asked that `freeze` was told of, which is said.

    Args:
        asked: the tasks to score, by name.
    """
    found: dict[str, int] = {}
    for key, rule in (("freeze.keep", spec.freeze.keep), ("freeze.importance", spec.freeze.importance)):
        for name in list_named(rule.path, asked, spec.data.root) if rule is not None and rule.path is not None else ():
            found[name] = len(asked[name].task.examples)
            logger.warning("%s names the rows of %s, of which %d questions are asked: they say nothing of others",
                           key, name, found[name])  # fmt: skip
    return report.model_copy(update={"num_asked_in_named": sum(found.values())})


def read_named(
    spec: RoundSpec, tokenizer: PreTrainedTokenizerBase, key: str, rule: KeepRule | ImportanceRule
) -> tuple[Dataset, str]:
    """The rows that a key of `freeze` names, those of them that are read, and a hash of these."""
    assert rule.path is not None
    shared = spec.data.model_dump(include={"max_length", *ROW_KEYS})
    data = DataSection(path=rule.path, **shared)
    if is_task(rule.path):
        rows, report = prepare_task(load_task(rule.path, spec.data.root, "test"), data, tokenizer, default_cache())
    elif holds_questions(Path(rule.path)):
        asked = put_task(rule.path, None, None, AskingSection(), tokenizer.chat_template is not None)
        rows, report = prepare_task(asked, data, tokenizer, default_cache())
    else:
        with naming_rows(key):
            rows, report = prepare_dataset(data, TrainSection(), tokenizer, default_cache())
    say_lost(key, report, data.max_length)
    name = key.rpartition(".")[2]
    return draw_rows(rows, rule.samples, name, spec.freeze.seed), f"{report.tokens_digest}/{rule.samples}/{spec.freeze.seed}"


def holds_questions(path: Path) -> bool:
    """Whether a file is one of those that `eval.tasks` takes, and not of rows that can be trained on."""
    if path.suffix != SUFFIX or not path.is_file():
        return False
    try:
        first = next(iter(read_lines(path).values()))
    except DataError:
        return False  # whoever reads the rows names what is wrong with them
    trained = {column for known in FORMATS.values() for column in (*known.columns, *known.optional)}
    forms = (form for form in FORMS.values() if form.asking.get("has_answers", True) and form.key not in trained)
    return any(form.key in first and form.fits(first[form.key]) for form in forms)


def prepare_rows(spec: RoundSpec, tokenizer: PreTrainedTokenizerBase, on_progress: Progress) -> tuple[Dataset, DataReport]:
    """The tokens of the round's own rows."""
    if spec.task is not None:
        task = load_task(spec.task, spec.data.root, "train", spec.data.max_examples)
        return prepare_task(task, spec.data, tokenizer, default_cache(), on_progress)
    if spec.objective == "sft":
        return prepare_dataset(spec.data, spec.train, tokenizer, default_cache(), on_progress)
    return prepare_pairs(spec.data, tokenizer, default_cache(), on_progress)


@contextmanager
def naming(section: str) -> Iterator[None]:
    """Name what is wrong with other rows than those of `data` by the section that says where they are."""
    try:
        yield
    except DataError as error:
        message, fix = (DATA_KEY.sub(f"{section}.", text) for text in (error.message, error.fix))
        raise DataError(message, fix) from None


@contextmanager
def naming_rows(key: str) -> Iterator[None]:
    """The same for rows that a key of `freeze` names: it has their path alone, and they are not trained on."""
    try:
        yield
    except DataError as error:
        named = name_path_alone(error, f"{key}.path")
        message, fix = (text.replace(NO_SWITCH, "") for text in (named.message, named.fix))
        raise DataError(message, NO_PAIRS if PAIRS_FIX in fix else fix) from None

"""What a round leaves as its checkpoint: masters, weights, configs, tokenizer, history, and seals of them all."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hftcli.models.checkpoint import gather_outcome, save_checkpoint, save_delta
from hftcli.models.configs import settle_configs
from hftcli.models.description import load_tokenizer
from hftcli.models.device import is_sharded
from hftcli.models.masters import write_masters
from hftcli.models.proof import measure_updates
from hftcli.models.reader import Start
from hftcli.runs.files import write_model
from hftcli.runs.history import HISTORY_NAME, extend_history
from hftcli.runs.masters import MastersReport
from hftcli.runs.records import AdapterReport, Checksums
from hftcli.runs.run import Round
from hftcli.runs.seals import list_files, seal_files
from hftcli.training.offload import Masters
from hftcli.training.reports import check_finite
from hftcli.training.stages import Assignment, Attempt, Rows, Saved


def describe_adapter(round_: Round, task: Assignment) -> AdapterReport | None:
    """The adapter that trained in place of the weights; None where there was none."""
    name = task.spec.method.adapter
    if name is None:
        return None
    num_bytes = (round_.adapter / "adapter_model.safetensors").stat().st_size
    num_weights = sum(method.num_adapter_weights for method in task.methods)
    return AdapterReport(name=name, num_weights=num_weights, num_bytes=num_bytes)


def load_saved_tokenizer(task: Assignment) -> PreTrainedTokenizerBase:
    """The start's tokenizer anew, since a trainer sets what it needs on its own, with the chat template that rows had."""
    tokenizer = load_tokenizer(task.start)
    tokenizer.chat_template = task.chat_template  # not read again: its file may have been edited, or be gone
    return tokenizer


def save_round(
    attempt: Attempt, task: Assignment, rows: Rows, model: PreTrainedModel, masters: Masters, merged: dict[str, torch.Tensor],
    moments: str | None,
) -> Saved:  # fmt: skip
    """Gather what trained and write the checkpoint; all ranks together, rank 0 writes.

    Args:
        model: as it is after the last step, what methods add to it merged.
        masters: what trains, in host memory, with `launch.offload`.
        merged: float32 values of what methods merged, where the model holds them rounded.
        moments: hash of the moments of earlier inputs that the round leaves.

    Raises:
        TrainingError: a weight became something that is not a number.
    """
    spec, plan, checkpoint, is_first = task.spec, task.plan, attempt.round.checkpoint, attempt.reporter.is_first
    start = Start(spec.model, task.start, (*plan.trained, *plan.frozen))
    outcome = gather_outcome(model, start, plan, is_sharded(spec), is_first, masters, merged)
    if not is_first:
        return Saved()
    loss = measure_updates(outcome.masters, start)
    for name, update in loss.updates.items():  # of the last step no later loss tells
        check_finite(update, f"{name} moved by {update}", attempt.round)
    tokenizer = load_saved_tokenizer(task)
    configs = settle_configs(task.start, type(model).__name__, tokenizer, spec.model.dtype, rows.ends)
    carried = {name: stored for name, stored in start.masters.items() if name not in outcome.masters}
    rounded = {name: values for name, values in outcome.masters.items() if start.is_rounded(name)}
    seal = write_masters(attempt.round.masters_path, rounded, carried)
    if spec.checkpoint.format == "delta":
        save_delta(configs, outcome.masters, checkpoint, start, plan)
    else:
        save_checkpoint(configs, outcome.masters, checkpoint, start)
    write_model(checkpoint / HISTORY_NAME, extend_history(task.start, spec, plan.fingerprint, seal, moments))
    write_model(attempt.round.checksums_path, Checksums(files=seal_files(checkpoint, list_files(checkpoint))))
    update_norm, dropped_norm = loss.norms
    report = MastersReport(
        start=start.masters_state, seal=seal, num_tensors=len(rounded) + len(carried),
        update_norm=update_norm, dropped_norm=dropped_norm, dropped=loss.dropped,
    )  # fmt: skip
    return Saved(loss.updates, outcome.moved, configs.ends, report)

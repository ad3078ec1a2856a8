"""What is earlier, where matrices train in parts: the moments of earlier inputs, and the directions or columns they leave open.

The inputs are those of what the model writes of itself, of rows that `freeze.keep` names, and of the rows of every round done
so. They are taken once, by the first process that comes, before the ranks join: it loads the start by itself. Entries do not go
by them.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from filelock import FileLock

from hftcli.data.cache import default_cache
from hftcli.errors import InputError
from hftcli.freezing.directions import Columns, Directions, list_coordinates, list_inputs
from hftcli.freezing.selection import FreezePlan, complete_plan
from hftcli.measuring.drift import NUM_SAMPLES, SAMPLE_TOKENS, draw_texts, identify_writer
from hftcli.measuring.moments import Inputs, Moments, add_source, measure_moments, read_moments, write_moments
from hftcli.methods.method import draw_rows
from hftcli.models.checkpoint import load_finished
from hftcli.models.columned import find_columns, score_columns
from hftcli.models.device import find_device, is_mixed
from hftcli.models.directed import find_basis
from hftcli.models.division import draw_choices, read_bases, read_origin, write_bases
from hftcli.models.reader import Start
from hftcli.models.sparse import find_entries
from hftcli.runs.earlier import EarlierInputs
from hftcli.runs.history import read_history
from hftcli.runs.run import Round
from hftcli.runs.seals import seal_file
from hftcli.training.stages import Assignment, Attempt, Rows

ROUND_ROWS = 256  # of a round's own rows, whose moments are added when it ends
OWN = "the model's own samples"
SAMPLES = f"{NUM_SAMPLES} samples of up to {SAMPLE_TOKENS} tokens"


def settle_parts(attempt: Attempt, task: Assignment, rows: Rows) -> Assignment:
    """The assignment with a plan that names its directions, columns or entries, which lie in the round's folder.

    The first process that comes chooses them.

    Raises:
        InputError: the moments of earlier rounds are missing, or are not those of the start's history.
    """
    if not task.plan.parts:
        return task
    round_, reads_earlier = attempt.round, task.plan.entries is None
    attempt.reporter.report("choosing")
    last = find_carried(task)
    key = make_key(task, rows, last)
    round_.bases_path.parent.mkdir(exist_ok=True)
    with FileLock(round_.bases_path.with_suffix(".lock")):
        if read_origin(round_.bases_path).get("key") == key:
            pass
        elif not reads_earlier:
            write_bases(round_.bases_path, choose_entries(task), {"key": key})
        else:
            moments = gather_moments(task, rows, list_all_inputs(task), last)
            write_moments(round_.moments_path, moments)
            bases = choose_bases(task, moments)
            energy = json.dumps(measure_closed_energy(task.plan, moments, bases))
            origin = {"key": key, "moments": seal_file(round_.moments_path).sha256, "closed_energy": energy}
            write_bases(round_.bases_path, bases, {**origin, "sources": json.dumps(moments.sources)})
    bases, origin = read_bases(round_.bases_path), read_origin(round_.bases_path)
    for method in task.methods:
        method.take_bases(bases)
    hashes = {"moments": origin["moments"]} if reads_earlier else {}
    return replace(task, plan=complete_plan(task.plan, **hashes, bases=seal_file(round_.bases_path).sha256))


def list_all_inputs(task: Assignment) -> Inputs:
    """What all matrices in the layers read, those that another round draws among them."""
    if task.spec.freeze.grain == "columns":
        return list_coordinates(task.network.units)
    return list_inputs(task.network.units, task.spec.freeze.blocks, task.network.num_heads)


def find_carried(task: Assignment) -> Path | None:
    """The moments that a round goes on from; None where it needs none, or begins them. Otherwise as `find_last_moments`."""
    # A quiet adapter's directions are in the plan, and not in `freeze`.
    return find_last_moments(task.start) if task.plan.parts and task.plan.entries is None else None


def find_last_moments(start: Path) -> Path | None:
    """The moments that the rounds behind a start have left; None where it has no such round.

    Raises:
        InputError: they are missing, or have other bytes than the start's history says.
    """
    rounds = read_history(start).rounds
    if not rounds or rounds[-1].moments is None:
        return None
    path = Round(start.parent).moments_path
    fix = f"start from {start} where its round's folder is whole, or from a model without such a history"
    if not path.exists():
        raise InputError(
            f"{start} was trained in directions or columns, and {path}, with the moments of what it learned, is missing", fix
        )
    if seal_file(path).sha256 != rounds[-1].moments:
        raise InputError(f"{path} holds moments that do not belong to the rounds behind {start}", fix)
    return path


def make_key(task: Assignment, rows: Rows, last: Path | None) -> str:
    """A hash of all that the moments, and the directions, columns or entries, come from."""
    freeze = task.spec.freeze
    shaping = {
        "start": identify_writer(task.start, task.tokenizer),
        "last": last and seal_file(last).sha256,
        "keep": rows.kept_digest,
        "samples": SAMPLES,
        "model": task.spec.model.model_dump(include={"dtype"}),
        "plan": task.plan.fingerprint,
        "seed": freeze.seed,
        "mixed": is_mixed(task.spec),
    }
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


def gather_moments(task: Assignment, rows: Rows, inputs: Inputs, last: Path | None) -> Moments:
    """The moments of all that is earlier than a round."""
    moments, kept = Moments({}, ()) if last is None else read_moments(last, inputs), f"freeze.keep {rows.kept_digest}"
    if OWN not in moments.sources:
        moments = add_source(moments, measure_own(task, inputs), OWN)
    if rows.kept is not None and kept not in moments.sources:
        moments = add_source(moments, measure_rows(task, inputs, rows.kept), kept)
    return moments


def measure_own(task: Assignment, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The moments of what the start writes of itself, which are kept for other rounds from it."""
    device, dtype = find_device(), torch.bfloat16 if is_mixed(task.spec) else torch.float32
    identity = {"start": identify_writer(task.start, task.tokenizer), "samples": SAMPLES, "inputs": inputs, "dtype": str(dtype)}
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = default_cache("moments") / f"{name}.safetensors"
    if path.exists():
        return read_moments(path, inputs).tensors
    model = load_finished(task.start, dtype, device)
    texts = [ids for ids, _ in draw_texts(model, task.tokenizer, device)]
    found = measure_moments(model, model, inputs, texts, device)
    write_moments(path, Moments(found, (OWN,)))
    return found


def measure_rows(task: Assignment, inputs: Inputs, rows: Dataset) -> dict[str, torch.Tensor]:
    """The moments of rows that the start reads."""
    device = find_device()
    model = load_finished(task.start, torch.bfloat16 if is_mixed(task.spec) else torch.float32, device)
    return measure_moments(model, model, inputs, list_token_ids(rows), device)


def choose_bases(task: Assignment, moments: Moments) -> dict[str, torch.Tensor]:
    """The directions or columns in which the plan's matrices train, by the name of the choice."""
    plan, dtype = task.plan, torch.bfloat16 if is_mixed(task.spec) else torch.float32
    if plan.rule.choice == "random":
        return draw_choices(plan.parts, dtype, plan.rule.seed, plan.round_index)
    stored, found = Start(task.spec.model, task.start, (*plan.trained, *plan.frozen)), {}
    for name, part in plan.parts.items():
        if part.choice in found:
            continue
        own = moments.tensors[part.input]
        if isinstance(part, Columns):
            scores_I = score_columns(stored.read_master(name), own[:, 0, 0], plan.rule.choice)
            found[part.choice] = find_columns(scores_I, part.num_columns)
        elif isinstance(part, Directions):
            found[part.choice] = find_basis(own, part.num_open)[0].to(dtype)
    return found


def choose_entries(task: Assignment) -> dict[str, torch.Tensor]:
    """The entries in which the plan's matrices train, by the name of the matrix."""
    plan = task.plan
    if plan.rule.choice != "magnitude":
        return draw_choices(plan.parts, torch.float32, plan.rule.seed, plan.round_index)
    stored = Start(task.spec.model, task.start, (*plan.trained, *plan.frozen))
    return {name: find_entries(stored.read_master(name), part.num_entries) for name, part in (plan.entries or {}).items()}


def measure_closed_energy(plan: FreezePlan, moments: Moments, bases: dict[str, torch.Tensor]) -> dict[str, float]:
    """By choice of the plan's matrices, the share of their input's energy that lies in what is closed."""
    found = {}
    for name, part in {part.choice: part for part in plan.parts.values()}.items():
        moments_NWW = moments.tensors[part.input].double()
        total = moments_NWW.diagonal(dim1=1, dim2=2).sum().item()
        if isinstance(part, Columns):
            is_open = moments_NWW[bases[name], 0, 0].sum().item()
        else:
            exact_NWR = torch.linalg.qr(bases[name].double())[0]
            is_open = torch.einsum("nwr,nwv,nvr->", exact_NWR, moments_NWW, exact_NWR).item()
        found[name] = 1.0 - is_open / total if total else 1.0
    return found


def describe_earlier(round_: Round, plan: FreezePlan) -> EarlierInputs | None:
    """What was earlier than a round; None where its matrices do not go by it."""
    if plan.moments is None:
        return None
    origin = read_origin(round_.bases_path)
    return EarlierInputs(sources=json.loads(origin["sources"]), closed_energy=json.loads(origin["closed_energy"]))


def list_token_ids(rows: Dataset) -> list[list[int]]:
    """What the model reads of rows: documents, packed ones apart; of pairs, the prompt with each answer."""
    if "chosen_ids" in rows.column_names:
        columns = (rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"])
        return [prompt + answer for prompt, *answers in zip(*columns, strict=True) for answer in answers]
    if "seq_lengths" not in rows.column_names:
        return list(rows["input_ids"])
    texts = []
    for ids, lengths in zip(rows["input_ids"], rows["seq_lengths"], strict=True):
        for length in lengths:
            texts.append(ids[:length])
            ids = ids[length:]
    return texts


def grow_moments(
    attempt: Attempt, task: Assignment, rows: Rows, model: torch.nn.Module, watched: torch.nn.Module,
    device: torch.device, rank: int, num_ranks: int, on_batch: Callable[[int, int], None],
) -> str | None:  # fmt: skip
    """Add what a round has read to the moments of what is earlier; all ranks together.

    Returns:
        The hash of the file, for the checkpoint's history.
    """
    if task.plan.moments is None:
        return None
    path, source = attempt.round.moments_path, f"round {task.plan.fingerprint}"
    inputs = list_all_inputs(task)
    moments = read_moments(path, inputs)
    if source not in moments.sources:  # else a start that was stopped after this has added it
        texts = list_token_ids(draw_rows(rows.train, ROUND_ROWS, source, task.spec.freeze.seed))
        found = measure_moments(model, watched, inputs, texts, device, rank, num_ranks, on_batch)
        if rank == 0:
            write_moments(path, add_source(moments, found, source))
        if num_ranks > 1:
            torch.distributed.barrier()
    return seal_file(path).sha256

"""Step checkpoints: a round that is stopped goes on from the last of them as if nothing had happened.

    steps/checkpoint-40/    being written, by transformers' Trainer and, with several processes, DeepSpeed
    steps/40/               complete: every file is on the disk, and step.json, written last, has its size and hash

They hold what trains in float32, the optimizer, the schedule, the place in the data, the generators of every rank, what was
summed up since the last row of metrics.jsonl, and what was measured before the first step; not the frozen half, which is the
start's and is loaded from there.

A checkpoint is resumed with the round, the plan, the tokens, the start and the ranks that it was written with, or not at all.
"""

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hftcli.errors import InputError, Interrupted, NewerFile
from hftcli.launching.processes import StopRequest, make_interrupted
from hftcli.models.device import name_precision
from hftcli.recipe.trainer_keys import TELLING_KEYS
from hftcli.runs.records import StepManifest
from hftcli.runs.run import Round, find_differences
from hftcli.runs.seals import FileSeal, find_damage, flush_files, list_files, seal_files
from hftcli.runs.spec import RoundSpec
from hftcli.runs.versions import describe_versions, list_versions
from hftcli.training.internals import Memory, ResumableTrainer

logger = logging.getLogger(__name__)

MANIFEST_NAME = "step.json"
# Where the start and the rows are, in a folder that may be moved; hashes say which they are.
PLACES = {"model": {"path"}, "earlier": {"__all__": {"folder"}}}
ROWS_PLACES = {"data": {"path": True, "root": True, "sources": {"__all__": {"path"}}}}
DIGEST_MARK, BODY_END = '"digest": "', '"\n}'  # around the hash of step.json, its last field


@dataclass(frozen=True)
class Origin:
    """What a step checkpoint comes from, and may be resumed with."""

    spec: RoundSpec
    fingerprint: str
    tokens_digest: str
    start_key: str


class StepKeeper(TrainerCallback):
    """Decides when a step checkpoint is written, and completes it.

    Args:
        recall: gives what this rank has to remember beside what the trainer and DeepSpeed save.
    """

    def __init__(self, round_: Round, origin: Origin, stop: StopRequest, args: TrainingArguments, recall: Callable[[], Memory]):
        self.round = round_
        self.origin = origin
        self.stop = stop
        self.args = args
        self.recall = recall
        self.last_step = 0
        self.last_time = time.monotonic()
        self.is_stopped = False
        self.num_saves = 0
        self.num_bytes = 0  # of the last one
        self.seconds = 0.0  # for completing them

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the time to the next step checkpoint from here."""
        self.last_step, self.last_time = state.global_step, time.monotonic()
        self.stop.at_once = not self.origin.spec.checkpoint.is_on  # from here on there is something to lose

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide, all ranks alike, whether to write a step checkpoint and whether to stop."""
        self.is_stopped, is_due = self._agree(self.stop.is_requested, self._is_due(state.global_step))
        control.should_save = self.is_stopped or is_due
        control.should_training_stop = control.should_training_stop or self.is_stopped

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete what transformers wrote: add what it forgets, seal it, give it its name and remove older ones."""
        started = time.perf_counter()
        unfinished = self.round.steps / f"checkpoint-{state.global_step}"
        torch.save(self.recall(), unfinished / _memory_name(args.process_index))
        seals = self._seal(unfinished)
        if args.process_index == 0:
            write_step(unfinished, self.origin, state.global_step, seals)
            remove_steps(self.round, self.origin.spec.checkpoint.keep)
        if args.world_size > 1:
            torch.distributed.barrier()  # a rank that ends here has its launcher end the others
        self.last_step, self.last_time = state.global_step, time.monotonic()
        self.num_saves += 1
        self.num_bytes = sum(seal.num_bytes for seal in seals.values())
        self.seconds += time.perf_counter() - started

    def check(self) -> None:
        """After the last step, called by all ranks together: stop here if one of them was asked to.

        Raises:
            Interrupted: they stop.
        """
        if self.stop.at_once:
            return  # the signal itself raises
        if self.is_stopped or self._agree(self.stop.is_requested)[0]:
            raise make_interrupted(self.round)

    @contextmanager
    def stopping(self, trainer: ResumableTrainer) -> Iterator[None]:
        """After the last step: where the body stops by `check`, no step is lost."""
        try:
            yield
        except Interrupted:
            self.save_end(trainer)
            raise make_interrupted(self.round) from None

    def save_end(self, trainer: ResumableTrainer) -> None:
        """Write a checkpoint of the last step, unless there is one; all ranks together."""
        if self.origin.spec.checkpoint.is_on and self.last_step < trainer.state.global_step:
            trainer.save_step()

    def _is_due(self, step: int) -> bool:
        policy = self.origin.spec.checkpoint
        by_step = policy.save_steps is not None and step % policy.save_steps == 0
        by_time = policy.save_every_minutes is not None and time.monotonic() - self.last_time > 60 * policy.save_every_minutes
        return by_step or by_time

    def _agree(self, *flags: bool) -> list[bool]:
        """Each flag as one rank or more has it: a signal may reach one alone, and their clocks differ."""
        if self.args.world_size == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32, device=self.args.device)
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
        return votes.bool().tolist()

    def _seal(self, folder: Path) -> dict[str, FileSeal]:
        """Seals of all files, on the disk; the ranks share the reading."""
        rank, num_ranks = self.args.process_index, self.args.world_size
        if num_ranks > 1:
            torch.distributed.barrier()  # all have written
        names = list_files(folder)[rank::num_ranks]
        flush_files(folder, names)
        found = [seal_files(folder, names)]
        if num_ranks > 1:
            found *= num_ranks
            torch.distributed.all_gather_object(found, found[rank])
        return {name: seal for seals in found for name, seal in sorted(seals.items())}


def find_step(round_: Round, origin: Origin, args: TrainingArguments) -> Path | None:
    """The step checkpoint to go on from, the same on every rank; None where the round begins.

    Raises:
        InputError: it belongs to something else, or all of them are damaged.
    """
    found: list[Path | None] = [None]
    if args.process_index == 0:
        clear_remains(round_)
        found = [choose_step(round_, origin)]
        if found[0] is not None:
            for step in round_.saved_steps:
                if step > int(found[0].name):  # damaged: it would count among those kept, in the place of a whole one
                    _remove(round_.steps / str(step))
    if args.world_size > 1:
        torch.distributed.broadcast_object_list(found)
    return found[0]


def choose_step(round_: Round, origin: Origin) -> Path | None:
    """The last whole step checkpoint, if it is of this origin.

    Raises:
        InputError: it is not, or all of them are damaged.
        NewerFile: a newer hft wrote it.
    """
    damage = []
    for step in round_.saved_steps:
        folder = round_.steps / str(step)
        try:
            manifest = read_step(folder)
        except NewerFile:
            raise
        except InputError as error:
            damage.append(error.message)
            logger.warning("%s; the checkpoint before it is used", error.message)
            continue
        check_origin(folder, manifest, origin)
        return folder
    if damage:
        raise InputError(
            "\n".join([*damage, "no step checkpoint is whole"]), f"remove {round_.steps} to start {round_.name} again"
        )
    return None


def read_step(folder: Path) -> StepManifest:
    """The manifest of a step checkpoint whose files are all what was written.

    Raises:
        InputError: naming what is damaged.
        NewerFile: a newer hft wrote it.
    """
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{folder} is damaged: {MANIFEST_NAME} does not read") from None
    body, mark, digest = text.rpartition(DIGEST_MARK)
    if digest != _hash_body(body + mark) + BODY_END + "\n":
        raise InputError(f"{folder} is damaged: {MANIFEST_NAME} has other bytes than were written")
    try:
        manifest = StepManifest.model_validate_json(text, context=path)
    except ValidationError as error:
        raise InputError(f"{path} is of another version of hft: {error.errors()[0]['msg']}") from None
    if manifest.step != int(folder.name):
        raise InputError(f"{folder} is damaged: its {MANIFEST_NAME} is of step {manifest.step}")
    if damage := find_damage(folder, manifest.files):
        raise InputError(f"{folder} is damaged: {'; '.join(damage)}")
    return manifest


def read_memory(folder: Path, args: TrainingArguments) -> Memory:
    """What this rank remembers."""
    return torch.load(folder / _memory_name(args.process_index), map_location="cpu", weights_only=True)


def write_step(unfinished: Path, origin: Origin, step: int, seals: dict[str, FileSeal]) -> None:
    """Complete a step checkpoint whose files are on the disk."""
    manifest = StepManifest(
        step=step, files=seals, precision=name_precision(origin.spec), versions=list_versions(), **vars(origin)
    )
    (unfinished / MANIFEST_NAME).write_text(_dump_manifest(manifest), encoding="utf-8")
    flush_files(unfinished, [MANIFEST_NAME])
    folder = unfinished.with_name(str(step))
    if folder.exists():  # written by an earlier start, and damaged, or it would have been resumed
        _remove(folder)
    unfinished.rename(folder)
    flush_files(folder.parent, [])


def remove_steps(round_: Round, keep: int) -> None:
    """Remove all step checkpoints but the last ones; the newest is complete when this is called."""
    for step in round_.saved_steps[keep:]:
        _remove(round_.steps / str(step))


def clear_remains(round_: Round) -> None:
    """Remove what an earlier start was writing or removing when it was killed: folders; a file, such as .DS_Store, is none."""
    if round_.steps.is_dir():
        for path in round_.steps.iterdir():
            if path.is_dir() and not path.name.isdigit():
                shutil.rmtree(path)


def check_origin(folder: Path, manifest: StepManifest, origin: Origin) -> None:
    """Raises: InputError: the checkpoint is of another round, plan, data or start; it says which."""
    held, given = manifest.spec.launch, origin.spec.launch
    if held.split != given.split:
        raise InputError(
            f"{folder} was written by {held.num_ranks} processes at ZeRO {held.zero_stage}, and this start has "
            f"{given.num_ranks} at ZeRO {given.zero_stage}: each process holds its own piece of the optimizer",
            f"start it with {held.num_ranks} processes in all and launch.zero_stage: {held.zero_stage}, or begin again in "
            "another --output",
        )
    # Where the ranks are, how they are reached, and who is told of them changes nothing that they compute.
    elsewhere: dict[str, Any] = {"version": True, "launch": True, **PLACES, **(ROWS_PLACES if manifest.tokens_digest else {})}
    specs = [spec.model_dump(mode="json", exclude=elsewhere) for spec in (manifest.spec, origin.spec)]
    differences = [key for key in find_differences(*specs) if key not in TELLING_KEYS]
    scoring = origin.spec.scoring
    if scoring.every_steps is None and scoring.num_points is None:  # of the ends alone, an earlier hft told none
        differences = [key for key in differences if key not in ("scoring.learned", "scoring.known")]
    if manifest.spec.version < 3 and manifest.spec.train.bf16 and origin.spec.train.bf16 is not False:
        differences = [key for key in differences if key != "train.bf16"]  # true was what null is now
    named = {"fingerprint": "the freeze plan", "tokens_digest": "the rows", "start_key": "the start's weights"}
    if manifest.version == 1:
        del named["tokens_digest"]
    for name, what in named.items():
        if getattr(manifest, name) != getattr(origin, name):
            differences.append(f"{what} ({getattr(manifest, name)[:12]}, now {getattr(origin, name)[:12]})")
    if differences:
        raise InputError(
            f"{folder} was written by another round; it differs in {', '.join(differences)}",
            "give back what was changed, or begin again in another --output",
        )
    if manifest.precision not in (None, precision := name_precision(origin.spec)):
        raise InputError(
            f"{folder} was computed in {manifest.precision}, and this start computes in {precision}: train.bf16 leaves it to "
            "the device, which is another",
            f"start it where it computes in {manifest.precision}, or begin again in another --output",
        )
    if manifest.version == 1:
        logger.warning("%s was written by an hft that kept no hash of the tokens: they could not be compared", folder)
    if others := describe_versions(manifest.versions, here := list_versions()):
        now = describe_versions(here, manifest.versions)
        logger.warning("%s was computed with %s, and goes on with %s", folder, others, now)


def _dump_manifest(manifest: StepManifest) -> str:
    """The text of step.json, with its own hash in it."""
    body = manifest.model_dump_json(indent=2).removesuffix(BODY_END)
    return body + _hash_body(body) + BODY_END + "\n"


def _hash_body(body: str) -> str:
    """The hash of a manifest's text in which the hash itself is empty."""
    return hashlib.sha256((body + BODY_END).encode()).hexdigest()


def _memory_name(rank: int) -> str:
    return f"memory_{rank}.pt"


def _remove(folder: Path) -> None:
    """Remove a step checkpoint so that half of one never stands under its name."""
    doomed = folder.with_name(f".{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)

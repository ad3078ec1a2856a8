"""The model card of a checkpoint: what it was made of, what it learned and forgot, how to use it. card.md.jinja has its text.

It is the README.md beside the weights, as the Hugging Face hub shows it, with metadata that the hub reads. It names no path of
the machine that it was written on.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hftcli import PACKAGE, __version__
from hftcli.freezing.selection import FreezePlan
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.sections import QUICK_START
from hftcli.reporting.headline import OBJECTIVES, describe_start, list_changes, make_headline
from hftcli.reporting.places import hide_folders
from hftcli.reporting.share import describe_share
from hftcli.runs.files import write_text
from hftcli.runs.history import PastRound, find_earlier
from hftcli.runs.made import DELTA_NAME, MergeManifest
from hftcli.runs.records import DataReport, RoundResult, Source
from hftcli.runs.run import Round, Run
from hftcli.runs.tracked import find_run
from hftcli.runs.versions import describe_versions

TEMPLATE = "card.md.jinja"
CARD_NAME = "README.md"
METADATA = ("library_name", "pipeline_tag", "license", "base_model", "base_model_relation")  # that a model takes over
EMBEDDED = "the model of tinyworld that is embedded in hft"
SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]+)")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Base:
    """What a run's model was before any training with hft.

    Attributes:
        name: a hub id, or a folder's name.
        hub_id: None where it came from no hub.
        revision: of the hub id, as it was taken.
        licence: by the hub's short names; None where the base does not say.
        rounds: of hft, that came before the run's own.
        datasets: of the hub, that these were trained on, as the card beside the run's start says.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    licence: str | None = None
    rounds: tuple[PastRound, ...] = ()
    datasets: tuple[str, ...] = ()


def write_card(run: Run, round_: Round) -> None:
    """Write the card beside the weights of a round that has just been finished, unless there is one."""
    path = round_.checkpoint / CARD_NAME
    if round_ == run.last_finished and round_.checkpoint.is_dir() and not path.exists():
        write_text(path, make_card(run, round_))


def make_card(run: Run, round_: Round, place: str | None = None, is_laid_out: bool = False) -> str:
    """The card as text.

    Args:
        round_: the last of the run's that is finished.
        place: where the model can be loaded from; null names the folder of the checkpoint by the run's name.
        is_laid_out: a delta was laid over its base, so that the model is whole.
    """
    recipe, result, base = load_recipe(run.recipe_path, is_written=True), round_.read_result(), find_base(run)
    changes, plan, own = list_changes(run), round_.read_plan(), OBJECTIVES[recipe.objective]
    name = run.folder.resolve().name
    return (
        _open_templates()
        .get_template(TEMPLATE)
        .render(
            metadata=yaml.safe_dump(_list_metadata(recipe.objective, base, _list_datasets(base, result)), sort_keys=False),
            name=name if len(run.rounds) == 1 else f"{name}, {round_.name}",
            base_name=base.name,
            objectives=" and then ".join(dict.fromkeys([*(OBJECTIVES[one.objective] for one in base.rounds), own])),
            share=f"{plan.trainable_fraction:.1%}" if plan.frozen and result.adapter is None else "",
            adapter=describe_share(plan, result) if result.adapter is not None else "",
            rounds=_describe_rounds(run.rounds.index(round_) + 1, plan),
            kept=_describe_kept(result),
            version=__version__,
            headline=make_headline(run),
            start=describe_start(run),
            changes=changes,
            is_delta=(round_.checkpoint / DELTA_NAME).exists() and not is_laid_out,
            place=place or f"{name}/rounds/{round_.name}/checkpoint",
            takes_turns=takes_turns(round_.checkpoint),
            facts=list(_list_facts(run, round_, result, base)),
            licence=base.licence,
        )
    )


def _describe_rounds(number: int, plan: FreezePlan) -> str:
    rule = plan.rule
    is_drawn = rule.trainable_fraction < 1 and rule.rank == "random" and not rule.divides
    return f" in each of {number} rounds" + ", drawn anew for each" * is_drawn if number > 1 else ""


def _describe_kept(result: RoundResult) -> str:
    """How a frozen weight is now beside what it was."""
    found = result.verification
    bits = "bit for bit as it was" + (f" once converted to {found.converted_to}" if found.converted_to else "")
    return bits + (", and what trained in directions moved in these alone, but for rounding" if found.closed_change else "")


def write_made_card(manifest: MergeManifest, output: Path) -> None:
    """Write the card of a model that `hft merge` or `hft reset` made.

    A delta that was laid over its base is the model of its run, bit for bit, and has that model's card.
    """
    source = Path(manifest.inputs["delta" if manifest.kind == "delta" else "tuned"].path)
    round_ = Round(source.parent)
    if manifest.kind == "delta" and round_.is_done and (run := find_run(round_)).last_finished == round_:
        write_text(output / CARD_NAME, make_card(run, round_, output.name, is_laid_out=True))
        return
    known = _read_metadata(source)
    metadata = {key: known[key] for key in METADATA if key in known}
    metadata["tags"] = ["half-fine-tuning", "hft", "merge"]
    inputs = [
        (role, _name_model(Path(identity.path)), ", ".join(f"`{digest[:12]}`" for digest in identity.files.values()))
        for role, identity in manifest.inputs.items()
    ]
    text = _open_templates().get_template("made.md.jinja").render(
        metadata=yaml.safe_dump(metadata, sort_keys=False), name=output.resolve().name, version=manifest.hft_version,
        how=describe_making(manifest), command="reset" if manifest.kind == "reset" else "merge", inputs=inputs,
    )  # fmt: skip
    write_text(output / CARD_NAME, text)


def _name_model(folder: Path) -> str:
    """Of a run's checkpoint the run and the round; otherwise the folder."""
    return f"{folder.parents[2].name}, {folder.parent.name}" if folder.parent.parent.name == "rounds" else folder.name


def describe_making(manifest: MergeManifest) -> str:
    """How a model was made out of others, in a sentence."""
    if manifest.kind == "interpolation":
        return f"This is the weighted mean of two models: {manifest.weight:g} of the tuned one, the rest of its base."
    if manifest.num_kept is not None and manifest.num_weights:
        share = f"{manifest.num_kept / manifest.num_weights:.2%}"
        return f"This is a tuned model of which the largest changes are kept, {share} of the weights; the rest is its base's."
    if manifest.plan is None:
        return "This is a delta laid over its base."
    plan = manifest.plan
    share = f"{(plan.num_parameters - plan.num_trainable) / plan.num_parameters:.1%}"
    moved = "" if manifest.num_moved is None else f"; {manifest.num_moved} of these {len(plan.frozen)} parameters had moved"
    return (
        f"This is a tuned model of whose weights {share} are back at the base, bit for bit{moved} "
        f"(plan `{plan.short_fingerprint}`)."
    )


def _open_templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip


def _list_metadata(objective: str, base: Base, datasets: list[str]) -> dict[str, Any]:
    """What the hub reads; what is not known is left out."""
    found: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base.licence is not None:
        found["license"] = base.licence
    if base.hub_id is not None:
        found |= {"base_model": base.hub_id, "base_model_relation": "finetune"}
    if datasets:
        found["datasets"] = datasets
    return found | {"tags": ["half-fine-tuning", "hft", objective]}


def _list_datasets(base: Base, result: RoundResult) -> list[str]:
    """The hub datasets among the sources, which have no files of this machine's and are no tasks, and those before them."""
    sources = [source for source in result.data.sources if source.num_bytes is None and result.data.format != "task"]
    return list(dict.fromkeys([*base.datasets, *(source.path for source in sources if HUB_ID.fullmatch(source.path))]))


def _count_rows(data: DataReport, source: Source) -> str:
    """The rows of a source that are trained on; of a mixture by weights, what was drawn of them."""
    if len(data.sources) == 1:
        return f"{data.num_used:,} rows used, "
    if source.num_used is None:
        return ""
    if source.weight is None:
        return f"{source.num_used:,} rows used, "
    num_drawn = source.num_sequences or 0
    if source.is_divided:
        return f"{num_drawn:,} sequences drawn from {source.num_used:,} rows, "
    return f"{num_drawn:,} of {source.num_used:,} rows drawn, "


def _list_facts(run: Run, round_: Round, result: RoundResult, base: Base) -> Iterator[tuple[str, str]]:
    spec, plan = round_.read_spec(), round_.read_plan()
    yield "base", base.name + (f", revision `{base.revision}`" if base.revision else "")
    for place, past in enumerate(base.rounds, start=1):
        yield f"round {place} before this run", f"{OBJECTIVES[past.objective]}, plan `{past.fingerprint}`"
    for earlier in run.rounds[: run.rounds.index(round_) + 1]:
        data = earlier.read_result().data
        for source in data.sources:
            yield (
                f"data: {hide_folders(source.path, [source.path])}",
                f"{_count_rows(data, source)}sha256 `{source.fingerprint}`",
            )
    yield (
        "freeze plan",
        (
            f"`{plan.fingerprint}`: {plan.num_trainable:,} of {plan.num_parameters:,} weights, by {spec.freeze.group}"
            f"{plan.rule.variant}, seed {spec.freeze.seed}, round {spec.index}"
        ),
    )
    yield "besides freezing", ", ".join((*spec.freeze.additions, *spec.method.names)) or "nothing"
    train = spec.train
    yield (
        "training",
        (
            f"{result.num_steps:,} steps of {train.global_batch_size}, learning rate {train.learning_rate:g} "
            f"({train.lr_scheduler_type}), {result.precision}{result.ending}"
        ),
    )
    frozen, moved = result.verification.num_frozen, len(result.verification.violations)
    yield "verified", f"{frozen - moved} of {frozen} frozen parameters bit-identical to {result.verification.start}"
    manifest = run.read_manifest()
    versions = result.versions or manifest.versions
    named = [f"{package} {versions[package]}" for package in ("torch", "transformers", "trl") if package in versions]
    others = [
        f"{name} with {different}"
        for name, found in manifest.rounds.items()
        if name != round_.name and (different := describe_versions(found.versions, versions))
    ]
    yield "versions", "; ".join([", ".join(named), *others])


def takes_turns(checkpoint: Path) -> bool:
    """Whether a checkpoint comes with a chat template."""
    config = checkpoint / "tokenizer_config.json"
    has_inline = config.exists() and '"chat_template"' in config.read_text(encoding="utf-8")
    return has_inline or (checkpoint / "chat_template.jinja").exists()


def find_base(run: Run) -> Base:
    """What the run's first round began from; where rounds of hft made that, what the first of these began from."""
    path, rounds = run.rounds[0].find_start(), find_earlier(run)
    if not rounds:
        return _read_base(path)
    known, first = _read_metadata(Path(path)), _read_base(rounds[0].parent)
    hub_id, licence = known.get("base_model") or first.hub_id, known.get("license")
    return Base(
        name=hub_id or first.name,
        hub_id=hub_id,
        revision=first.revision if hub_id == first.hub_id else None,
        licence=licence if isinstance(licence, str) else first.licence,
        rounds=rounds,
        datasets=tuple(known.get("datasets") or ()),
    )


def _read_base(path: str) -> Base:
    """By a folder's place, which may be gone, or by a hub id."""
    folder = Path(path)
    if path == QUICK_START or folder == PACKAGE / QUICK_START / "model":
        return Base(EMBEDDED, licence="apache-2.0")
    if not folder.is_dir() and not HUB_ID.fullmatch(path.partition("@")[0]):
        return Base(folder.name)
    if not folder.is_dir():
        name, _, revision = path.partition("@")
        snapshot = _find_snapshot(name, revision or None)
        if snapshot is None:
            return Base(name, name, revision or None)
        folder = snapshot
    known = _read_metadata(folder)
    licence = known.get("license") if isinstance(known.get("license"), str) else None
    if match := SNAPSHOT.search(folder.as_posix()):
        hub_id = f"{match['owner']}/{match['name']}"
        return Base(hub_id, hub_id, match["revision"], licence)
    parent = known.get("base_model")
    if "half-fine-tuning" in (known.get("tags") or ()):
        return Base(parent or folder.name, parent, None, licence)
    return Base(folder.name, None, None, licence)


def _find_snapshot(name: str, revision: str | None) -> Path | None:
    """Where the hub's cache has a model; None where it does not."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _read_metadata(folder: Path) -> dict[str, Any]:
    """The head of a folder's card; empty where it has none."""
    path = folder / CARD_NAME
    if not path.exists():
        return {}
    from huggingface_hub import metadata_load

    return metadata_load(path) or {}

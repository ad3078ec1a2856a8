"""The cache of tokens: a folder for each hash of all that shapes them, written once and read memory-mapped."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from hftcli.data.shards import open_shards
from hftcli.data.templates import find_template
from hftcli.data.tokens import get_backend
from hftcli.recipe.sections import DataSection
from hftcli.runs.files import read_model, write_model
from hftcli.runs.records import DataReport, Source

REPORT_NAME, SAMPLES_NAME = "report.json", "samples.json"
HASHED_ROWS = 1000  # rows hashed at once


def default_cache(kind: str = "tokens") -> Path:
    """Where tokens, or things of another kind, are kept: `$HFT_CACHE`, or `~/.cache/hft`."""
    return Path(os.environ.get("HFT_CACHE", "~/.cache/hft")).expanduser() / kind


def find_or_make(
    sources: tuple[Source, ...],
    data: DataSection,
    options: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    make: Callable[[Path], dict[str, Any]],
) -> tuple[Dataset, DataReport]:
    """A dataset and its report from the cache, or made and put there.

    Args:
        sources: where the rows come from, hashed.
        options: what shapes the tokens besides the data and the tokenizer.
        make: writes the tokens into an empty folder, and gives what their report says.
    """
    datasets.disable_progress_bars()  # hft shows its own
    key = make_key(data, options, tokenizer, sources)
    entry = cache / key
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{key}.lock"):  # the ranks of a round come here together: the first works, the others wait
        if not (entry / REPORT_NAME).exists():
            temporary = cache / f".{key}"
            for leftover in (temporary, entry):
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir()
            counts = make(temporary)
            digest = hash_tokens(open_shards(temporary))
            write_model(temporary / REPORT_NAME, DataReport(key=key, tokens_digest=digest, **counts))
            temporary.replace(entry)
        report = read_model(entry / REPORT_NAME, DataReport)
    # The same bytes may have been read at another place.
    places = zip(report.sources, sources, strict=True)
    moved = tuple(source.model_copy(update={"path": place.path, "files": place.files}) for source, place in places)
    return open_shards(entry), report.model_copy(update={"sources": moved})


def make_key(
    data: DataSection, options: dict[str, Any], tokenizer: PreTrainedTokenizerBase, sources: tuple[Source, ...]
) -> str:
    """A hash of all that shapes the tokens. What it left out would be trained on stale."""
    template = find_template(tokenizer)
    shaping = {
        "sources": [source.fingerprint for source in sources],
        "data": data.model_dump(exclude={"path": True, "root": True, "sources": {"__all__": {"path"}}}),
        "options": options,
        "tokenizer": get_backend(tokenizer).to_str(),
        "special_tokens": tokenizer.special_tokens_map,
        "template": template and [template.source, template.tool_source],
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "trl")},
        "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(Path(__file__).parent.glob("*.py"))],
    }
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


def hash_tokens(dataset: Dataset) -> str:
    """A hash of what is trained on, whatever made it and however it is stored: the lengths and numbers of each column."""
    digest = hashlib.sha256()
    for name in sorted(dataset.column_names):
        lengths, numbers = hashlib.sha256(), hashlib.sha256()
        for batch in dataset.select_columns(name).with_format("arrow").iter(HASHED_ROWS):
            lists = batch[name].combine_chunks()
            lengths.update(lists.value_lengths().to_numpy().astype("<i4"))
            numbers.update(lists.flatten().to_numpy().astype("<i4"))
        digest.update(f"{name} {lengths.hexdigest()} {numbers.hexdigest()}\n".encode())
    return digest.hexdigest()

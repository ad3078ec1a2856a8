"""What stands beside a checkpoint's weights: config, generation config, tokenizer with chat template.

They are the start's, as they are in its files, with no more changed than training settles: with which token an answer ends, the
chat template, the data type where the recipe gives one, and a token to pad with where there is none. So whatever a trainer sets
for itself on the model's config, as that no cache is used, is not saved. Code of its own (`auto_map`) that a start names is not
named any more: what trained is the library's class, and the code does not come along.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from hftcli.freezing.positions import read_config
from hftcli.runs.records import AnswerEnds

CONFIG_NAME, GENERATION_NAME = "config.json", "generation_config.json"


@dataclass(frozen=True)
class Configs:
    """The files of a checkpoint that are not weights.

    Attributes:
        config, generation: contents of config.json and generation_config.json.
        vocabularies: files of the start that a fast tokenizer needs no more, and other programs do.
        ends: what of them says where an answer ends.
    """

    config: dict[str, Any]
    generation: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    vocabularies: tuple[Path, ...]
    ends: AnswerEnds

    def write(self, folder: Path) -> None:
        """Write them all into a folder."""
        self.tokenizer.save_pretrained(folder)
        for file in self.vocabularies:
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
        for name, content in ((CONFIG_NAME, self.config), (GENERATION_NAME, self.generation)):
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def settle_configs(
    start: Path,
    architecture: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str | None,
    trained_ends: Sequence[int],
) -> Configs:
    """The configs of a checkpoint that was trained from a start.

    Args:
        architecture: the model's class, as transformers names it.
        tokenizer: the start's, with the chat template that was trained.
        dtype: `model.dtype`.
        trained_ends: tokens with which the trained answers end; the first is that of most.
    """
    config, generation = read_config(start / CONFIG_NAME), read_generation(start)
    own = _list_ids(generation.get("eos_token_id"))
    ends = list(dict.fromkeys((*trained_ends, *own)))
    if added := [token for token in ends if token not in own]:
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        generation.pop("_from_model_config", None)  # it is no more
        if not set(added) <= set(_list_ids(config.get("eos_token_id"))):  # for programs that read no generation config
            config["eos_token_id"] = generation["eos_token_id"]
    if generation.get("pad_token_id") is None and tokenizer.pad_token_id is not None:
        generation["pad_token_id"] = tokenizer.pad_token_id
    config["architectures"] = [architecture]
    for settings in (config, tokenizer.init_kwargs):
        settings.pop("auto_map", None)
    if dtype is not None:
        config.pop("torch_dtype", None)  # the older name
        config["dtype"] = dtype
    report = AnswerEnds(
        trained=tuple(tokenizer.convert_ids_to_tokens(list(trained_ends))),
        trained_ids=tuple(trained_ends),
        added_ids=tuple(added),
        eos_token_ids=tuple(ends) if added else tuple(own),
    )
    return Configs(config, generation, tokenizer, tuple(sorted(start.glob("*.model"))), report)


def read_ends(folder: Path) -> tuple[int, ...]:
    """The tokens at which a checkpoint's own generation stops."""
    return tuple(_list_ids(read_generation(folder).get("eos_token_id")))


def read_generation(folder: Path) -> dict[str, Any]:
    """A checkpoint's generation config, as in its file; where it has none, what transformers makes of its config."""
    if (folder / GENERATION_NAME).exists():
        return read_config(folder / GENERATION_NAME)
    made = GenerationConfig.from_pretrained(folder, config_file_name=CONFIG_NAME, _from_model_config=True).to_diff_dict()
    return {name: value for name, value in made.items() if not name.startswith("_")}


def _list_ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]

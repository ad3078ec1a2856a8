"""What the tests of data share: a conversation, rows written to a file, and the short way from them to tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trl
from transformers import PreTrainedTokenizerBase

from hftcli.data.formats import Row
from hftcli.data.prepare import prepare_dataset, prepare_pairs
from hftcli.data.rows import Faults, RowReader
from hftcli.data.sources import find_places
from hftcli.data.tokens import IGNORED, tokenize_examples
from hftcli.data.turns import Lost
from hftcli.recipe.recipe import Objective
from hftcli.recipe.sections import DataSection, TrainSection
from hftcli.runs.records import DataReport
from hftcli.tasks.examples import Example


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASK, REPLY = say("user", "Which bird is it?"), say("assistant", "A heron.")
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "look a word up",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "heron"}}}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    ("What is 2 + 2?", "4.\n\n  Always  4"),
    ("用中文说你好", "你好！"),
    ("\nAnd in Greek? ", "Γειά σου 🙂 "),
]
CONVERSATION = [SYSTEM] + [
    message
    for question, answer in TURNS
    for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
]
ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
INSTRUCTION, CUE = "Sum it up.\nText:\n", "\nSummary:"


def make_long(body: str, answer: str = "A") -> Example:
    return Example(INSTRUCTION + body + CUE, answer, (len(INSTRUCTION), len(INSTRUCTION + body)))


def write_jsonl(path: Path, rows: list[Any]) -> DataSection:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return DataSection(path=str(path))


def read_rows(data: DataSection, objective: Objective = "sft") -> tuple[list[Row], str]:
    """The rows of a file in canonical form, and their format; a bad one is refused."""
    [place] = find_places(data)
    faults = Faults(place.name)
    reader = RowReader(place, objective, faults, Lost(data.ignore_columns))
    rows = [row for _, row in reader]
    faults.refuse(reader.num_rows)
    return rows, reader.format


def tokenize(
    rows: list[Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, **options: bool
) -> list[tuple[list[int], list[int]]]:
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset, _ = prepare_dataset(data, TrainSection(**options), tokenizer, tmp_path / "cache")
    return [(row["input_ids"], row["labels"]) for row in dataset]


def tokenize_whole(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    return [(ids, labels.tolist()) for ids, labels in tokenize_examples(examples, "middle", 10_000, tokenizer)[0]]


def read_trained(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode([label for label in labels if label != IGNORED], skip_special_tokens=False)


def read_template(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def lay_out_chatml(opening: str = "") -> list[tuple[str, bool]]:
    pieces = [("<|im_start|>system\nBe brief.<|im_end|>\n", False)]
    for question, answer in TURNS:
        pieces.append((f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False))
        pieces += [(f"{opening}{answer}<|im_end|>", True), ("\n", False)]
    return pieces


def prepare(row: dict, tokenizer: PreTrainedTokenizerBase, folder: Path, **data: Any) -> tuple[str, str, DataReport]:
    """The text of a row, what of it is trained, and the report; of a pair, with the chosen answer."""
    section = write_jsonl(folder / "rows.jsonl", [row]).model_copy(update=data)
    if "rejected" in row:
        [pair], report = prepare_pairs(section, tokenizer, folder / "cache")
        return tokenizer.decode(pair["prompt_ids"] + pair["chosen_ids"]), tokenizer.decode(pair["chosen_ids"]), report
    [made], report = prepare_dataset(section, TrainSection(), tokenizer, folder / "cache")
    return tokenizer.decode(made["input_ids"]), read_trained(made["input_ids"], made["labels"], tokenizer), report


def render(messages: list[dict], tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options).rstrip()

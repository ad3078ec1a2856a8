"""Instructions until something is forgotten: a chat model on real rows for 400 steps, by what trains and with what beside it.

    python scripts/reproduce_instructions.py --model SmolLM2-135M-Instruct --data FOLDER [--rows NAME] [--arms NAME...]

The data folder holds sft/gsm8k_train.jsonl and sft/dolly3k.jsonl, eval/arc_easy_test.jsonl, eval/nq_open_val.jsonl,
eval/hellaswag_val_1200.jsonl and eval/ifeval.jsonl, and text/wikitext2_test.jsonl. Of the rows those are taken that fit into
160 tokens: 800 in batches of 2, and 32 others to measure on. Within a run, at four places, by likelihood: these, the right
answers to questions of ARC and NQ-open, and how passages of Wikipedia go on. Before and after it: IFEval, whose answers are
written, HellaSwag, and how far the model has moved from its start on that one's own samples. IFEval's rules need
`pip install 'hftcli[eval]'`.

A run takes twenty minutes of one core. One that instructions.json beside this file has is not run again; delete it there,
or the file, to measure it anew. The tables of scripts/README.md are made of it.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproduce_stream import DEFENCES, DEFENDED, SEEDS, WAYS, read_lines, run_hft

from hftcli.comparing.points import read_point

RESULTS = Path(__file__).with_name("instructions.json")
ROWS = {"GSM8K": "gsm8k_train", "Dolly": "dolly3k"}
QUESTIONS = {"ARC": "arc_easy_test", "NQ-open": "nq_open_val"}
ASKED_AT_ENDS = {
    "IFEval": ("ifeval", "score", ("--max-examples", "60", "--max-new-tokens", "256")),
    "HellaSwag": ("hellaswag_val_1200", "acc_norm", ("--max-examples", "48", "--no-chat")),
}
TEXTS = "Wikipedia"
MAX_LENGTH = 160  # tokens of a row with its answer
NUM_TRAINED, NUM_HELD_OUT, NUM_ASKED, NUM_TEXTS, NUM_WORDS = 800, 32, 40, 16, 40
RATES = (1e-4, 3e-5)
LEVERS = ("self-replay", "anchor")  # those that helped most on the stream
ARMS = {way: WAYS[way] for way in DEFENDED} | {
    f"{way} + {lever}": WAYS[way] | DEFENCES[lever] for lever in LEVERS for way in DEFENDED
}  # fmt: skip
COMMON = {
    "data.name": "null", "data.max_length": MAX_LENGTH, "train.global_batch_size": 2, "train.per_device_train_batch_size": 2,
    "train.activation_checkpointing": "false", "model.dtype": "float32", "train.bf16": "false", "launch.num_processes": 1,
    "launch.zero_stage": 0, "checkpoint.save_every_minutes": "null", "eval.generate": "false", "eval.num_points": 4,
    "eval.max_examples": NUM_ASKED,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="with a chat template")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--rows", choices=ROWS, default="GSM8K")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=DEFENDED, metavar="NAME", help=f"of {'; '.join(ARMS)}")
    parser.add_argument("--rates", nargs="*", type=float, choices=RATES, default=RATES)
    parser.add_argument("--output", type=Path, default=Path("runs/instructions"), metavar="FOLDER")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    case = Case(arguments.model, arguments.rows, arguments.data, arguments.output / arguments.model.name / arguments.rows)
    case.write_files()
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    found = known.setdefault(arguments.model.name, {}).setdefault(arguments.rows, {})
    if "start" not in found:
        found["start"] = case.ask(arguments.model)
    missing = [
        (arm, rate, seed)
        for rate in arguments.rates
        for seed in SEEDS
        for arm in arguments.arms
        if all(run["seed"] != seed for run in found.get(arm, {}).get(f"{rate:g}", ()))
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for (arm, rate, _), run in zip(missing, pool.map(lambda job: case.measure(found["start"], *job), missing), strict=True):
            found.setdefault(arm, {}).setdefault(f"{rate:g}", []).append(run)
            RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Case:
    """The runs of one model on rows of one kind, which begin and are measured alike.

    Attributes:
        data: the folder that everything is read from.
        folder: of what is written.
    """

    model: Path
    rows: str
    data: Path
    folder: Path

    def write_files(self) -> None:
        """The rows that fit, those that are held out, and passages in two halves, once."""
        known = self.folder / "known.jsonl"
        if known.exists():
            return
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model)
        lines = read_lines(self.data / "sft" / f"{ROWS[self.rows]}.jsonl")
        fitting = [
            line for line in lines if len(tokenizer.apply_chat_template(read_messages(line), return_dict=False)) < MAX_LENGTH
        ]
        assert len(fitting) >= NUM_TRAINED + NUM_HELD_OUT, f"{self.rows} has {len(fitting)} rows that fit"
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, part in (("train", fitting[:NUM_TRAINED]), ("held-out", fitting[-NUM_HELD_OUT:])):
            (self.folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
        passages = cut_passages(read_lines(self.data / "text" / "wikitext2_test.jsonl"))
        known.write_text("".join(json.dumps(passage) + "\n" for passage in passages), encoding="utf-8")

    def measure(self, start: dict[str, float], arm: str, rate: float, seed: int) -> dict[str, Any]:
        """A run; `start` is what the model scored before.

        Returns:
            What held-out rows gained, and ARC, NQ-open and Wikipedia lost, in nats per token; the change of cross-entropy on
            the start's own samples and the KL to it, alike; what was lost of the scores on ARC, IFEval and HellaSwag, in
            points; and learning against forgetting within the run.
        """
        output = self.folder / f"{arm.replace(' + ', '-')}-{rate:g}-{seed}"
        tasks = {name: str(self.data / "eval" / f"{file}.jsonl") for name, file in QUESTIONS.items()}
        tasks |= {TEXTS: str(self.folder / "known.jsonl")}
        given = COMMON | ARMS[arm] | {
            "data.path": self.folder / "train.jsonl", "eval.held_out.path": self.folder / "held-out.jsonl",
            "eval.tasks": f"[{','.join(tasks.values())}]", "train.learning_rate": rate, "train.seed": seed, "freeze.seed": seed,
        }  # fmt: skip
        options = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
        run_hft(["sft", "--recipe", "smollm2", "--model", str(self.model), "--output", str(output), *options])
        round_ = output / "rounds" / "00-sft"
        scores = json.loads((round_ / "scores.json").read_text(encoding="utf-8"))
        point = read_point(output, (), "nll")
        (gained,) = point.learned.values()
        lost = {name: point.lost[task] for name, task in tasks.items()}
        moved = json.loads(run_hft(["eval", "--model", str(output), "--json"]))["base_text"]
        before, after = (scores[place][tasks["ARC"]]["score"] for place in ("before", "after"))
        left = self.ask(round_ / "checkpoint")
        points = {"ARC points": 100 * (before - after)} | {f"{name} points": start[name] - left[name] for name in start}
        print(
            f"{output.name}: gained {gained:.3f}, lost {', '.join(f'{name} {value:+.3f}' for name, value in lost.items())}",
            file=sys.stderr,
            flush=True,
        )
        found = {"gained": gained, **lost, "own": moved["nll_change"], "kl": moved["kl"], **points}
        trail = [tuple(round(value, 4) for value in place) for place in point.trail]
        return {"seed": seed} | {name: round(value, 4) for name, value in found.items()} | {"trail": trail}

    def ask(self, model: Path) -> dict[str, float]:
        """What a model scores on IFEval and HellaSwag, in points."""
        found = {}
        for name, (file, metric, options) in ASKED_AT_ENDS.items():
            task = str(self.data / "eval" / f"{file}.jsonl")
            told = json.loads(run_hft(["eval", "--model", str(model), "--tasks", task, *options, "--json"]))["tasks"][task]
            found[name] = 100 * (told | told["others"])[metric]
        return found


def read_messages(line: str) -> list[dict[str, str]]:
    """A row as a conversation."""
    row = json.loads(line)
    if "messages" in row:
        messages: list[dict[str, str]] = row["messages"]
        return messages
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]


def cut_passages(lines: list[str]) -> Iterator[dict[str, str]]:
    """The beginnings of the first articles, in two halves."""
    for line in lines[:NUM_TEXTS]:
        words = json.loads(line)["text"].split()
        begun, goes_on = (" ".join(words[place : place + NUM_WORDS]) for place in (0, NUM_WORDS))
        yield {"text": begun, "continuation": f" {goes_on}"}


if __name__ == "__main__":
    main()

"""Four tasks of TRACE in a row on a real model: what each way to choose what trains learns, and what it forgets.

    python scripts/reproduce_stream.py --model MiniMind2-Small --trace FOLDER --texts FILE [--bench NAME] [--arms NAME...]

Of each task the first 64 rows are trained on and the last 32 asked, of those that fit into 160 tokens, so that nothing is cut;
16 steps of 8 rows a task. FILE has a `text` or `messages` on each line, of the kind that the model knows: how 16 of them go on
is asked as well. All is measured by likelihood, three times within each task, at two learning rates with three seeds each; most
levers at the higher alone.

A run that stream.json beside this file has is not run again; delete it there, or the file, to measure it anew. One that is
finished under --output is not run again either. The tables of scripts/README.md are made of stream.json.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hftcli.comparing.points import read_point
from hftcli.errors import VerificationError

RESULTS = Path(__file__).with_name("stream.json")
TASKS = ("FOMC", "NumGLUE-cm", "Py150", "NumGLUE-ds")
MAX_LENGTH = 160  # tokens of a row with its answer
NUM_TRAINED, NUM_ASKED, NUM_TEXTS = 64, 32, 16
SEEDS = (100, 101, 102)
COMMON = {
    "continual.order": "null", "continual.protocol": "null", "train.num_train_epochs": 2, "train.global_batch_size": 8,
    "train.per_device_train_batch_size": 8, "train.activation_checkpointing": "false", "train.lr_scheduler_type": "linear",
    "model.dtype": "float32", "train.bf16": "false",
    "eval.generate": "false", "eval.num_points": 3, "launch.num_processes": 1, "launch.zero_stage": 0,
    "checkpoint.save_every_minutes": "null",
}  # fmt: skip
FULL = {"freeze.trainable_fraction": 1.0}
QUIET = {"freeze": "quiet"}
WAYS: dict[str, dict[str, object]] = {
    "full": FULL,
    "half": {},
    "quiet": QUIET,
    "top half": {"freeze.frozen_prefix": 0.5, "freeze.embeddings": "freeze", "freeze.head": "freeze"},
    "columns, SSU": {"freeze.grain": "columns"},
    "columns, quiet": {"freeze.grain": "columns", "freeze.part": "quiet"},
    "directions, random": {"freeze.grain": "directions", "freeze.part": "random"},
    "directions, quiet": {"freeze.grain": "directions"},
    "blocks, quiet": {"freeze.grain": "directions", "freeze.blocks": 32},
    "LoRA": FULL | {"method.lora": "{r: 16}"},
    "LoRA, quiet": FULL | {"method.lora": "{r: 16, quiet: true}"},
}
BLOCKS = {"freeze.group": "layer", "freeze.trainable_fraction": 0.125, "eval.num_points": "null"}  # a layer or two
FAMILY: dict[str, dict[str, object]] = {
    "entries, random": {"freeze.grain": "entries", "freeze.part": "random"},
    "entries, largest": {"freeze.grain": "entries", "freeze.part": "magnitude"},
    "SpIEL": {"freeze.grain": "entries", "freeze.part": "spiel", "freeze.trainable_fraction": 0.05, "eval.num_points": "null"},
    "half, redrawn": {"freeze.redraw": "{every: 4}", "eval.num_points": "null"},
    "LISA": BLOCKS | {"freeze.trainable_fraction": 0.25, "freeze.redraw": "{every: 4}"},
    "BAdam": BLOCKS | {
        "freeze.redraw": "{every: 2, order: cyclic}", "freeze.embeddings": "freeze", "freeze.head": "freeze",
    },
    "HiFT": BLOCKS | {"freeze.redraw": "{every: 1, order: ascending, states: keep, schedule: cycle}"},
    "DoRA": FULL | {"method.peft": "{type: LORA, r: 16, use_dora: true}"},
    "IA3": FULL | {"method.ia3": "{}"},
    "OSF": FULL | {"method.peft": "{type: OSF}"},
    "decay to the start": FULL | {"freeze.pull.strength": 100},
}  # fmt: skip
REPLAY: dict[str, dict[str, object]] = {
    "replay 10 %": {"method.replay.fraction": 0.1},
    "replay 1 %": {"method.replay.fraction": 0.01},
}
DEFENCES: dict[str, dict[str, object]] = REPLAY | {
    "self-replay": {"method.self_replay.fraction": 0.25},
    "anchor": {"method.anchor.strength": 1.0},
    "DFT": {"method.token_weights.kind": "dft"},
    "TALR": {"method.token_weights.kind": "talr"},
    "EAFT": {"method.token_weights.kind": "eaft"},
    "STM": {"method.token_weights.kind": "stm"},
    "PSFT": {"method.token_weights.kind": "psft"},
    "IFT": {"method.ift": "{}"},
    "distillation": {"method.distill.demonstrations": 1},
}
AT_BOTH_RATES = (*REPLAY, "self-replay", "anchor")
DEFENDED = ("full", "half", "quiet")
LEVERS = {f"{way} + {name}": WAYS[way] | given for name, given in DEFENCES.items() for way in DEFENDED}
REPLAYED = {f"{way} + {name}": WAYS[way] | given for name, given in REPLAY.items() for way in WAYS}
BENCHES = {
    "ways": WAYS | REPLAYED,
    "family": {name: WAYS[name] for name in (*DEFENDED, "LoRA")} | FAMILY,
    "levers": {name: WAYS[name] for name in DEFENDED} | LEVERS,
}
ARMS = WAYS | FAMILY | REPLAYED | LEVERS
RATES = {"stories15M": (1e-4, 3e-4), "MiniMind2-Small": (3e-5, 1e-4)}
FACTORS = {"LoRA": 5, "LoRA, quiet": 5, "DoRA": 5, "SpIEL": 5, "IA3": 50}  # fewer weights take larger rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help=f"of {' or '.join(RATES)}")
    parser.add_argument("--trace", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, default=Path("runs/stream"), metavar="FOLDER")
    parser.add_argument("--bench", choices=BENCHES, default="ways", help="arms that are compared with one another")
    parser.add_argument("--arms", nargs="*", choices=ARMS, metavar="NAME", help=f"those alone, of {'; '.join(ARMS)}")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    model = arguments.model.name
    if model not in RATES:
        parser.error(f"--model {arguments.model}: learning rates are known for {' and '.join(RATES)}")
    stream = Stream(arguments.model, arguments.output / model)
    stream.write_rows({task: read_rows(arguments.trace, task) for task in TASKS}, arguments.texts)
    known = read_results().get(model, {})
    jobs = [
        (arm, rate, seed)
        for arm in arguments.arms or BENCHES[arguments.bench]
        for seed in SEEDS
        for rate in list_rates(model, arm)
    ]
    missing = [
        (arm, rate, seed)
        for arm, rate, seed in jobs
        if all(run["seed"] != seed for run in known.get(arm, {}).get(f"{rate:g}", ()))
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for (arm, rate, _), run in zip(missing, pool.map(lambda job: stream.measure(*job), missing), strict=True):
            keep_result(model, arm, rate, run)


def read_results() -> dict[str, Any]:
    """What is known: by model and arm."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def read_rows(trace: Path, task: str) -> list[dict[str, str]]:
    """All rows of a task, of whichever split."""
    return [row for split in ("train", "eval", "test") for row in json.loads((trace / task / f"{split}.json").read_text())]


def keep_result(model: str, arm: str, rate: float, run: dict[str, Any]) -> None:
    """Add a run of an arm at a learning rate."""
    results = read_results()
    results.setdefault(model, {}).setdefault(arm, {}).setdefault(f"{rate:g}", []).append(run)
    results[model] = {name: results[model][name] for name in ARMS if name in results[model]}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def list_rates(model: str, arm: str) -> list[float]:
    """The learning rates of an arm; of levers, the higher alone, but for some beside what the bench `levers` has."""
    way, _, lever = arm.partition(" + ")
    rates = [rate * FACTORS.get(way, 1) for rate in RATES[model]]
    return rates if not lever or (lever in AT_BOTH_RATES and way in DEFENDED) else rates[-1:]


@dataclass(frozen=True)
class Stream:
    """The runs on one model, all with the same tasks.

    Attributes:
        folder: of the rows and of all runs.
        max_length: tokens of a row. Of the tasks those are taken that fit, so that hft cuts none.
        is_cut: rows whose answers take up to half of it are taken as well, and hft cuts their prompts.
    """

    model: Path
    folder: Path
    tasks: tuple[str, ...] = TASKS
    max_length: int = MAX_LENGTH
    is_cut: bool = False

    def write_rows(self, rows: Mapping[str, list[dict[str, str]]], texts: Path) -> None:
        """The tasks' rows that fit, and texts in two halves, once."""
        if (self.folder / "known.jsonl").exists():
            return
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model)

        def fits(row: dict[str, str]) -> bool:
            if self.is_cut:
                return len(tokenizer(row["answer"])["input_ids"]) < self.max_length // 2
            return len(tokenizer(row["prompt"] + row["answer"])["input_ids"]) < self.max_length - 2

        for task in self.tasks:
            fitting = [row for row in rows[task] if fits(row)]
            assert len(fitting) >= NUM_TRAINED + NUM_ASKED, f"{task} has {len(fitting)} rows that fit"
            (self.folder / "rows" / task).mkdir(parents=True, exist_ok=True)
            for split, part in (
                ("train", fitting[:NUM_TRAINED]),
                ("eval", fitting[-NUM_ASKED:]),
                ("test", fitting[-NUM_ASKED:]),
            ):
                (self.folder / "rows" / task / f"{split}.json").write_text(json.dumps(part))
        halves = []
        for line in read_lines(texts):
            if len(halves) == NUM_TEXTS:
                break
            half = halve(json.loads(line))
            if len(tokenizer(half["question"] + half["answers"][0])["input_ids"]) < MAX_LENGTH - 20:  # room for a chat template
                halves.append(half)
        (self.folder / "known.jsonl").write_text("".join(json.dumps(half) + "\n" for half in halves))

    def measure(self, arm: str, rate: float, seed: int, own: Mapping[str, object] = MappingProxyType({})) -> dict[str, Any]:
        """A run, in nats per token; `own` are settings besides those of the arm.

        Returns:
            What was left of each task right after it, what was lost of it by the end, what is left there, and how the texts
            fared; and learning against forgetting within the run. Of a run that hft stopped, as gradients were so small that
            weights did not move, the task.
        """
        output = self.folder / f"{arm.replace(',', '').replace(' ', '-').replace('%', 'percent')}-{rate:g}-{seed}"
        given = COMMON | ARMS[arm] | own | {
            "continual.tasks": f"[{','.join(self.tasks)}]", "data.max_length": self.max_length,
            "data.root": self.folder / "rows", "eval.tasks": f"[{self.folder / 'known.jsonl'}]", "train.learning_rate": rate,
            "freeze.seed": seed, "train.seed": seed,
        }  # fmt: skip
        options = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
        try:
            run_hft(["continual", "--recipe", "trace", "--model", str(self.model), "--output", str(output), *options])
        except subprocess.CalledProcessError as error:
            if error.returncode != VerificationError.exit_code:
                raise
            last = max(path.parent.name for path in output.glob("rounds/*/result.json"))
            print(f"{output.name}: weights that train did not move in {last}", file=sys.stderr, flush=True)
            return {"seed": seed, "stopped": last.partition("-")[2]}
        report = json.loads(run_hft(["report", str(output), "--json"]))
        ((_, text),) = report["general_nll"].items()
        nll = report["nll"]
        print(
            f"{output.name}: learned to {nll['plasticity']:.2f}, forgot {nll['forgetting']:+.2f}", file=sys.stderr, flush=True
        )
        found = {"learned": nll["plasticity"], "forgot": nll["forgetting"], "left": nll["op"], "text": text["change"]}
        trail = [tuple(round(value, 4) for value in place) for place in read_point(output, (), "nll").trail]
        return {"seed": seed} | {name: round(value, 4) for name, value in found.items()} | {"trail": trail}


def read_lines(path: Path) -> list[str]:
    """Of a file of JSONL, in whose strings there may be other ends of lines."""
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")


def halve(row: dict[str, Any]) -> dict[str, Any]:
    """The first turn of a conversation and its answer, or 40 words of a text and the next 40."""
    if "messages" in row:
        question, answer = [turn["content"] for turn in row["messages"] if turn["role"] != "system"][:2]
        return {"question": question, "answers": [answer]}
    words = row["text"].split()[:80]
    return {"question": " ".join(words[:40]), "answers": [" " + " ".join(words[40:])]}


def run_hft(arguments: Sequence[str]) -> str:
    """What a command printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "hftcli", *arguments], check=True, capture_output=True, text=True, env=environment
    ).stdout


if __name__ == "__main__":
    main()

"""A forgetting budget kept (scripts/README.md): what a model learns within it, beside the same run without one.

    python scripts/reproduce_budget.py [--output FOLDER] [--model FOLDER --stories FILE --rows FILE] [--seeds 5] [NAME...]

tinyworld: half of the embedded model takes a new skill, and at most 10 points of the facts that it knew may be lost. stories:
a model of children's stories (stories260K) takes Dolly's answers, and at most 0.15 nats per token may be lost of how stories go
on. Five seeds, each with `stop.max_forgetting` and without. Finished runs are not run again. Prints Markdown, and
writes what it found into FOLDER/budget.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

COMMON = {"launch.num_processes": 1, "train.bf16": "false", "eval.num_points": 10}
SETTINGS: dict[str, tuple[str, float, dict[str, object]]] = {
    "tinyworld": ("score", 0.1, {
        "eval.tasks": "[tinyworld/facts, tinyworld/skill]", "eval.max_examples": 150, "train.max_steps": 110,
        "train.learning_rate": 7e-4,
    }),
    "stories": ("nll", 0.15, {
        "freeze.trainable_fraction": 1.0, "data.max_length": 192, "train.max_steps": 40, "train.learning_rate": 5e-4,
        "train.global_batch_size": 8, "train.per_device_train_batch_size": 8,
    }),
}  # fmt: skip


def write_rows(folder: Path, stories: Path, rows: Path) -> dict[str, object]:
    """Dolly's short answers, some of them held out; and stories, of which a model is to tell how each goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    dolly = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    turns = [[turn["content"] for turn in row["messages"]] for row in dolly]
    short = [texts for texts in turns if len(texts) == 2 and sum(map(len, texts)) < 300]
    pairs = [{"prompt": f"{question}\n", "completion": answer} for question, answer in short][:340]
    told = [json.loads(line)["text"] for line in stories.read_text(encoding="utf-8").splitlines()]
    halves = [(text[:250], text[250:400]) for text in told if len(text) >= 400][:40]
    known = [
        {"question": first, "choices": [last, halves[index - 1][1]], "answer": 0} for index, (first, last) in enumerate(halves)
    ]
    files = {"rows": pairs[60:], "held_out": pairs[:60], "known": known}
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {
        "data.path": folder / "rows.jsonl", "eval.tasks": f"[{folder / 'known.jsonl'}]",
        "eval.held_out.path": folder / "held_out.jsonl",
    }  # fmt: skip


def run(folder: Path, settings: dict[str, object]) -> dict[str, object]:
    """What a run of one round left."""
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hftcli", "sft", "--output", str(folder), *options]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    print(f"{folder} is done", file=sys.stderr, flush=True)
    round_ = folder / "rounds" / "00-sft"
    return {name: json.loads((round_ / f"{name}.json").read_text()) for name in ("scores", "result")}


def describe(found: dict, by: str) -> dict[str, float]:
    """Learning and forgetting of the model that was kept, out of its own scores."""
    before, after, steps = found["scores"]["before"], found["scores"]["after"], found["result"]
    points = {point["step"]: point for point in found["scores"]["points"]}
    kept = steps["kept_step"] or steps["num_steps"]
    sign = 1 if by == "score" else -1
    changes = {name: sign * (after[name][by] - before[name][by]) for name in before if before[name][by] is not None}
    learned = [value for name, value in changes.items() if name in ("tinyworld/skill", "held-out rows")]
    known = [-value for name, value in changes.items() if name not in ("tinyworld/skill", "held-out rows")]
    return {
        "learning": sum(learned) / len(learned), "forgetting": sum(known) / len(known), "kept_step": kept,
        "num_steps": steps["num_steps"], "as_measured": points[kept]["forgetting"][by]["mean"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"rows: {'; '.join(SETTINGS)}")
    parser.add_argument("--output", type=Path, default=Path("runs/budget"))
    parser.add_argument("--model", type=Path, help="of stories: its folder")
    parser.add_argument("--stories", type=Path, help='of stories: {"text": ...} on each line')
    parser.add_argument("--rows", type=Path, help='of stories: {"messages": [...]} on each line')
    parser.add_argument("--seeds", type=int, default=5)
    asked = parser.parse_args()
    rows = []
    for name in asked.names or SETTINGS:
        by, budget, own = SETTINGS[name]
        values = {**COMMON, **own}
        if name == "stories":
            values |= {"model.path": asked.model, **write_rows(asked.output / "rows", asked.stories, asked.rows)}
        for seed in range(1, asked.seeds + 1):
            seeds = {"freeze.seed": seed, "train.seed": seed}
            stopped = {"stop.by": by, "stop.max_forgetting": budget}
            row: dict[str, object] = {"name": name, "by": by, "budget": budget, "seed": seed}
            for kind, more in (("stopped", stopped), ("unstopped", {})):
                row[kind] = describe(run(asked.output / f"{name}-{kind}-{seed}", values | seeds | more), by)
            rows.append(row)
    (asked.output / "budget.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("| model | seed | budget | forgotten | learned | step kept | without a budget: forgotten | learned | steps |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        factor, form = (100, ".1f") if row["by"] == "score" else (1, ".3f")
        one, other = row["stopped"], row["unstopped"]
        numbers = [row["budget"], one["forgetting"], one["learning"]], [other["forgetting"], other["learning"]]
        first, last = ([f"{factor * value:{form}}" for value in part] for part in numbers)
        kept = f"{one['kept_step']} of {one['num_steps']}"
        print(f"| {row['name']} | {row['seed']} | {' | '.join(first)} | {kept} | {' | '.join(last)} | {other['num_steps']} |")


if __name__ == "__main__":
    main()

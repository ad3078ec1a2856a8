"""Where the quiet half might break: tasks that fill the space, tasks that ask the same inputs, long training, a small share.

    python scripts/reproduce_limits.py --model stories15M --trace FOLDER --texts FILE [--output FOLDER] [--jobs 2]

Four cases beside what reproduce_stream.py measures, each with half and with the quiet half, at the higher of its learning rates
and with its seeds:

    eight tasks           TRACE's order 1, whole; rows of at most 256 tokens, longer prompts cut (five minutes of a core a run)
    the same inputs       FOMC's sentences three times: their stance, then their first word, then their last
    four times as long    the four tasks, 64 steps each instead of 16
    a tenth               the four tasks, with a share of 0.1

What limits.json beside this file has is not run again. The table of scripts/README.md is made of it.
"""

import argparse
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from reproduce_stream import MAX_LENGTH, RATES, SEEDS, TASKS, Stream, read_rows

RESULTS = Path(__file__).with_name("limits.json")
ARMS = ("half", "quiet")
EIGHT = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")
SENTENCE = re.compile(r"Text:\n(.*)\nStance:", re.DOTALL)  # of a prompt of FOMC


class Case(NamedTuple):
    """Tasks in a row, and the settings that are others than those of reproduce_stream.py."""

    tasks: tuple[str, ...] = TASKS
    max_length: int = MAX_LENGTH
    is_cut: bool = False
    given: Mapping[str, object] = MappingProxyType({})


CASES = {
    "eight tasks": Case(EIGHT, 256, is_cut=True),
    "the same inputs": Case(("FOMC", "FOMC-first", "FOMC-last")),
    "four times as long": Case(given={"train.num_train_epochs": 8}),
    "a tenth": Case(given={"freeze.trainable_fraction": 0.1}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help=f"of {' or '.join(RATES)}")
    parser.add_argument("--trace", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, default=Path("runs/limits"), metavar="FOLDER")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    model = arguments.model.name
    if model not in RATES:
        parser.error(f"--model {arguments.model}: learning rates are known for {' and '.join(RATES)}")
    streams = {}
    for name, case in CASES.items():
        folder = arguments.output / model / name.replace(" ", "-")
        streams[name] = Stream(arguments.model, folder, case.tasks, case.max_length, case.is_cut)
        streams[name].write_rows({task: find_rows(arguments.trace, task) for task in case.tasks}, arguments.texts)
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    found = known.setdefault(model, {})
    missing = [
        (name, arm, seed)
        for name in CASES
        for seed in SEEDS
        for arm in ARMS
        if all(run["seed"] != seed for run in found.get(name, {}).get(arm, ()))
    ]

    def measure(job: tuple[str, str, int]) -> dict[str, Any]:
        name, arm, seed = job
        own = {"eval.num_points": "null", **CASES[name].given}
        run = streams[name].measure(arm, RATES[model][-1], seed, own)
        return {key: value for key, value in run.items() if key != "trail"}

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for (name, arm, _), run in zip(missing, pool.map(measure, missing), strict=True):
            found.setdefault(name, {}).setdefault(arm, []).append(run)
            RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def find_rows(trace: Path, task: str) -> list[dict[str, str]]:
    """Rows of a task of TRACE; of FOMC-first and FOMC-last the sentences of FOMC with another question."""
    name, _, place = task.partition("-")
    if name != "FOMC" or not place:
        return read_rows(trace, task)
    rows = []
    for row in read_rows(trace, name):
        if found := SENTENCE.search(row["prompt"]):
            sentence = found[1].strip()
            words = sentence.split()
            prompt = f"What is the {place} word of the following text?\nText:\n{sentence}\n{place.capitalize()} word:"
            rows.append({"prompt": prompt, "answer": {"first": words[0], "last": words[-1].rstrip(".")}[place]})
    return rows


if __name__ == "__main__":
    main()

"""Whether a recipe of `hft advise` does what was promised of it, on two tasks and two real models.

    python scripts/reproduce_advice.py --models FOLDER FOLDER --texts FILE FILE --trace FOLDER [--time 30m] [--jobs 2]

For each model, and the file of texts that it knows (as in reproduce_stream.py): a search for rows of NumGLUE-cm and one for
rows of FOMC, with 32 texts named to keep, and one for the first where nothing is named. Each recipe is trained on
three seeds that its search has not seen. The promise is kept on a seed that learned at least, and lost at most, what was
expected of a further one. A case takes the time that is given, and a few minutes.

A search or a run that is finished under --output is not done again. Leaves advice.json beside this file, from which the table
of scripts/README.md is made.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from reproduce_stream import halve, read_lines, run_hft

from hftcli.comparing.points import read_point
from hftcli.errors import OverBudget

RESULTS = Path(__file__).with_name("advice.json")
MAX_LENGTH = 160  # tokens of a row with its answer
NUM_ROWS, NUM_TEXTS = 120, 32
SEEDS = (11, 12, 13)
TASKS = ("NumGLUE-cm", "FOMC")


class Case(NamedTuple):
    """What is searched for."""

    model: Path
    task: str
    is_named: bool

    @property
    def label(self) -> str:
        """Of its folder."""
        return f"{self.model.name}-{self.task}{'' if self.is_named else '-own'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, metavar="FILE", help="of each model, what it knows")
    parser.add_argument("--trace", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--time", default="30m", help="that a search may take")
    parser.add_argument("--output", type=Path, default=Path("runs/advice"), metavar="FOLDER")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    cases = []
    for model, texts in zip(arguments.models, arguments.texts, strict=True):
        write_rows(arguments.output / model.name, model, arguments.trace, texts)
        cases += [Case(model, task, True) for task in TASKS] + [Case(model, TASKS[0], False)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(lambda case: measure(case, arguments.output, arguments.time), cases))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write_rows(folder: Path, model: Path, trace: Path, texts: Path) -> None:
    """Rows of the tasks that fit, and texts in two halves."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    folder.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in read_lines(texts)[: 4 * NUM_TEXTS]]
    short = [row for row in known if fits(tokenizer, "".join([(half := halve(row))["question"], *half["answers"]]))]
    written = {"known": [lay_out(row) for row in short[:NUM_TEXTS]]}
    for task in TASKS:
        rows = json.loads((trace / task / "train.json").read_text(encoding="utf-8"))
        pairs = [{"prompt": row["prompt"], "completion": row["answer"]} for row in rows]
        written[task] = [pair for pair in pairs if fits(tokenizer, pair["prompt"] + pair["completion"])][:NUM_ROWS]
    for name, lines in written.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def lay_out(row: dict[str, Any]) -> dict[str, Any]:
    """The first turn of a conversation and its answer, or a text in two halves."""
    half = halve(row)
    if "messages" in row:
        turns = ("user", half["question"]), ("assistant", half["answers"][0])
        return {"messages": [{"role": role, "content": content} for role, content in turns]}
    return {"prompt": half["question"], "completion": half["answers"][0]}


def fits(tokenizer: Any, text: str) -> bool:
    """Whether a text leaves room for a chat template."""
    return len(tokenizer(text)["input_ids"]) < MAX_LENGTH - 20


def measure(case: Case, folder: Path, seconds: str) -> dict[str, Any]:
    """What a search promised, and what its recipe did; in nats per token."""
    place, rows = folder / case.label, folder / case.model.name
    clock = place / "minutes.json"
    begun = time.monotonic()
    if not clock.exists():
        named = ["--keep", str(rows / "known.jsonl")] if case.is_named else []
        data = ["--data", str(rows / f"{case.task}.jsonl"), "--set", f"data.max_length={MAX_LENGTH}"]
        run_hft(["advise", "--model", str(case.model), *data, *named, "--time", seconds, "--output", str(place)])
        clock.write_text(json.dumps((time.monotonic() - begun) / 60), encoding="utf-8")
    advice = json.loads((place / "advice.json").read_text(encoding="utf-8"))
    ends = [try_recipe(Path(advice["recipe"]), place / f"fresh-{seed}", seed) for seed in SEEDS if advice["recipe"]]
    low, high = (advice[name] and advice[name][bound] for name, bound in (("learning", "low"), ("forgetting", "high")))
    num_kept = sum(end["learned"] >= low and end["lost"] <= high for end in ends) if low is not None else 0
    print(f"{case.label}: {advice['sentence']}; kept on {num_kept} of {len(SEEDS)}: {ends}", file=sys.stderr, flush=True)
    return {
        "model": case.model.name, "task": case.task, "named": case.is_named, "sentence": advice["sentence"],
        "arm": advice["best"] and advice["best"]["candidate"]["arm"],
        "rate": advice["best"] and advice["best"]["candidate"]["learning_rate"],
        "learning": advice["learning"], "forgetting": advice["forgetting"], "ends": ends, "num_kept": num_kept,
        "minutes": round(json.loads(clock.read_text(encoding="utf-8")), 1),
    }  # fmt: skip


def try_recipe(recipe: Path, output: Path, seed: int) -> dict[str, float]:
    """What a recipe learned and lost on a seed; nothing of both where its budget left nothing."""
    given = {"output": output, "train.seed": seed, "freeze.seed": seed}
    try:
        run_hft(["sft", str(recipe), *(part for key, value in given.items() for part in ("--set", f"{key}={value}"))])
    except subprocess.CalledProcessError as error:
        if error.returncode != OverBudget.exit_code or "stop.max_forgetting" not in error.stderr:
            raise
        return {"seed": seed, "learned": 0.0, "lost": 0.0}
    point = read_point(output, (), "nll")
    return {"seed": seed, "learned": round(point.learning, 4), "lost": round(point.forgetting, 4)}


if __name__ == "__main__":
    main()

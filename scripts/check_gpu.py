"""Check hft on this machine's GPU: what works, what fits, and how fast it is. Eight minutes at most; no network, no weights.

    python scripts/check_gpu.py --output FOLDER        everything
    python scripts/check_gpu.py --steps a,d            a part
    python scripts/check_gpu.py --rehearse             everything on the CPU with tiny shapes, in a minute

Every step is a process of its own with a time limit, and writes its figures as it has them, so that one that fails, hangs or
runs out of memory leaves what it found and does not stop the others. FOLDER/check.json and FOLDER/check.md are written anew
after every step; the table is printed at the end. Exits with 1 if a step failed.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
TOTAL_SECONDS = 475.0
REHEARSAL_FACTOR = 4.0  # a rehearsal may share its two cores with others
KILL_SECONDS = 3.0  # that an ended step's figures may take to reach the disk


@dataclass(frozen=True)
class Step:
    """A part of the check.

    Attributes:
        module: in scripts/gpu/.
        limit_s: seconds after which it is ended.
        stage: steps of a stage run at once; those that take times have one to themselves.
    """

    title: str
    module: str
    limit_s: float
    stage: int


STEPS = {
    "a": Step("what the machine has", "machine", 75, 0),
    "b": Step("the quick starts: as on a CPU, verified, killed and resumed", "commands", 150, 1),
    "c": Step("one rank under DeepSpeed's launcher: as one process", "ranks", 150, 1),
    "d": Step("planned memory against the allocator's peak", "memory", 150, 1),
    "e": Step("step time beside the FLOP count", "speed", 100, 2),
    "f": Step("a whole 7B model on one card", "whole", 130, 3),
    "g": Step("questions per second", "questions", 60, 4),
    "h": Step("attention, loss and optimizer kernels", "kernels", 75, 5),
}


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    folder = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= make_environment(folder, arguments.rehearse)
    # A process that has asked for a GPU cannot be copied; without one, the libraries are imported once for all steps.
    multiprocessing.set_start_method("forkserver" if arguments.rehearse else "spawn")
    multiprocessing.set_forkserver_preload(["gpu.memory", "gpu.questions"])
    started = time.monotonic()
    total_seconds = (REHEARSAL_FACTOR if arguments.rehearse else 1.0) * TOTAL_SECONDS
    outcomes: dict[str, dict[str, Any]] = {}
    stages = {letter: 0 if arguments.rehearse else STEPS[letter].stage for letter in arguments.steps}
    for stage in sorted(set(stages.values())):
        letters = [letter for letter in arguments.steps if stages[letter] == stage]
        run_stage(letters, arguments, folder, total_seconds - (time.monotonic() - started), outcomes)
        write_report(folder, outcomes, time.monotonic() - started, arguments.rehearse)
    print((folder / "check.md").read_text(encoding="utf-8"))
    sys.exit(0 if all(outcome["passed"] for outcome in outcomes.values()) else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=read_letters, default=list(STEPS), metavar="A,B", help="only these: a,d")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--output", type=Path, default=Path("runs/check-gpu"), metavar="FOLDER")
    parser.add_argument("--fault", type=read_letters, default=[], metavar="A,B", help="plant a fault in these, to see it found")
    return parser.parse_args()


def read_letters(text: str) -> list[str]:
    letters = text.replace(" ", "").split(",")
    if unknown := set(letters) - set(STEPS):
        raise argparse.ArgumentTypeError(f"no step {', '.join(sorted(unknown))}: there are {', '.join(STEPS)}")
    return [letter for letter in STEPS if letter in letters]


def run_stage(
    letters: list[str], arguments: argparse.Namespace, folder: Path, seconds_left: float, outcomes: dict[str, dict[str, Any]]
) -> None:
    """Start some steps at once, wait for each, and add what became of them."""
    children: dict[str, tuple[BaseProcess, float, float]] = {}
    try:
        watch_stage(letters, children, arguments, folder, seconds_left, outcomes)
    finally:
        for child, _, _ in children.values():  # where this process itself is stopped
            end_child(child)


def watch_stage(
    letters: list[str], children: dict[str, tuple[BaseProcess, float, float]], arguments: argparse.Namespace, folder: Path,
    seconds_left: float, outcomes: dict[str, dict[str, Any]],
) -> None:  # fmt: skip
    for letter in letters:
        limit = max(min(find_limit(letter, arguments), seconds_left), 1.0)
        (folder / f"step-{letter}.json").unlink(missing_ok=True)
        print(f"{letter}  {STEPS[letter].title}: at most {limit:.0f} s", file=sys.stderr, flush=True)
        children[letter] = (start_child(letter, arguments, folder), time.monotonic(), limit)
    while children:
        for letter, (child, started, limit) in list(children.items()):
            seconds = time.monotonic() - started
            is_late = child.is_alive() and seconds >= limit
            if child.is_alive() and not is_late:
                continue
            end_child(child)
            outcomes[letter] = judge_step(letter, folder, child.exitcode, is_late and limit, seconds)
            print(f"{letter}  {'passed' if outcomes[letter]['passed'] else 'FAILED'} in {seconds:.0f} s", file=sys.stderr)
            del children[letter]
        time.sleep(0.05)


def find_limit(letter: str, arguments: argparse.Namespace) -> float:
    """Seconds for a step. The planted fault of the one that only takes times is that it hangs; a rehearsal may be slow."""
    if letter == "e" and letter in arguments.fault:
        return 8.0
    return (REHEARSAL_FACTOR if arguments.rehearse else 1.0) * STEPS[letter].limit_s


def make_environment(folder: Path, rehearse: bool) -> dict[str, str]:
    """What the steps and the commands that they start are to find."""
    paths = [str(SCRIPTS.parent), str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HFT_CACHE": str(folder / "work" / "cache"),
        "NO_COLOR": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # The shapes of a rehearsal are tiny: a second thread gains nothing, and waits badly on a busy machine.
    rehearsed = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return environment | rehearsed if rehearse else environment


def start_child(letter: str, arguments: argparse.Namespace, folder: Path) -> BaseProcess:
    child = multiprocessing.Process(target=run_child, args=(letter, folder, arguments.rehearse, letter in arguments.fault))
    child.start()
    return child


def run_child(letter: str, folder: Path, rehearse: bool, fault: bool) -> None:
    """One step, in this process, which leads a group of its own and writes into a log."""
    from gpu.record import Recorder

    os.setsid()
    with (folder / f"step-{letter}.log").open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    recorder = Recorder(folder, letter, rehearse, fault)
    shutil.rmtree(recorder.room)  # an earlier check's runs would be taken for done
    recorder.write()
    with recorder.measuring("the step as a whole"):
        importlib.import_module(f"gpu.{STEPS[letter].module}").run(recorder)


def end_child(child: BaseProcess) -> None:
    """End a step and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()  # where it leads no group yet
    child.join(KILL_SECONDS)


def judge_step(letter: str, folder: Path, code: int, late_limit: float | bool, seconds: float) -> dict[str, Any]:
    """The step's rows, and whether all of them are as they should be."""
    path = folder / f"step-{letter}.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    log = (folder / f"step-{letter}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    if late_limit:
        rows.append({"name": "time", "passed": False, "error": f"ended after its limit of {late_limit:.0f} s", "log": log[-5:]})
    elif code != 0:
        rows.append({"name": "end", "passed": False, "error": f"the step's process ended with {code}", "log": log[-15:]})
    elif not rows:
        rows.append({"name": "rows", "passed": False, "error": "the step found nothing", "log": log[-15:]})
    passed = all(row["passed"] is not False for row in rows)
    return {"title": STEPS[letter].title, "passed": passed, "seconds": round(seconds, 1), "rows": rows}


def write_report(folder: Path, outcomes: dict[str, dict[str, Any]], seconds: float, rehearse: bool) -> None:
    """check.json and check.md, whole or not at all."""
    found = {"rehearsal": rehearse, "seconds": round(seconds, 1), "steps": outcomes}
    for name, text in (("check.json", json.dumps(found, indent=1)), ("check.md", format_report(found))):
        temporary = folder / f".{name}"
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, folder / name)


def format_report(found: dict[str, Any]) -> str:
    """Markdown: a table for each run of rows that have the same figures."""
    lines = [f"Rehearsed on a CPU, in {found['seconds']:.0f} s." if found["rehearsal"] else f"In {found['seconds']:.0f} s."]
    for letter, outcome in found["steps"].items():
        word = "passed" if outcome["passed"] else "FAILED"
        lines += ["", f"### {letter}. {outcome['title']}: {word}, {outcome['seconds']:.0f} s"]
        columns: list[str] = []
        for row in outcome["rows"]:
            names = [name for name in row if name not in ("name", "passed", "at_s", "log")]
            if names != columns or not columns:
                columns = names
                lines += ["", f"| {' | '.join(['', *columns, ''])} |", f"|{'---|' * (len(columns) + 2)}"]
            mark = {True: "ok", False: "FAILED", None: ""}[row["passed"]]
            lines.append(f"| {' | '.join([row['name'], *(format_value(row[name]) for name in names), mark])} |")
        failed = [row for row in outcome["rows"] if row.get("log")]
        lines += [f"    {line}" for row in failed for line in row["log"]]
    return "\n".join(lines)


def format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    main()

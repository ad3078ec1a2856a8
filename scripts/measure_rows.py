"""Peak memory and time of tokenizing more rows than one likes to hold: those of a file, again and again.

    python scripts/measure_rows.py --model FOLDER --rows FILE.jsonl [--bytes 1000000000] [--max-length 1024]

Prints JSON: the process's own memory (RssAnon; the files that it maps are not its own) before and at its peak, its resident set
at the peak, seconds, rows, tokens and sequences, packed.
"""

import argparse
import json
import re
import resource
import tempfile
import threading
import time
from pathlib import Path

from hftcli.data.prepare import prepare_dataset
from hftcli.models.description import load_tokenizer
from hftcli.recipe.sections import DataSection, TrainSection

MEBIBYTE = 1 << 20


def read_memory() -> int:
    """Bytes of this process that are no file's."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) << 10


def watch(seen: list[int]) -> None:
    """Note the memory twenty times a second."""
    while True:
        seen.append(max(seen[-1], read_memory()))
        time.sleep(0.05)


def repeat_rows(rows: Path, num_bytes: int, file: Path) -> None:
    """Write the rows as often as it takes."""
    text = rows.read_bytes()
    with file.open("wb") as stream:
        while stream.tell() < num_bytes:
            stream.write(text)


def main() -> None:
    """Repeat, tokenize, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--bytes", type=int, default=10**9)
    parser.add_argument("--max-length", type=int, default=1024)
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        repeat_rows(given.rows, given.bytes, file)
        seen, start = [read_memory()], time.perf_counter()
        threading.Thread(target=watch, args=(seen,), daemon=True).start()
        data = DataSection(path=str(file), max_length=given.max_length)
        rows, report = prepare_dataset(data, TrainSection(packing=True), tokenizer, Path(folder) / "cache")
        found = {
            "bytes": file.stat().st_size,
            "own_before_mib": round(seen[0] / MEBIBYTE, 1),
            "own_peak_mib": round(seen[-1] / MEBIBYTE, 1),
            "resident_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            "seconds": round(time.perf_counter() - start, 1),
            "rows": report.num_rows,
            "tokens": report.num_tokens,
            "sequences": len(rows),
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""A matrix by hand, and larger ones at random."""

import json
import random

TASKS = ("a", "b", "c")
ROWS = (
    (0.10, 0.20, 0.30),  # base
    (0.60, 0.30, 0.20),  # after a
    (0.70, 0.50, 0.35),  # after b
    (0.40, 0.55, 0.90),  # after c
)


def make_rows(num_tasks: int, seed: int) -> tuple[tuple[float, ...], ...]:
    draw = random.Random(seed)
    return tuple(tuple(draw.random() for _ in range(num_tasks)) for _ in range(num_tasks + 1))


def name_tasks(num_tasks: int) -> tuple[str, ...]:
    return tuple(f"task{i}" for i in range(num_tasks))


def write(folder, content) -> str:
    path = folder / "matrix.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path

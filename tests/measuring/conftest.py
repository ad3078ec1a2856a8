"""The embedded model, and questions to ask it."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hftcli import PACKAGE
from hftcli.tasks.examples import Example


@pytest.fixture(scope="session")
def embedded():
    folder = PACKAGE / "tinyworld" / "model"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def questions() -> tuple[Example, ...]:
    """Plain ones, of several lengths."""
    rows = []
    for name in ("sale", "topic", "reverse"):
        file = PACKAGE / "tinyworld" / "sequence" / name / "test.json"
        rows += json.loads(file.read_text(encoding="utf-8"))[:12]
    return tuple(Example(row["prompt"], row["answer"]) for row in rows)

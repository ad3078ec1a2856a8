"""TRACE's rows."""

import pytest


@pytest.fixture(scope="module")
def trace_root(shared) -> str:
    return str(shared / "data" / "trace")

"""The models on which plans are tried."""

import pytest
from freezing.families import CONFIGS, build_units

from hftcli.freezing.roles import Unit


@pytest.fixture(scope="session")
def llama() -> tuple[Unit, ...]:
    return build_units("llama", **CONFIGS["llama"])

"""Packages that settings need are missed before anything begins."""

import pytest

from hftcli.errors import InputError
from hftcli.launching.packages import check_packages, is_installed, list_trackers
from hftcli.recipe.sections import LaunchSection, TrainSection


def test_what_is_not_here_is_named_with_the_fix():
    with pytest.raises(InputError, match="train.report_to dvclive needs dvclive") as caught:
        check_packages(TrainSection(report_to=["dvclive"]), LaunchSection(num_processes=1))
    assert caught.value.fix == "pip install dvclive, or take another"


def test_none_is_no_tracker():
    assert list_trackers(TrainSection()) == list_trackers(TrainSection(report_to="none")) == []
    assert list_trackers(TrainSection(report_to="wandb")) == ["wandb"]


def test_a_folder_of_the_users_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "trackfolder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not is_installed("trackfolder")
    assert is_installed("pydantic")

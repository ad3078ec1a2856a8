"""Ranks on machines with files of their own: what differs is named, and where."""

import re

import pytest

from hftcli.errors import InputError, TrainingError
from hftcli.training.agreement import Holding, check_holdings

ROWS = {"the rows that are trained on": "0a", "the questions": "0b"}


def test_ranks_that_have_the_same_go_on():
    check_holdings([Holding("node-1", "0f", ROWS), Holding("node-2", "0f", dict(ROWS))])


@pytest.mark.parametrize("what", ROWS)
def test_other_rows_are_named_with_their_machine(what):
    other = {**ROWS, what: "0c"}
    found = [Holding("node-1", "0f", ROWS), Holding("node-1", "0f", ROWS), Holding("node-2", "0f", other)]
    message = f"{what} are not the same on all machines: rank 2 on node-2 read others than rank 0 on node-1"
    with pytest.raises(InputError, match=re.escape(message)):
        check_holdings(found)


def test_other_halves_are_named():
    with pytest.raises(TrainingError, match="the ranks drew different halves: 0f, 0e"):
        check_holdings([Holding("node-1", "0f", ROWS), Holding("node-2", "0e", ROWS)])

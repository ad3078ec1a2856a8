"""What the terminal says of a finished round."""

from written_runs import make_result

from hftcli.reporting.rounds import find_speed


def test_a_resumed_round_has_no_speed():
    """Its tokens are those of the whole round, its seconds those of the last start."""
    result = make_result("0f", None).model_copy(update={"num_tokens": 600, "seconds": {"training": 3.0}})
    assert find_speed(result) == 200.0
    assert find_speed(result.model_copy(update={"resumed_from": 40})) is None
    assert find_speed(result.model_copy(update={"seconds": {"training": 0.0}})) is None

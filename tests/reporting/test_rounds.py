"""What the terminal says of a finished round."""

from written_runs import make_result

from hftcli.reporting.headline import show_accuracy
from hftcli.reporting.rounds import find_speed, print_verification
from hftcli.runs.scores import PairScore
from hftcli.runs.verification import Verification


def test_a_resumed_round_has_no_speed():
    """Its tokens are those of the whole round, its seconds those of the last start."""
    result = make_result("0f", None).model_copy(update={"num_tokens": 600, "seconds": {"training": 3.0}})
    assert find_speed(result) == 200.0
    assert find_speed(result.model_copy(update={"resumed_from": 40})) is None
    assert find_speed(result.model_copy(update={"seconds": {"training": 0.0}})) is None


def test_a_round_says_whose_weights_it_kept():
    result = make_result("0f", None).model_copy(update={"num_steps": 120})
    assert result.ending == result.model_copy(update={"kept_step": 120}).ending == ""
    ended = result.model_copy(update={"kept_step": 40, "stopped_by": "max_forgetting"})
    assert ended.ending == "; ended by stop.max_forgetting; the weights are those of step 40"


def test_the_reference_itself_is_no_estimate_and_a_full_score_no_certainty():
    """Wilson's interval of 150 of 150: from 150 / (150 + 1.96 ** 2) on."""
    before = PairScore(
        reward_accuracy=0.5, reward_accuracy_error=0.04, reward_margin=0.0, likelihood_accuracy=0.4, kl=0.0, num_pairs=150
    )
    assert show_accuracy(before) == "50.0"
    after = before.model_copy(update={"reward_accuracy": 1.0, "reward_margin": 2.0})
    assert show_accuracy(after) == "100.0 (97.5 to 100.0)"


def test_a_weight_whose_adapter_was_left_no_rank_has_not_moved(capsys):
    found = Verification(num_frozen=0, num_trained=57, violations=(), unmoved=(), rankless=tuple(map(str, range(10))))
    print_verification({"00-sft": found}, as_json=False)
    assert "47 of 57 trained ones moved (10 were left no rank)" in " ".join(capsys.readouterr().out.split())

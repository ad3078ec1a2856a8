"""How much trained in a round, in words: a share of the weights, or an adapter in their place."""

from hftcli.freezing.selection import FreezePlan
from hftcli.runs.records import RoundResult


def measure_share(plan: FreezePlan, result: RoundResult) -> float:
    """Weights that trained, over those of the model: its own, or an adapter's."""
    num_trained = plan.num_trainable if result.adapter is None else result.adapter.num_weights
    return num_trained / plan.num_parameters


def describe_share(plan: FreezePlan, result: RoundResult) -> str:
    """`51.9%`, or `an adapter (vera, 0.66% of the weights)`."""
    if result.adapter is None:
        return f"{plan.trainable_fraction:.1%}"
    return f"an adapter ({result.adapter.name}, {measure_share(plan, result):.2%} of the weights)"

"""What a stopped round remembers, and what a trained one hands on."""

from dataclasses import dataclass

from transformers.trainer_utils import TrainOutput

from hftcli.measuring.pairs import Reading
from hftcli.methods.method import Method
from hftcli.runs.scores import Score
from hftcli.training.curve import Curve
from hftcli.training.internals import Memory, ResumableTrainer
from hftcli.training.references import Reference
from hftcli.training.reports import RoundCallback
from hftcli.training.scorer import Scorer
from hftcli.training.steps import StepKeeper


class RoundMemory:
    """What a step checkpoint holds of a round beside what the trainer and DeepSpeed save."""

    def __init__(self, scorer: Scorer, reference: Reference | None, methods: list[Method]):
        self.scorer = scorer
        self.reference = reference
        self.methods = methods

    def attach(self, callback: RoundCallback, curve: Curve) -> None:
        """Who measures the gradients, and who measures within the round; they are made after the memory."""
        self.callback = callback
        self.curve = curve

    def recall(self) -> Memory:
        """Called by every rank for each step checkpoint."""
        return {
            "sums": self.scorer.trainer.recall_sums(),
            "before": {name: value.model_dump() for name, value in self.scorer.before.items()},
            "reused": self.scorer.reused,
            "read_before": [vars(reading) for reading in self.scorer.read_before],
            "reference": self.reference.recall() if self.reference is not None else None,
            "methods": [method.recall() for method in self.methods],
            "gradient_bytes": self.callback.gradient_bytes,
            "curve": self.curve.recall(),
        }

    def restore(self, memory: Memory) -> None:
        """Take up what `recall` gave, in place of measuring it again."""
        self.scorer.trainer.restore_sums(memory["sums"])
        self.scorer.before.update({name: Score(**values) for name, values in memory["before"].items()})
        self.scorer.reused = memory.get("reused", [])
        self.scorer.read_before.extend(Reading(**tensors) for tensors in memory["read_before"])
        if self.reference is not None:
            self.reference.restore(self.scorer.trainer, memory["reference"])
        for method, recalled in zip(self.methods, memory["methods"], strict=True):
            method.restore(recalled)
        self.callback.gradient_bytes = memory["gradient_bytes"]
        if "curve" in memory:  # not in a checkpoint of an earlier hft, which measured nothing
            self.curve.restore(memory["curve"])


@dataclass(frozen=True)
class Trained:
    """A model after its last step, not saved yet."""

    trainer: ResumableTrainer
    outcome: TrainOutput
    scorer: Scorer
    keeper: StepKeeper
    callback: RoundCallback
    curve: Curve

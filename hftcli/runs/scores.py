"""What a model scores: on tasks, question by question, and on preference pairs."""

from typing import Literal

from pydantic import Field

from hftcli.recipe.section import FileSection, Section, Version

Moment = Literal["before", "after"]  # of a round
By = Literal["score", "nll"]  # what gains and losses are of
HELD_OUT = "held-out rows"  # among the tasks of `Scores`, by likelihood alone


class Score(Section):
    """What a model scores on one task."""

    score: float | None
    """By the task's own metric, in [0, 1]; null where only the likelihood was measured."""
    lenient: float | None
    """By a metric that overlooks the form of the answer, in [0, 1]; null where there is none."""
    nll: float | None
    """Negative log-likelihood of the answers, nats per token; null where another program scored the task."""
    num_examples: int
    """Questions asked."""
    num_impossible: int = 0
    """Questions with a right answer that would not count as right if a model gave it; 0 in a file of an earlier hft."""
    num_cut: int | None = None
    """Answers that had not ended where the limit of tokens cut them; null where none is written, where another program asked,
    and in a file of an earlier hft."""
    way: str | None = None
    """How the questions were asked: `plain`, or `chat` through the chat template, and after how many answered ones, such as
    `chat, 5 shots`; null in a file of an earlier hft, and where another program asked."""
    left_out: dict[str, int] = Field(default_factory=dict)
    """Rows of the task that could not be asked, by the reason."""
    others: dict[str, float] = Field(default_factory=dict)
    """By further metrics of the task, by name. Of multiple choice, the accuracy when the choices are compared by log-likelihood
    per character (`acc_norm`) and by how much the question raises it (`acc_content`)."""


class Prediction(Section):
    """What became of one question of a task."""

    index: int
    """Its place in the task, from 0."""
    prediction: str | None
    """What the model answered; of multiple choice, the likeliest choice; null where the answer is only judged by likelihood."""
    score: float | None
    """By the task's own metric, in [0, 1]; null where only the likelihood was measured."""
    lenient: float | None
    """By a metric that overlooks the form of the answer, in [0, 1]; null where nothing is generated."""
    nll: float | None
    """Negative log-likelihood of the right answer, nats per token; null where another program scored the task."""
    num_tokens: int | None
    """Tokens of the right answer, its end included where it is learned with one; null where `nll` is."""
    others: dict[str, float] = Field(default_factory=dict)
    """By further metrics of the task, by name."""
    log_likelihoods: tuple[float, ...] | None = None
    """Of each choice, or of each right answer where there are several, in nats; null for tasks that have neither."""
    bare_log_likelihoods: tuple[float, ...] | None = None
    """Of each choice after a prompt that asks nothing, in nats; null where there are no choices."""
    question: str | None = None
    """What was asked, turns of a conversation with a blank line between them; null for rows that are no task's, and in a file
    of an earlier hft."""
    answers: tuple[str, ...] = ()
    """The right answers; none where `question` is null."""
    is_cut: bool | None = None
    """Whether the answer had not ended where the limit of tokens cut it; null as `num_cut` is."""
    fault: str | None = None
    """Why a right answer would not count as right if a model gave it; null where each does."""

    @property
    def num_choices(self) -> int | None:
        """Choices of the question; None where there are none."""
        return None if self.bare_log_likelihoods is None else len(self.bare_log_likelihoods)


class PairScore(Section):
    """What a model makes of preference pairs, beside the reference: the model as it was before the round."""

    reward_accuracy: float
    """Share of pairs whose chosen answer has the higher implicit reward, beta (log p - log p of the reference), in [0, 1];
    equal rewards count one half, so that the reference itself has 0.5."""
    reward_accuracy_error: float
    """Standard error of `reward_accuracy` over the pairs."""
    reward_margin: float
    """Mean reward of the chosen answer over the rejected one."""
    likelihood_accuracy: float
    """Share of pairs whose chosen answer is the likelier one as a whole, with no reference."""
    kl: float
    """KL(reference || model), nats per token, at the places of the data's answers and not of what a model writes itself;
    estimated from tokens that the reference draws at every place."""
    num_pairs: int
    """Pairs measured."""


class PairScores(Section):
    """What a round makes of held-out preference pairs."""

    before: PairScore
    """Before the round, where the model is the reference."""
    after: PairScore
    """After it."""


class Loss(Section):
    """How much of what was known before a round is lost: a share, or by likelihood nats per token."""

    mean: float
    """Mean over the tasks."""
    low: float | None
    """Lower end of its 95 % interval over the questions; null where there is none."""
    high: float | None
    """Upper end."""


class CurvePoint(Section):
    """What a model knew after a step of a round: a point of the run's own curve of learning against forgetting."""

    step: int
    """Optimizer steps taken."""
    scores: dict[str, Score]
    """Scores on the tasks and held-out rows that ask for what is trained, and on those that ask for what was known."""
    pairs: PairScore | None = None
    """Held-out preference pairs; null where there are none."""
    learning: dict[By, float] = Field(default_factory=dict)
    """Mean gain on what is trained since the start of the round, by `score`, a share, and by `nll`, the fall in nats per token;
    what nothing measures is left out."""
    forgetting: dict[By, Loss] = Field(default_factory=dict)
    """Mean loss of what was known, alike."""


class Scores(FileSection):
    """What a model scored on the tasks of a round."""

    version: Version = 2
    """Version of the file's form. The first has no `points`."""

    before: dict[str, Score]
    """Score on each task before the round."""
    after: dict[str, Score]
    """Score on each task after it."""
    points: tuple[CurvePoint, ...] = ()
    """What was measured within the round, in the order of the steps."""

"""The sections of the methods that defend old knowledge besides freezing, and which of them go together."""

import difflib
from itertools import combinations
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, StrictBool, model_validator
from pydantic_core import PydanticCustomError

from hftcli.recipe.section import Section
from hftcli.recipe.sections import OpenSection

# PEFT's types that merge into the weights; tests/methods/test_peft.py trains each of them.
PeftKind = Literal[
    "ADALORA", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA",
    "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "RANDLORA", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS",
    "UNILORA", "VBLORA", "VERA", "WAVEFT",
]  # fmt: skip
# Others that are asked for, and why they are not carried.
PROMPTS = (
    "adds tokens or states, which no weights can hold: a round leaves a plain model, and there is nothing to merge: take LORA, "
    "or for as few weights VERA, IA3 or LN_TUNING"
)
OTHER_KINDS = {
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "CPT", "CARTRIDGE"), PROMPTS),
    "ADAPTION_PROMPT": PROMPTS,
    "QLORA": "holds the weights in 4 bits, and hft merges into the start's own weights and proves the others bit for bit: take "
    "LORA, whose frozen weights are held in bfloat16",
    "XLORA": "mixes adapters by the input, so that they cannot be merged: take LORA",
    "POLY": "mixes adapters by the task, so that they cannot be merged: take LORA",
    "LILY": "shares factors between layers and does not merge in PEFT: take LORA, or VERA, which shares them and merges",
}


def _name_kind(value: Any) -> Any:
    """PEFT's name of a type, however it is spelled."""
    name = value.upper().replace("-", "_") if isinstance(value, str) else value
    if name in OTHER_KINDS:
        raise PydanticCustomError("kind", f"type {name} {OTHER_KINDS[name]}")
    if isinstance(name, str) and name not in get_args(PeftKind):
        guess = difflib.get_close_matches(name, get_args(PeftKind), n=1)
        hint = f"did you mean {guess[0]}?" if guess else f"known: {', '.join(get_args(PeftKind))}"
        raise PydanticCustomError("kind", f"type {name} is none of PEFT's that hft carries ({hint})")
    return name


class ReplaySection(Section):
    """Replay: some rows of earlier tasks are trained on again."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of each earlier task's training rows that is trained on again."""

    when: Literal["mixed", "after"] = "mixed"
    """Mixed in among the rows of the task, in every epoch, or one pass after the task, as TRACE does."""

    extra: str | None = None
    """A task under `data.root` whose training rows all join the replayed ones in every round, as TRACE's `Lima`."""


class EwcSection(Section):
    """Elastic weight consolidation (arXiv 1612.00796): what earlier tasks need is drawn back to where it was."""

    strength: Annotated[float, Field(gt=0)] = 400.0
    """Lambda of arXiv 1612.00796, equation 3: the weight of the quadratic penalty."""

    num_examples: Annotated[int, Field(ge=1)] = 256
    """Training rows of a task on which its Fisher information is estimated, at the end of its round."""


class L2spSection(Section):
    """L2-SP (arXiv 1802.01483): all that trains is drawn back to where the round starts."""

    strength: Annotated[float, Field(gt=0)]
    """Alpha of arXiv 1802.01483: the penalty is half of it times the squared distance of the weights from where the round
    starts."""


class GemSection(Section):
    """GEM (arXiv 1706.08840): no step raises the loss on what is remembered of each earlier task."""

    num_examples: Annotated[int, Field(ge=1)] = 256
    """Training rows of each earlier task that are remembered."""

    batch_size: Annotated[int, Field(ge=1)] = 8
    """Remembered rows of each earlier task whose gradient is taken in a step."""

    margin: Annotated[float, Field(ge=0)] = 0.5
    """Gamma of arXiv 1706.08840, section 3: how far the projection leans to the earlier tasks."""


class AgemSection(Section):
    """A-GEM (arXiv 1812.00420): no step raises the mean loss on what is remembered of all earlier tasks."""

    num_examples: Annotated[int, Field(ge=1)] = 256
    """Training rows of each earlier task that are remembered."""

    batch_size: Annotated[int, Field(ge=1)] = 8
    """Remembered rows, of all earlier tasks together, whose gradient is taken in a step."""


class LowRankSection(Section):
    """Low-rank adapters train in place of the weights."""

    r: Annotated[int, Field(ge=1)] = 8
    """Rank of the adapters."""

    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale: an adapter adds `lora_alpha / r` times its product."""

    use_rslora: bool = False
    """Scale by `lora_alpha / sqrt(r)` instead, which suits high ranks (rsLoRA, arXiv 2312.03732)."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout before an adapter; DPO has none, as long as TRL's `dpo.disable_dropout` is on."""

    target_modules: tuple[str, ...] | None = None
    """Last parts of the names of the linear layers that take adapters, such as `q_proj`; null takes all that the freeze plan
    trains in the layers."""


class LoraSection(LowRankSection):
    """LoRA (arXiv 2106.09685): low-rank adapters train in place of the weights."""

    quiet: StrictBool | Annotated[float, Field(gt=0, lt=1)] = False
    """Let an adapter read only those directions of its layer's input that the inputs of earlier data use least: `true` half of
    them, a number that share. Every round then begins a new adapter, and what is earlier is as with `freeze.grain: directions`,
    `freeze.keep` and `freeze.blocks` included. DoRA has no such form: it scales whole rows, and so what is closed as well."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_dora(cls, values: Any) -> Any:
        if isinstance(values, dict) and "use_dora" in values:
            raise PydanticCustomError(
                "dora",
                "use_dora is not taken: method.lora goes on with one adapter, and DoRA scales whole rows, closed directions "
                "among them: for a new one in each round, set method.peft: {type: LORA, use_dora: true}",
            )
        return values

    @property
    def open_fraction(self) -> float | None:
        """Share of the directions that an adapter reads; None where it reads all of them."""
        return {True: 0.5, False: None}[self.quiet] if isinstance(self.quiet, bool) else self.quiet


class OloraSection(LowRankSection):
    """O-LoRA (arXiv 2310.14152): a new adapter for each task, orthogonal to those before."""

    orthogonality: Annotated[float, Field(ge=0)] = 0.5
    """Lambda 1 of arXiv 2310.14152, equation 8: the weight of the overlap with the adapters of the earlier tasks."""


class Ia3Section(Section):
    """Nothing to choose: the vectors stand where the paper has them."""


class TokenWeightsSection(Section):
    """Tokens that contradict what the model knows count less in the loss."""

    kind: Literal["dft", "talr", "eaft", "stm", "psft"]
    """By what a token counts: `dft` its probability (arXiv 2508.05629); `talr` its probability to the power of one over the
    median of the mean losses of a micro-batch's rows (arXiv 2509.20758); `eaft` the entropy of what could stand in its place as
    a share of that of 20 equally likely tokens, at most 1 (arXiv 2601.02151); `stm` not at all where the start of the round
    finds it too surprising (arXiv 2501.14315); `psft` the ratio of its probability to that some steps before, and not at all
    once that has grown enough, as PPO clips it (arXiv 2508.17784)."""

    strength: Annotated[float, Field(ge=0)] = 1.0
    """Exponent of the weights; 0 is plain training."""

    max_perplexity: Annotated[float, Field(gt=1)] = 2.5
    """For `stm`: the largest 1 / p of a token that is trained."""

    clip: Annotated[float, Field(gt=0)] = 0.28
    """For `psft`: a token is trained until its probability has grown by this share; the upper clip of the authors' runs."""

    snapshot_steps: Annotated[int, Field(ge=1)] | None = 8
    """For `psft`: optimizer steps after which the probabilities to which others are compared are taken anew; in the authors'
    runs 256 rows in 8 steps of 32. With 1, training is plain; null leaves them at the start of the round."""

    @property
    def asks_start(self) -> bool:
        """Whether the model as it was reads every batch as well."""
        return self.kind in ("stm", "psft")


class SelfReplaySection(Section):
    """The model trains on texts of its own beside the rows."""

    fraction: Annotated[float, Field(gt=0, le=10)] = 0.25
    """Texts that the start of the round writes, for each row; in every epoch they stand among the rows. With `train.packing`
    they are laid into sequences as well, as many as fit however long they are."""

    max_tokens: Annotated[int, Field(ge=8)] = 128
    """Tokens at which a text is cut, `data.max_length` at most."""

    begin: Literal["nothing", "chat"] = "nothing"
    """What a text is written from: `nothing`, or for models that chat what the chat template prints before a user's first word,
    so that the start writes the question as well as the answer (arXiv 2406.08464). A question that has not ended where the text
    is cut has no answer."""

    loss: Literal["ce", "kl"] = "ce"
    """On the texts: `ce` is the likelihood of their tokens (arXiv 2505.13811); `kl` KL(start || model) at each of them, the
    same in the mean and less noisy (arXiv 2605.26097), for which the start reads them once more."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """What a token of theirs counts beside one of the rows'. The sum is divided by the number of both, as with 1."""


class AnchorSection(Section):
    """What the model expects at each trained token is held to what it expected when the round began."""

    strength: Annotated[float, Field(ge=0)]
    """What the divergence counts beside the loss, nat for nat."""

    kind: Literal["forward", "reverse", "target_masked"] = "forward"
    """KL(start || model), KL(model || start), or the first over all tokens but the one that is taught (arXiv 2605.29498)."""

    top_k: Annotated[int, Field(ge=1)] | None = None
    """Compare the tokens that the start finds likeliest at each place, so many of them, and all others as one, by what it was
    asked once before the round: kept in the cache, 8 bytes for each. It then reads nothing while training, and every ZeRO stage
    will do. Null compares the whole vocabulary, for which the start reads every batch once more."""


class IftSection(Section):
    """Intuitive fine-tuning (arXiv 2405.11870): answers are learned after what the model itself would have said."""

    mix: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Lambda of the paper: how much of an answer's token, as the model reads it, is the one that it would have put there. 0
    mixes nothing in."""

    decay: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Gamma of the paper: a token counts by the losses from it to the end of its row, each this times the one before; 0 counts
    all alike."""


class DistillSection(Section):
    """What the start of the round expects of an answer with answered rows before the question is learned without them."""

    demonstrations: Annotated[int, Field(ge=1)] = 4
    """Other rows of the task that stand before each row where the start reads it."""

    strength: Annotated[float, Field(ge=0)] = 1.0
    """What the divergence from the start counts beside the loss, nat for nat."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens that they may have together: those are drawn among the rows of no more than their share of it. Null is 1024, or
    what the model has places for beside `data.max_length`."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_on_policy(cls, values: Any) -> Any:
        if isinstance(values, dict) and "on_policy" in values:
            raise PydanticCustomError(
                "on_policy",
                "on_policy is not taken: the student would write answers while it trains, which is another trainer, TRL's "
                "SDFTTrainer, and hft trains on rows: drop it",
            )
        return values


class PeftSection(OpenSection):
    """Any adapter of PEFT's that merges, with the keys of PEFT's own config class beside the type."""

    type: Annotated[PeftKind, BeforeValidator(_name_kind)]
    """PEFT's name of the type, as `LORA`, `ADALORA`, `OFT`, `BOFT`, `OSF`, `SHIRA`, `VERA`, `LN_TUNING` or `TRAINABLE_TOKENS`.
    `target_modules` names the layers, of those that the freeze plan trains; without it all of them take adapters."""


class MethodSection(Section):
    """How old knowledge is defended besides freezing. A method is on where its section stands, be it empty: `lora: {}`."""

    replay: ReplaySection | None = None
    """Train on rows of earlier tasks again."""

    ewc: EwcSection | None = None
    """Elastic weight consolidation (arXiv 1612.00796)."""

    l2sp: L2spSection | None = None
    """A penalty on the distance from the start (L2-SP, arXiv 1802.01483)."""

    gem: GemSection | None = None
    """Gradient episodic memory (arXiv 1706.08840)."""

    agem: AgemSection | None = None
    """Averaged gradient episodic memory (arXiv 1812.00420)."""

    lora: LoraSection | None = None
    """One low-rank adapter that is trained through all tasks."""

    olora: OloraSection | None = None
    """A low-rank adapter for each task, orthogonal to the earlier ones (arXiv 2310.14152)."""

    ia3: Ia3Section | None = None
    """Vectors that scale keys, values and the mlp's inner activations (arXiv 2205.05638)."""

    self_replay: SelfReplaySection | None = None
    """Train on texts that the start of the round has written, beside the rows (arXiv 2605.26097)."""

    anchor: AnchorSection | None = None
    """A penalty on the divergence from what the start of the round expects, token by token (arXiv 2509.23753)."""

    token_weights: TokenWeightsSection | None = None
    """Tokens that contradict what the model knows count less: DFT, TALR, EAFT, STM or Proximal SFT."""

    ift: IftSection | None = None
    """Read each answer with what the model would have said mixed in, and count early mistakes more (IFT, arXiv 2405.11870)."""

    distill: DistillSection | None = None
    """Learn to answer alone as the start of the round does after answered rows: context distillation (arXiv 2305.16938)."""

    peft: PeftSection | None = None
    """Any adapter of PEFT's that merges: `{type: LORA, use_dora: true}`."""

    @property
    def adapter(self) -> str | None:
        """What trains in place of the weights, where something does: the method, or PEFT's type."""
        if self.peft is not None:
            return self.peft.type.lower()
        return next((name for name in self.names if name in ADAPTERS), None)

    @property
    def open_fraction(self) -> float | None:
        """Share of their inputs' directions that adapters read; None where they read all, and where there are none."""
        return self.lora.open_fraction if self.lora is not None else None

    @property
    def start_readers(self) -> tuple[str, ...]:
        """The methods for which the start of the round reads every batch, laid into the model."""
        asks_start = {
            "self_replay": self.self_replay is not None and self.self_replay.loss == "kl",
            "anchor": self.anchor is not None and self.anchor.top_k is None,
            "distill": self.distill is not None,
            "token_weights": bool(self.token_weights and self.token_weights.asks_start),
        }
        return tuple(name for name, asks in asks_start.items() if asks)

    @property
    def num_readings(self) -> float:
        """Forward passes over what is trained on besides the one that trains; for self-replay, over its own texts alone."""
        num_whole = len(self.start_readers) + (self.ift is not None and self.ift.mix > 0)
        if self.self_replay is None or "self_replay" not in self.start_readers:
            return num_whole
        return num_whole - 1 + self.self_replay.fraction / (1 + self.self_replay.fraction)

    @property
    def logits_readers(self) -> tuple[str, ...]:
        """The methods that compare all that could stand in a token's place; the plain loss kernel alone has all logits."""
        reads = {
            "self_replay": "self_replay" in self.start_readers, "anchor": self.anchor is not None,
            "distill": self.distill is not None,
        }  # fmt: skip
        return tuple(name for name, reads_all in reads.items() if reads_all)

    @property
    def needs_logits(self) -> bool:
        """Whether the plain loss kernel alone is right; TRAINABLE_TOKENS lies over a tied head too, and that calls the head."""
        return bool(self.logits_readers) or (self.peft is not None and self.peft.type == "TRAINABLE_TOKENS")

    @property
    def names(self) -> tuple[str, ...]:
        """The methods that are on."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _check_together(self) -> "MethodSection":
        for first, second, reason in CLASHING_METHODS:
            if first in self.names and second in self.names:
                raise PydanticCustomError("clashing_methods", f"{first} and {second} do not go together: {reason}: drop one")
        return self


# Methods that train something else in place of the weights.
ADAPTERS = ("lora", "olora", "ia3", "peft")
# Methods that defend the tasks of earlier rounds, and do nothing in a run of one.
SEQUENCE_METHODS = ("replay", "ewc", "gem", "agem", "olora")
# Methods that change rows and what they count, and leave the weights alone.
ROW_METHODS = ("replay", "self_replay", "token_weights", "ift")
# Methods that go with matrices of which a part trains: they change no weight by themselves.
GRAINLESS_METHODS = ("replay", "self_replay", "anchor", "distill", "token_weights", "ift")
# Pairs of methods that contradict each other, and why.
CLASHING_METHODS = (
    ("gem", "agem", "agem is gem with one constraint in place of one for each task"),
    ("anchor", "peft", "anchor lays what trains back to where it was, and an adapter may begin elsewhere than the model does"),
    *(
        (holder, "ift", f"ift has the model read tokens of its own, and the start, to which {holder} holds it, reads the rows'")
        for holder in ("anchor", "distill")
    ),
    *(
        (first, second, "each trains something of its own in place of the weights")
        for first, second in combinations(ADAPTERS, 2)
    ),
    *(
        (holder, adapter, f"{holder} holds the weights of the model, and {adapter} leaves them and trains others")
        for holder in ("ewc", "l2sp")
        for adapter in ADAPTERS
    ),
)

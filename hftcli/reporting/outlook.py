"""What a round is going to do, in a few lines: before it starts, or from `--dry-run`."""

from collections.abc import Iterator, Mapping, Sequence

from hftcli.doctor.doctor import Finding
from hftcli.recipe.sections import TrainSection
from hftcli.reporting.terminal import format_bytes
from hftcli.runs.masters import STATES
from hftcli.runs.records import Outlook
from hftcli.runs.spec import RoundSpec


def describe_outlook(outlook: Outlook, spec: RoundSpec) -> Iterator[str]:
    """A line for the rows, for the steps, and for what trains."""
    data, unit = outlook.data, "pairs" if spec.objective == "dpo" else "sequences"
    share = data.num_trained_tokens / data.num_tokens
    lost = [f"{count:,} {word}" for count, word in ((data.num_dropped, "dropped"), (data.num_truncated, "cut")) if count]
    rows = ", ".join([f"{data.num_used:,} of {data.num_rows:,} ({data.format}){data.mixed}", *lost])
    yield f"rows    {rows}; {data.num_tokens:,} tokens, {share:.0%} of them trained"
    if data.num_held_out_in_train:
        yield f"held    {data.num_held_out_in_train:,} of {data.num_held_out:,} held-out {unit} are also trained on"
    if data.num_asked_in_named:
        yield f"asked   {data.num_asked_in_named:,} questions of the rows that freeze.keep or freeze.importance names"
    yield (
        f"steps   {outlook.num_steps:,} of {spec.train.global_batch_size} {unit} out of {outlook.num_sequences:,}; "
        f"{_describe_rates(outlook, spec.train)}"
    )
    trained = f"{outlook.num_trainable / outlook.num_parameters:.1%} of {outlook.num_parameters:,} weights"
    if outlook.num_adapter_weights:
        trained = f"{outlook.num_adapter_weights:,} weights of adapters, none of the model's {outlook.num_parameters:,}"
    yield (f"trains  {trained}, plan {outlook.fingerprint[:12]}; about {format_bytes(outlook.memory_bytes)} on each device")

    if outlook.masters != "none":
        yield f"start   {STATES[outlook.masters]}"
    if spec.scoring.list_steps(outlook.num_steps):
        yield f"curve   {_describe_curve(spec)}"


def _describe_curve(spec: RoundSpec) -> str:
    """Which tasks count as known and which as learned."""
    pairs = ("held-out pairs",) if spec.objective == "dpo" and spec.held_out else ()
    kinds = {"known": spec.scoring.known, "learned": (*spec.scoring.learned, *pairs)}
    return ", ".join(f"{word}: {', '.join(names) or 'nothing'}" for word, names in kinds.items())


def _describe_rates(outlook: Outlook, train: TrainSection) -> str:
    rates = f"learning rate up to {train.learning_rate:g}, {train.lr_scheduler_type}"
    if outlook.is_warmup_dropped:
        return f"{rates}, without a warm-up, which would take the only step"
    return f"{rates}, {outlook.num_warmup_steps:,} steps of warm-up" if outlook.num_warmup_steps else rates


def print_outlooks(outlooks: Mapping[str, Outlook], specs: Mapping[str, RoundSpec], findings: Sequence[Finding]) -> None:
    """As comments, so that what is printed can be run."""
    for name, outlook in outlooks.items():
        print(f"# {name}")
        for line in describe_outlook(outlook, specs[name]):
            print(f"#   {line}")
    for finding in findings:
        status = "" if finding.status == "ok" else f"{finding.status}: "
        print(f"# {finding.check:<6}    {status}{finding.message}" + (f"; fix: {finding.fix}" if finding.fix else ""))

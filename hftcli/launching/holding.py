"""What methods hold beside what a plan's own terms count, and what they leave open of the ways to make a round fit."""

from hftcli.freezing.activations import LossKernel
from hftcli.freezing.budget import Limits
from hftcli.recipe.methods import ADAPTERS
from hftcli.recipe.recipe import Recipe
from hftcli.runs.spec import RoundSpec
from hftcli.tasks import BENCHMARKS

# Methods that a rank with pieces of the weights cannot carry, and why.
NEEDS_WHOLE_WEIGHTS = {
    "ewc": "measures every weight on its own",
    "l2sp": "compares every weight with its start",
    "olora": "compares its adapters with those before",
    **dict.fromkeys(("ia3", "peft"), "is merged into whole weights"),
}
OFFLOADED_OPTIM = ("adamw_torch", "adamw_torch_fused")


def count_held(source: Recipe | RoundSpec, num_processes: int, mixed: bool) -> int:
    """Bytes that methods hold on every device for each weight that trains.

    Of a recipe's sequence, as in its last round.
    """
    method, num_tasks = source.method, count_earlier_tasks(source)
    copy_bytes = 2 if mixed and num_processes > 1 else 4  # DeepSpeed has its float32 masters elsewhere
    held = 0
    if method.l2sp is not None:
        held += copy_bytes
    if method.ewc is not None and (num_tasks or (isinstance(source, RoundSpec) and source.earlier)):
        held += copy_bytes + 4  # the start, and the Fisher information of the rounds before
    if method.gem is not None:
        held += 4 * num_tasks  # a gradient for each
    if method.agem is not None and num_tasks:
        held += 4
    return held


def count_earlier_tasks(source: Recipe | RoundSpec) -> int:
    """Tasks that were learned before a round, or before the last one of a recipe's sequence."""
    if isinstance(source, RoundSpec):
        return len({round_.task for round_ in source.earlier} - {source.task})
    if source.continual is None:
        return 0
    names = source.continual.tasks.split(",") if isinstance(source.continual.tasks, str) else source.continual.tasks
    if len(names) == 1 and names[0] in BENCHMARKS:
        orders = BENCHMARKS[names[0]].orders
        names = orders.get(source.continual.order or next(iter(orders)), ())
    return max(len(names) - 1, 0)


def list_uncounted(source: Recipe | RoundSpec) -> tuple[str, ...]:
    """What else is held for a while that no term counts, in words."""
    method, rule = source.method, source.freeze
    found = [f"the distributions that method.{name} compares" for name in method.logits_readers]
    if "token_weights" in method.start_readers:
        found.append("the logits of the copy that method.token_weights asks")
    if method.ewc is not None:
        found.append("the Fisher information of all weights, which method.ewc measures when a round ends")
    found += [f"method.{name}'s passes over remembered rows" for name in ("gem", "agem") if name in method.names]
    copies = {"pull": rule.pull is not None, "average": rule.average is not None}
    return (*found, *(f"freeze.{key}'s copy of what trains" for key, is_on in copies.items() if is_on))


def find_limits(source: Recipe | RoundSpec, least_loss: LossKernel) -> Limits:
    """What the settings leave open to whoever looks for a way to make a round fit.

    Args:
        least_loss: the loss kernel that takes the least memory of those that are admitted.
    """
    rule, method = source.freeze, source.method
    others = set(method.names) - {"replay"}
    is_selective = rule.pull is not None and rule.pull.selective
    looks_at_steps = rule.redraw is not None or rule.choice == "spiel" or rule.average == "dynamic" or is_selective
    is_alone = bool({"gem", "agem"} & others) or method.adapter == "adalora"
    runs_on_host = source.train.extra.get("optim", OFFLOADED_OPTIM[0]) in OFFLOADED_OPTIM
    return Limits(
        least_loss=least_loss,
        can_offload=runs_on_host and not (others - {*ADAPTERS}) and not looks_at_steps and rule.average is None,
        can_fit=not others and rule.pull is None and rule.average is None,
        most_stage=0 if looks_at_steps or is_alone else 2 if {*NEEDS_WHOLE_WEIGHTS, *method.start_readers} & others else 3,
    )

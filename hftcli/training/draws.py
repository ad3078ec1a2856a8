"""The draws of a round that redraws what trains, once its steps are known."""

from dataclasses import replace

from hftcli.freezing.redrawing import count_cycle_steps, describe_draw, plan_draws, settle_every
from hftcli.methods.redraw import Redraw
from hftcli.runs.records import DrawReport
from hftcli.training.outlook import count_pass, list_own_draws
from hftcli.training.stages import Assignment, Rows


def settle_draws(task: Assignment, rows: Rows) -> Assignment:
    """The assignment with the plan of all that trains in one of the round's draws; what trains in none stays frozen."""
    rule, units, spec = task.spec.freeze, task.network.units, task.spec
    for method in task.methods:
        if isinstance(method, Redraw) and rule.redraw is not None:
            num_rows, batch_size = count_pass(task, rows), spec.train.global_batch_size
            every = settle_every(rule, units, num_rows, batch_size)
            draws = list_own_draws(task, rows)
            method.take_draws(draws, every)
            method.cycle_steps = count_cycle_steps(rule, units, num_rows, batch_size)
            return replace(task, plan=plan_draws(units, rule, spec.index, draws))
    return task


def report_draws(task: Assignment, num_steps: int) -> tuple[DrawReport, ...]:
    """What trained when."""
    sizes = {parameter.name: parameter.num_elements for unit in task.network.units for parameter in unit.parameters}
    found: list[DrawReport] = []
    for method in task.methods:
        if isinstance(method, Redraw):
            for place, draw in enumerate(method.draws):
                found.append(
                    DrawReport(
                        first_step=place * method.every + 1,
                        last_step=min((place + 1) * method.every, num_steps),
                        trained=describe_draw(task.network.units, draw),
                        num_trainable=sum(sizes[name] for name in draw),
                    )
                )
    return tuple(found)

"""Self-replay: the model trains on texts of its own beside the rows, so that it keeps writing as it does.

The texts are drawn from the start of the round from nothing, at temperature 1, before it trains. The loss on them is an
unbiased estimate of KL(start || model), up to a constant (arXiv 2505.13811; 2605.26097 draws so as well).
training/own_rows.py draws them.
"""

from hftcli.methods.method import Method
from hftcli.recipe.methods import SelfReplaySection


class SelfReplay(Method):
    """Texts of the start among the rows, in every epoch."""

    section: SelfReplaySection

    def count_own_rows(self, num_rows: int) -> int:
        """A share of the rows, at least one text."""
        return max(round(self.section.fraction * num_rows), 1)

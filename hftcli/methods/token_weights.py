"""Token weights: what a token counts in the loss, by how the model reads it in this very step.

    dft     p                    its probability (arXiv 2508.05629, equation 9)
    talr    p^(1 / tau)          tau, the median over a micro-batch's rows of their mean loss (arXiv 2509.20758)
    eaft    H / ln 20, at most 1 the entropy of what could stand there (arXiv 2601.02151, which takes it over the 20 likeliest
                                 tokens; here it is over all)

Each with `strength` as an exponent: 0 is plain training. A weight has no gradient, and the loss stays a sum over the trained
tokens of a step divided by their number, so that weights below 1 make a step smaller.

Shapes: B rows of a micro-batch, T tokens but for the first.
"""

import math

import torch

from hftcli.methods.method import Method
from hftcli.recipe.methods import TokenWeightsSection

EAFT_TOKENS = 20  # of arXiv 2601.02151: their largest entropy is a weight of 1


class TokenWeights(Method):
    """Tokens that contradict what the model knows count less."""

    section: TokenWeightsSection

    def weigh_tokens(self, log_probs_BT: torch.Tensor, entropies_BT: torch.Tensor, is_trained_BT: torch.Tensor) -> torch.Tensor:
        """What each trained token counts, (B, T); anything where none is trained."""
        log_probs_BT = log_probs_BT.detach().float()
        if self.section.kind == "dft":
            logs_BT = log_probs_BT
        elif self.section.kind == "talr":
            logs_BT = log_probs_BT / find_temperature(log_probs_BT, is_trained_BT)
        else:
            shares_BT = entropies_BT.detach().float() / math.log(EAFT_TOKENS)
            logs_BT = shares_BT.clamp(torch.finfo(torch.float32).tiny, 1).log()
        return (self.section.strength * logs_BT).exp()


def find_temperature(log_probs_BT: torch.Tensor, is_trained_BT: torch.Tensor) -> torch.Tensor:
    """Tau: the median over rows of the mean loss of their trained tokens; rows that train none do not count."""
    counts_B = is_trained_BT.sum(1)
    losses_B = -(log_probs_BT * is_trained_BT).sum(1) / counts_B
    tau = losses_B[counts_B > 0].quantile(0.5) if bool((counts_B > 0).any()) else losses_B.new_ones(())
    return tau.clamp(min=1e-6)  # a batch that is known by heart

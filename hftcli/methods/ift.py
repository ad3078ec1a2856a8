"""Intuitive fine-tuning (IFT, arXiv 2405.11870): an answer is learned after what the model itself would have said.

The model reads a micro-batch twice. The first time, without a gradient, it gives the likeliest token at each place of an
answer. The second time it reads, at these places and nowhere else, a mixture of the two tokens' embeddings, the paper's
temporal residual connection:

    e_i = (1 - mix) E[y_i] + mix E[argmax p(. | y_<i)]

and its losses l are weighed by those that follow from them, each divided so that the weights of a row have the mean 1:

    w_t ~ sum over j >= t of decay^(j - t) l_j,    loss = mean over t of w_t l_t

As in the authors' code (TsinghuaC3I/Intuitive-Fine-Tuning), the weights are not detached, `decay: 0` weighs all alike, and what
is mixed in is looked up in the embeddings as they are at that step, without a gradient. There the rows' own tokens have none
either, so that an input table that is not tied to the head never trains; here they have theirs, where the freeze plan trains
the table, so that `mix: 0, decay: 0` is plain training. The sum ends with the row, of several packed ones too.

Shapes: B rows of a micro-batch, T tokens, N places before tokens that some row trains on, D the embeddings' width.
"""

import torch
from transformers import PreTrainedModel, Trainer

from hftcli.methods.method import Method
from hftcli.models.checkpoint import is_partitioned
from hftcli.models.device import is_mixed, is_sharded
from hftcli.models.start_copy import evaluating
from hftcli.recipe.methods import IftSection
from hftcli.runs.run import Round
from hftcli.runs.spec import RoundSpec

TILE_TOKENS = 512  # whose logits are held at once
IGNORED = -100


class Ift(Method):
    """The model's own tokens among those that it reads, and weights by what follows from a token."""

    section: IftSection
    guesses_BTD: torch.Tensor | None = None  # waiting for the model to read the micro-batch
    is_mixed_BT1: torch.Tensor
    documents_BT: torch.Tensor | None = None

    def __init__(self, spec: RoundSpec, section: IftSection):
        super().__init__(spec, section)
        self.reads_ahead = section.mix > 0 or section.decay > 0

    def start(self, trainer: Trainer) -> None:
        """Stand behind the embeddings, whatever layer they are by now."""
        self.handle = trainer.model.get_input_embeddings().register_forward_hook(self._mix)

    def finish(self, trainer: Trainer, round_: Round) -> None:
        """Leave them."""
        self.handle.remove()

    @torch.no_grad()
    def read_ahead(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], columns_N: torch.Tensor) -> None:
        """What the model would have said at each place of an answer."""
        documents_BT = find_documents(inputs)
        self.documents_BT = documents_BT[:, 1:]
        if not self.section.mix:
            return
        is_answer_BT = inputs["labels"] != IGNORED
        is_answer_BT[:, 0] = False
        is_answer_BT[:, 1:] &= documents_BT[:, 1:] == documents_BT[:, :-1]  # nothing is said over a border
        self.is_mixed_BT1 = is_answer_BT.unsqueeze(-1)
        guesses_BT = inputs["input_ids"].clone()
        with evaluating(model), self._casting(guesses_BT.device):
            guesses_BT[:, columns_N + 1] = find_likeliest(model, inputs, columns_N)
            self.guesses_BTD = model.get_input_embeddings()(guesses_BT)

    def _casting(self, device: torch.device) -> torch.autocast:
        """As the trainer calls the model: DeepSpeed holds its weights in bfloat16 itself."""
        return torch.autocast(device.type, torch.bfloat16, enabled=is_mixed(self.spec) and not is_sharded(self.spec))

    def _mix(self, layer: torch.nn.Module, given: object, read_BTD: torch.Tensor) -> torch.Tensor:
        """What the model reads, where it trains on the micro-batch that was read ahead; anything else is left alone."""
        if self.guesses_BTD is None or not torch.is_grad_enabled():
            return read_BTD
        guesses_BTD, self.guesses_BTD = self.guesses_BTD, None
        mixed_BTD = (1 - self.section.mix) * read_BTD + self.section.mix * guesses_BTD.to(read_BTD.dtype)
        return torch.where(self.is_mixed_BT1, mixed_BTD, read_BTD)

    def weigh_tokens(
        self, log_probs_BT: torch.Tensor, entropies_BT: torch.Tensor, is_trained_BT: torch.Tensor
    ) -> torch.Tensor | None:
        """What each trained token counts (B, T), with a gradient."""
        documents_BT, self.documents_BT = self.documents_BT, None
        if documents_BT is None or not self.section.decay:
            return None
        return weigh_by_losses(-log_probs_BT.float(), is_trained_BT, documents_BT, self.section.decay)


def find_documents(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The number of the row that each token is of (B, T), within a sequence that may be packed of several."""
    if "position_ids" not in inputs:
        return torch.zeros_like(inputs["input_ids"])
    return (inputs["position_ids"] == 0).cumsum(1)


def find_likeliest(model: PreTrainedModel, inputs: dict[str, torch.Tensor], columns_N: torch.Tensor) -> torch.Tensor:
    """The likeliest token after each of some places, (B, N); the logits are held a tile at a time.

    A factor or a cap that a model lays on its logits leaves the likeliest one where it is.
    """
    read = {name: values for name, values in inputs.items() if name != "labels"} | {"use_cache": False}
    hidden_BND = model.base_model(**read).last_hidden_state[:, columns_N]
    head = model.get_output_embeddings()
    # The ranks gather a head of which each has a piece together, and so once.
    size = hidden_BND.shape[1] if is_partitioned(head.weight) else TILE_TOKENS // len(hidden_BND)
    tiles = hidden_BND.split(max(size, 1), dim=1)
    return torch.cat([head(tile).argmax(-1) for tile in tiles], dim=1)


def weigh_by_losses(
    losses_BT: torch.Tensor, is_trained_BT: torch.Tensor, documents_BT: torch.Tensor, decay: float
) -> torch.Tensor:
    """Weights (B, T) by the losses from each token to the end of its row, their mean 1 over the trained tokens of the row.

    Args:
        losses_BT: of the tokens; only those of trained ones count.
        documents_BT: the row that each token is of; rising within a sequence.
    """
    is_trained_BT = is_trained_BT.to(losses_BT.dtype)
    sums_BT = losses_BT * is_trained_BT
    reach = 1
    while reach < losses_BT.shape[1]:  # sums over 2, 4, 8, ... tokens: what lies in another row has no part in them
        is_same_BT = (documents_BT[:, reach:] == documents_BT[:, :-reach]).to(losses_BT.dtype)
        further_BT = torch.nn.functional.pad(decay**reach * is_same_BT * sums_BT[:, reach:], (0, reach))
        sums_BT = sums_BT + further_BT
        reach *= 2
    sums_BT = sums_BT * is_trained_BT
    rows_BT = documents_BT - documents_BT.min()
    num_rows = int(rows_BT.max()) + 1
    totals_BR, counts_BR = (
        values_BT.new_zeros(len(losses_BT), num_rows).scatter_add(1, rows_BT, values_BT)
        for values_BT in (sums_BT, is_trained_BT)
    )
    scales_BR = counts_BR / totals_BR.clamp(min=1e-12)  # a row that is known by heart
    return sums_BT * scales_BR.gather(1, rows_BT)

"""What the tests of models share: small checkpoints, a round's change of their weights, and what is read of them."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from hftcli import PACKAGE
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.selection import FreezePlan, FreezeRule, make_plan
from hftcli.models.checkpoint import load_model, save_checkpoint, save_delta
from hftcli.models.description import describe_model
from hftcli.models.proof import CheckpointReader
from hftcli.recipe.sections import ModelSection

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 32}
TOKENIZER = AutoTokenizer.from_pretrained(PACKAGE / "tinyworld" / "model")


def draw(folder: Path, round_index: int = 0) -> FreezePlan:
    description = describe_model(str(folder))
    return make_plan(assign_roles(description.model_type, description.parameters), FreezeRule(), round_index)


def train(
    start: Path,
    full: Path,
    delta: Path,
    round_index: int = 0,
    dtype=torch.float32,
    moved: tuple[str, ...] = (),
    seen: slice = slice(None),
) -> FreezePlan:
    """What a round does to the weights, kept in both forms.

    Args:
        moved: frozen parameters to move by one bit, as a bug would.
        seen: the tokens whose embeddings change.
    """
    plan = draw(start, round_index)
    model = load_model(ModelSection(path=str(start)), start, plan, mixed=False, sharded=False)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    for name in plan.trained:
        rows = seen if "embed_tokens" in name else slice(None)
        weights[name][rows] += 0.1 * (round_index + 1)
    weights = {name: values.to(dtype) for name, values in weights.items()}
    for name in moved:
        weights[name].view(torch.int32).view(-1)[0] ^= 1
    for folder in (full, delta):
        folder.parent.mkdir(exist_ok=True, parents=True)
    save_checkpoint(model, TOKENIZER, dict(weights), full)
    save_delta(model, TOKENIZER, dict(weights), delta, start, plan)
    return plan


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    names = tuple(parameter.name for parameter in describe_model(str(folder)).parameters)
    reader = CheckpointReader(folder, names)
    return {name: reader.read(name) for name in names}


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, values in one.items():
        assert values.dtype == two[name].dtype, name
        assert torch.equal(values.contiguous().view(torch.uint8), two[name].contiguous().view(torch.uint8)), name

"""What the tests of models share: small checkpoints, a round's change of their weights, and what is read of them."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from hftcli import PACKAGE
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import FreezePlan, make_plan
from hftcli.models.checkpoint import load_model, save_checkpoint, save_delta
from hftcli.models.configs import settle_configs
from hftcli.models.description import describe_model
from hftcli.models.reader import CheckpointReader, Start
from hftcli.recipe.sections import ModelSection

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 32}
TOKENIZER = AutoTokenizer.from_pretrained(PACKAGE / "tinyworld" / "model")


def draw(folder: Path, round_index: int = 0, **rule: str) -> FreezePlan:
    description = describe_model(str(folder))
    return make_plan(assign_roles(description.model_type, description.parameters), FreezeRule(**rule), round_index)


def train(
    start: Path,
    full: Path,
    delta: Path,
    round_index: int = 0,
    dtype: str | None = None,
    seen: slice = slice(None),
    **rule: str,
) -> FreezePlan:
    """What a round does to the weights, kept in both forms.

    Args:
        dtype: `model.dtype`.
        seen: the tokens whose embeddings change.
        rule: of the freeze plan, where it is not the default.
    """
    plan, section = draw(start, round_index, **rule), ModelSection(path=str(start), dtype=dtype)
    model = load_model(section, start, plan, mixed=False, sharded=False)
    masters = {name: model.get_parameter(name).detach().clone() for name in plan.trained}
    for name, values in masters.items():
        values[seen if "embed_tokens" in name else slice(None)] += 0.1 * (round_index + 1)
    for folder in (full, delta):
        folder.parent.mkdir(exist_ok=True, parents=True)
    configs = settle_configs(start, type(model).__name__, TOKENIZER, dtype, ())
    stored = Start(section, start, (*plan.trained, *plan.frozen))
    save_checkpoint(configs, masters, full, stored)
    save_delta(configs, masters, delta, stored, plan)
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

"""LoRA adapters of PEFT's that read only the directions of their inputs that earlier inputs use least."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from hftcli.errors import InputError, VerificationError
from hftcli.freezing.directions import list_inputs, open_directions
from hftcli.library.given import hash_tensor, list_model_units, read_earlier, take_texts
from hftcli.models.closure import measure_leak
from hftcli.models.directed import find_basis
from hftcli.models.narrow_adapter import PlainReader
from hftcli.models.tensors import CODES


@dataclass
class QuietLora:
    """A model of PEFT's whose adapters read only the directions that earlier inputs use least.

    Attributes:
        readers: what stands for A, by the name of the layer.
        digests: hashes of all but A and B, as they were.
    """

    readers: dict[str, PlainReader]
    digests: dict[str, str]

    def verify(self, model: PeftModel) -> dict[str, float]:
        """By layer, what A reads of the closed directions, as a share of its length: rounding alone.

        Raises:
            VerificationError: it reads more, or something that is no A or B of these layers moved.
        """
        weights = dict(model.get_base_model().named_parameters())
        faults = [name for name, digest in self.digests.items() if hash_tensor(weights[name].detach()) != digest]
        found = {}
        for name, reader in self.readers.items():
            values = reader.weight.detach()
            weight_RI, basis_NWQ = (value.cpu().double().numpy() for value in (values, reader.basis))
            leak = measure_leak(np.zeros_like(weight_RI), weight_RI, basis_NWQ, "F32", CODES[values.dtype])
            found[name] = leak.fraction
            faults += [] if leak.is_rounding else [name]
        if faults:
            raise VerificationError(f"moved in what was closed: {', '.join(faults[:5])}", "give the model that was narrowed")
        return found


def quiet_lora(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    share: float = 0.5,
    keep: Iterable[str] = (),
    blocks: int | None = None,
) -> QuietLora:
    """Have the LoRA adapters of a model read only the directions of their inputs that earlier inputs use least.

    What is saved and merged is a plain adapter of PEFT's.

    Args:
        share: of the directions that stay open.
        keep: texts that must not be forgotten, beside what the model writes of itself.
        blocks: see `freeze.blocks`.

    Raises:
        InputError: DoRA, which scales whole rows, an adapter that is not at zero, or more that trains than A and B.
        ModelError: a model whose inputs are not known.
    """
    base, adapter = model.get_base_model(), model.active_adapter
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer) and adapter in layer.lora_A}
    if model.peft_config[adapter].use_dora:
        raise InputError("DoRA scales whole rows, closed directions among them", "set use_dora=False")
    own = ((name.replace(".base_layer.", "."), value) for name, value in base.named_parameters() if ".lora_" not in name)
    units, num_heads = list_model_units(own, base)
    adapted = [unit for unit in units if unit.name in layers]
    if not adapted:
        raise InputError("the model has no LoRA adapter on a layer of attention or mlp", "give what get_peft_model made")
    if not 0 < share < 1:
        raise InputError(f"share is {share}: of what adapters read, a part stays open", "give more than 0 and less than 1")
    inputs, parts = list_inputs(units, blocks, num_heads), open_directions(adapted, Fraction(str(share)), blocks, num_heads)
    layers = {unit.name: layers[unit.name] for unit in adapted}
    check_start(base, layers, adapter)
    with model.disable_adapter():
        moments = read_earlier(base, inputs, tokenizer, take_texts(keep))
    readers: dict[str, PlainReader] = {}
    shared: dict[str, torch.Tensor] = {}
    for name, part in parts.items():
        layer = layers[name.removesuffix(".weight")]
        held = layer.get_base_layer().weight
        if part.input not in shared:
            dtype = held.dtype if held.dtype.is_floating_point else torch.float32
            shared[part.input] = find_basis(moments[part.input], part.num_open)[0].to(held.device, dtype)
        layer.lora_A[adapter] = readers[name] = PlainReader(layer.lora_A[adapter].weight, shared[part.input])
    still = list_still(base, layers, adapter)
    return QuietLora(readers, {name: hash_tensor(value.detach()) for name, value in still.items()})


def list_still(base: nn.Module, layers: Mapping[str, LoraLayer], adapter: str) -> dict[str, nn.Parameter]:
    """What of a model is not the A and B of these layers, by name."""
    trained = [
        value for layer in layers.values() for value in (*layer.lora_A[adapter].parameters(), layer.lora_B[adapter].weight)
    ]
    known = set(map(id, trained))
    return {name: value for name, value in base.named_parameters() if id(value) not in known}


def check_start(base: nn.Module, layers: Mapping[str, LoraLayer], adapter: str) -> None:
    """Raises: InputError: the adapter of one of these layers is not at zero, or more than their A and B would train."""
    for name, layer in layers.items():
        if layer.lora_B[adapter].weight.count_nonzero():
            raise InputError(
                f"the adapter is not at its start: B of {name} is not 0, and narrowing A would change the model",
                "give a fresh LoRA of PEFT's default init_lora_weights, or merge the old one first",
            )
    for name, value in list_still(base, layers, adapter).items():
        if value.requires_grad:
            raise InputError(
                f"{name} would train too, and is no A or B of a layer of attention or mlp: nothing would hold it",
                "give a LoRA without bias, lora_bias and targets elsewhere, or set requires_grad=False there",
            )

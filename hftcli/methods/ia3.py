"""IA3 (arXiv 2205.05638, vectors by PEFT): keys, values and the mlp's inner activations are scaled, each by a learned vector.

The keys and values are what their layers give out, bias and all; the inner activations are what the mlp's last layer takes in,
experts left out.
Where one layer gives out the queries as well (Phi-3, GPT-NeoX, GPT-2), these are scaled too, as PEFT does it. PEFT's own table
has the queries in place of the keys for Qwen and Gemma; the keys are the paper's.

The vectors begin at one, where the model is the start. They stand in those of the layers that the freeze plan trains. The
checkpoint is a plain model with the vectors multiplied into the matrices, rounded once to the start's data type, and
ROUND/adapter/ on the round's start is the same model. In a sequence every round begins with new vectors.

Shapes: I and O, inputs and outputs of a linear layer. A vector is (O, 1), or (1, I) for the mlp's last layer.
"""

from pathlib import Path

import torch
from peft import IA3Config, inject_adapter_in_model
from peft.tuners.ia3 import IA3Layer
from transformers import PreTrainedModel, Trainer
from transformers.pytorch_utils import Conv1D

from hftcli.errors import ModelError
from hftcli.freezing.narrowing import restrict_plan
from hftcli.freezing.roles import Unit
from hftcli.freezing.selection import FreezePlan
from hftcli.methods.lora import ADAPTER, check_merging, write_peft_folder
from hftcli.methods.method import Method
from hftcli.models.checkpoint import lay_in, read_master
from hftcli.models.reader import Start
from hftcli.runs.run import Round

# By role, the last parts of the names of the layers that are scaled.
SCALED = {
    "attention": ("k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"),
    "mlp": ("down_proj", "dense_4h_to_h", "c_proj"),
}


class Ia3(Method):
    """(IA)^3: vectors that scale keys, values and the mlp's inner activations train in place of the weights."""

    leaves_another_model = True

    def narrow_plan(self, plan: FreezePlan, units: tuple[Unit, ...], num_heads: int = 1) -> FreezePlan:
        """Raises: ModelError: the plan trains none of the layers that are scaled."""
        trained = set(plan.trained)
        scaled = [unit for unit in units if _last_part(unit.name) in SCALED.get(unit.role, ())]
        names = {
            parameter.name
            for unit in scaled
            for parameter in unit.parameters
            # The bias of the mlp's last layer is added behind what is scaled.
            if parameter.name in trained and (unit.role == "attention" or parameter.name.endswith(".weight"))
        }
        if not names:
            raise ModelError(
                f"no vector would train: ia3 scales {', '.join(dict.fromkeys(_last_part(unit.name) for unit in scaled))}, and "
                "the freeze plan trains none of them",
                "raise freeze.trainable_fraction",
            )
        return restrict_plan(plan, units, names)

    def prepare_model(self, model: PreTrainedModel, plan: FreezePlan, start: Path, mixed: bool, sharded: bool) -> None:
        """Lay vectors of ones over the layers that the plan trains; the weights below stay as they are."""
        self.base = start
        names = [name.removesuffix(".weight") for name in plan.trained if name.endswith(".weight")]
        self.stored = stored = Start(self.spec.model, start, plan.trained)
        self.merged: dict[str, torch.Tensor] = {}
        check_merging(stored, plan, mixed and sharded)
        if mixed and not sharded:  # only the vectors need float32
            for name in set(plan.trained) - set(stored.masters):
                weight = model.get_parameter(name)
                weight.data = weight.data.to(stored.get_dtype(name))
        self.config = IA3Config(
            target_modules=names,
            feedforward_modules=[name for name in names if _last_part(name) in SCALED["mlp"]],
            fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
            task_type="CAUSAL_LM",
        )
        inject_adapter_in_model(self.config, model, ADAPTER)
        self.layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, IA3Layer)}
        if not sharded:
            for layer in self.layers.values():
                layer.ia3_l[ADAPTER].data = layer.ia3_l[ADAPTER].data.float()

    def finish(self, trainer: Trainer, round_: Round) -> None:
        """Save the vectors, merge them, and leave the model as if there had been none."""
        model, sharded = trainer.model, trainer.is_deepspeed_enabled
        scales = {}
        for name, layer in self.layers.items():
            scale = read_master(layer.ia3_l[ADAPTER], sharded).detach().float()
            scales[f"{name}.ia3_l"] = scale.cpu()
            base = layer.get_base_layer()
            keeps = sharded and trainer.args.process_index == 0
            self._multiply(f"{name}.weight", base.weight, scale.T if self.config.fan_in_fan_out else scale, sharded, keeps)
            if base.bias is not None and not layer.is_feedforward:
                self._multiply(f"{name}.bias", base.bias, scale[:, 0], sharded, keeps)
            model.set_submodule(name, base)
        del model.peft_config
        if trainer.args.process_index == 0:
            write_peft_folder(scales, self.config, self.base, round_.adapter)

    def list_merged(self) -> dict[str, torch.Tensor]:
        """The weights and biases with their vectors, in float32."""
        return self.merged

    def _multiply(self, name: str, parameter: torch.nn.Parameter, scale: torch.Tensor, sharded: bool, keeps: bool) -> None:
        merged = self.stored.read_master(name).float().to(scale.device) * scale
        if keeps:
            self.merged[name] = merged.cpu()
        if sharded:
            lay_in(parameter, merged)
        else:
            parameter.data = merged


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]

"""Sequential LoRA (arXiv 2106.09685, adapters by PEFT): one low-rank adapter, trained through all tasks.

A linear layer W that the freeze plan trains gets an adapter: W x + (lora_alpha / r) B A x. The checkpoint of every round is a
plain model with the adapters merged in, rounded once to the start's data type.

A layer that trains in this round goes back to what it was before the first round, and takes its adapter up where an earlier
round left it; so its weights are always that start plus one product, however often it was saved in 16 bits. A layer that does
not train in this round keeps the bytes of the round's start, with its adapter merged in, and needs none here; ROUND/adapter/
carries it on. So ROUND/adapter/ on the run's start is the model of the round. Where float32 masters lie beside the start, the
adapters stand on these, and the files of the start are their rounding.

Quiet adapters (`quiet`) read only the directions that earlier inputs use least (models/narrow_adapter.py). These are others in
every round, so every round begins new adapters on its own start, and merges them.

Shapes: I and O, inputs and outputs of a linear layer; R, the rank.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer
from transformers.pytorch_utils import Conv1D

from hftcli.errors import ModelError
from hftcli.freezing.narrowing import narrow_plan
from hftcli.freezing.roles import Unit
from hftcli.freezing.selection import FreezePlan
from hftcli.methods.method import Method
from hftcli.models.checkpoint import is_partitioned, lay_in, read_master
from hftcli.models.description import fetch_checkpoint
from hftcli.models.keeping import keeping
from hftcli.models.narrow_adapter import PEFT_PREFIX, NarrowReader, spread
from hftcli.models.reader import Start
from hftcli.models.tensors import write_tensors
from hftcli.recipe.methods import LoraSection, LowRankSection
from hftcli.runs.run import Round
from hftcli.runs.spec import RoundSpec

ADAPTER = "default"  # PEFT's name for the only one

Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]  # A (R, I) and B (O, R) by the name of the layer


class Lora(Method):
    """LoRA: low-rank adapters train in place of the weights, and go on from round to round."""

    section: LowRankSection

    leaves_another_model = True

    def __init__(self, spec: RoundSpec, section: LowRankSection):
        super().__init__(spec, section)
        self.open_fraction = section.open_fraction if isinstance(section, LoraSection) else None
        self.bases: dict[str, torch.Tensor] = {}
        self.layers: dict[str, LoraLayer] = {}
        self.merged: dict[str, torch.Tensor] = {}

    def narrow_plan(self, plan: FreezePlan, units: tuple[Unit, ...], num_heads: int = 1) -> FreezePlan:
        """The linear layers of the plan that `target_modules` names."""
        return narrow_plan(plan, units, self.section.target_modules, self.open_fraction, num_heads)

    def take_bases(self, bases: dict[str, torch.Tensor]) -> None:
        """Keep them for the layers."""
        self.bases = bases

    def find_base(self, start: Path) -> Path:
        """The checkpoint that the adapters stand on."""
        if not self.spec.earlier or self.open_fraction:
            return start
        return fetch_checkpoint(Round(Path(self.spec.earlier[0].folder)).find_start())

    def read_last(self) -> Adapter:
        """The adapters to go on with."""
        last = None if self.open_fraction else self.last_round
        return read_adapter(last.adapter) if last is not None else {}

    def prepare_model(self, model: PreTrainedModel, plan: FreezePlan, start: Path, mixed: bool, sharded: bool) -> None:
        """Lay adapters over the layers of the plan, whose weights are the base's; the last round's adapters go on."""
        self.base, self.last = self.find_base(start), self.read_last()
        self.directions = plan.directions or {}
        names = [name.removesuffix(".weight") for name in plan.trained]
        self.stored = base = Start(self.spec.model, self.base, plan.trained)
        check_merging(base, plan, mixed and sharded)
        for name in plan.trained:
            weight = model.get_parameter(name)
            if is_partitioned(weight):
                lay_in(weight, base.read_master(name))
                continue
            held_dtype = weight.dtype
            if mixed and not sharded and name not in base.masters:
                held_dtype = base.get_dtype(name)  # exact, and no larger than it must be
            weight.data = base.read_master(name).to(held_dtype)
        is_transposed = isinstance(model.get_submodule(names[0]), Conv1D)
        self.config = LoraConfig(
            r=self.section.r, lora_alpha=self.section.lora_alpha, lora_dropout=self.section.lora_dropout, target_modules=names,
            use_rslora=self.section.use_rslora, fan_in_fan_out=is_transposed, task_type="CAUSAL_LM",
        )  # fmt: skip
        with torch.random.fork_rng():  # a new A in every round, the same one on all ranks
            torch.manual_seed(self.spec.train.seed + self.spec.index)
            inject_adapter_in_model(self.config, model, ADAPTER)
        self.layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
        for name, layer in self.layers.items():
            for place, part in enumerate((layer.lora_A, layer.lora_B)):
                weight = part[ADAPTER].weight
                if not sharded:
                    weight.data = weight.data.float()  # the master; DeepSpeed makes it by itself, out of what it is given
                if name in self.last:
                    weight.data.copy_(self.last[name][place])
        self._narrow()
        self.num_adapter_weights = sum(value.numel() for value in model.parameters() if value.requires_grad)

    def restore_masters(self) -> None:
        """The last round's adapters go on as they were, and not as bfloat16 rounds them."""
        from deepspeed.utils import safe_set_full_fp32_param

        going_on = [(layer, self.last[name]) for name, layer in self.layers.items() if name in self.last]  # alike on all ranks
        for layer, factors in going_on:
            for part, values in zip((layer.lora_A, layer.lora_B), factors, strict=True):
                weight = part[ADAPTER].weight
                safe_set_full_fp32_param(weight, values.float().to(weight.device))

    def _narrow(self) -> None:
        """Have the A of every layer read in the plan's directions alone, where it has some."""
        shared: dict[str, torch.nn.Parameter] = {}
        for name, parts in self.directions.items():
            reads = self.layers[name.removesuffix(".weight")].lora_A
            weight = reads[ADAPTER].weight
            if parts.input not in shared:
                shared[parts.input] = torch.nn.Parameter(self.bases[parts.input].to(weight.device), requires_grad=False)
            reads[ADAPTER] = NarrowReader(weight, shared[parts.input])

    @contextmanager
    def holding_end(self, trainer: Trainer) -> Iterator[None]:
        """Where the files round them, the merged weights without the adapters for a while, rounded."""
        rounded = {name: layer for name, layer in self.layers.items() if self.stored.is_rounded(f"{name}.weight")}
        scaling = {name: layer.scaling[ADAPTER] for name, layer in rounded.items()}
        with keeping([layer.get_base_layer().weight for layer in rounded.values()]):
            try:
                for name, layer in rounded.items():
                    merged = self._merge(name, *self._read_factors(name, trainer.is_deepspeed_enabled))
                    lay_in(layer.get_base_layer().weight, self.stored.round(f"{name}.weight", merged))
                    layer.scaling[ADAPTER] = 0.0
                yield
            finally:
                for name, layer in rounded.items():
                    layer.scaling[ADAPTER] = scaling[name]

    def _read_factors(self, name: str, sharded: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """A (R, I) and B (O, R) of a layer's adapter in float32; all ranks together."""
        layer = self.layers[name]
        reader = layer.lora_A[ADAPTER]
        weight_A_RI, weight_B_OR = (
            read_master(part.weight, sharded).detach().float() for part in (reader, layer.lora_B[ADAPTER])
        )
        if isinstance(reader, NarrowReader):
            weight_A_RI = spread(weight_A_RI, self.bases[self.directions[f"{name}.weight"].input])
        return weight_A_RI, weight_B_OR

    def _merge(self, name: str, weight_A_RI: torch.Tensor, weight_B_OR: torch.Tensor) -> torch.Tensor:
        """The exact base and the adapter, in float32."""
        product = self.layers[name].scaling[ADAPTER] * weight_B_OR @ weight_A_RI
        below = self.stored.read_master(f"{name}.weight").float().to(product.device)
        return below + (product.T if self.config.fan_in_fan_out else product)

    def finish(self, trainer: Trainer, round_: Round) -> None:
        """Save the adapters, merge them, and leave the model as if there had been none."""
        model, sharded = trainer.model, trainer.is_deepspeed_enabled
        trained = {}
        for name, layer in self.layers.items():
            factors = self._read_factors(name, sharded)
            trained[name] = (factors[0].cpu(), factors[1].cpu())
            base, merged = layer.get_base_layer(), self._merge(name, *factors)
            if sharded and trainer.args.process_index == 0:
                self.merged[f"{name}.weight"] = merged.cpu()
            if sharded:
                lay_in(base.weight, merged)
            else:
                base.weight.data = merged
            model.set_submodule(name, base)
        del model.peft_config
        if trainer.args.process_index == 0:
            write_adapter(self.last | trained, self.config, self.base, round_.adapter)

    def list_merged(self) -> dict[str, torch.Tensor]:
        """The weights with their adapters, in float32."""
        return self.merged


def check_merging(start: Start, plan: FreezePlan, is_rounded: bool) -> None:
    """Raises: ModelError: DeepSpeed in bfloat16 holds rounded what the adapters would be merged into."""
    wide = [name for name in plan.trained if start.get_dtype(name) != torch.bfloat16]
    if is_rounded and wide:
        dtype = str(start.get_dtype(wide[0])).removeprefix("torch.")
        raise ModelError(
            f"{start.folder} stores {wide[0]} in {dtype}, and DeepSpeed in bfloat16 holds it rounded: an adapter would be "
            "merged into other weights",
            "set model.dtype: bfloat16, which rounds the start once, before the round, or train.bf16: false",
        )


def read_adapter(folder: Path) -> Adapter:
    """The adapters of a folder in PEFT's form."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = dict.fromkeys(key.removeprefix(PEFT_PREFIX).partition(".lora_")[0] for key in tensors)
    return {
        name: (tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"], tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"]) for name in names
    }


def write_adapter(adapter: Adapter, config: LoraConfig, base: Path, folder: Path) -> None:
    """Write adapters in PEFT's form, so that PEFT lays them over the base."""
    config.target_modules = set(adapter)
    tensors = {
        f"{PEFT_PREFIX}{name}.lora_{letter}.weight": part
        for name, parts in adapter.items()
        for letter, part in zip("AB", parts, strict=True)
    }
    write_peft_folder(tensors, config, base, folder)


def write_peft_folder(tensors: dict[str, torch.Tensor], config: PeftConfig, base: Path, folder: Path) -> None:
    """Write a folder that PEFT loads on top of `base`, whole or not at all.

    Args:
        tensors: by the names that they have in PEFT's files.
    """
    temporary = folder.with_name(f".{folder.name}")
    for leftover in (temporary, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    config.base_model_name_or_path = str(base)
    config.inference_mode = True
    config.save_pretrained(str(temporary))
    write_tensors(temporary / "adapter_model.safetensors", tensors)
    temporary.replace(folder)

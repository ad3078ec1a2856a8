"""Any adapter of PEFT's that can be merged: `method.peft: {type: NAME, ...}`, with the keys of PEFT's own class.

Adapters stand on what the freeze plan trains: on the linear layers of attention and mlp, or, by the type, on norms or on rows
of the embeddings. A round begins new adapters on its own start, and ends with a plain model into which they are merged in
float32; ROUND/adapter/ on that start is the same model. The config is checked, and the adapters are laid over a model without
weights, before anything is loaded.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.save_and_load import get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.pytorch_utils import Conv1D

from hftcli.errors import InputError, ModelError
from hftcli.freezing.activations import Adapters
from hftcli.freezing.narrowing import refuse_unknown, restrict_plan
from hftcli.freezing.roles import Unit
from hftcli.freezing.selection import FreezePlan
from hftcli.methods.lora import ADAPTER, check_merging, write_peft_folder
from hftcli.methods.method import Method
from hftcli.methods.peft_config import CHOOSING, build_config, find_inner, get_line, is_matched, list_names
from hftcli.models.checkpoint import find_parameter, read_master
from hftcli.models.keeping import keeping_modules
from hftcli.models.reader import Start
from hftcli.recipe.methods import PeftSection
from hftcli.recipe.section import Section
from hftcli.runs.run import Round
from hftcli.runs.spec import RoundSpec

# By type, the roles of the units that take adapters, where these are not the matrices of the layers.
ROLES = {"LN_TUNING": ("norm", "final_norm"), "TRAINABLE_TOKENS": ("embedding",)}
MATRICES = ("attention", "mlp")
BIASED = ("IA3", "GLORA")  # which change the biases of what they adapt, IA3 but for the mlp's last layer
RANKS = {"LORA": "r", "ADALORA": "init_r"}  # which multiply by two factors of this rank, and where the rank stands
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a weight


class Peft(Method):
    """An adapter of one of PEFT's types."""

    section: PeftSection
    leaves_another_model = True

    def __init__(self, spec: RoundSpec, section: Section):
        super().__init__(spec, section)
        self.type, self.given = self.read_section()
        self.targets: list[str] = []
        self.merged: dict[str, torch.Tensor] = {}
        build_config(self.type, self.given, ["x"])  # what is wrong with it does not depend on the layers

    def read_section(self) -> tuple[str, dict[str, Any]]:
        """PEFT's type, and the keys of its class."""
        return self.section.type, self.section.extra

    def narrow_plan(self, plan: FreezePlan, units: tuple[Unit, ...], num_heads: int = 1) -> FreezePlan:
        """The weights under the adapters."""
        self.targets = self.choose_targets(plan, units)
        return narrow_to(self.type, self.given, self.targets, plan, units)

    def choose_targets(self, plan: FreezePlan, units: tuple[Unit, ...]) -> list[str]:
        """The layers that take adapters."""
        return choose_targets(self.type, self.given, plan, units)

    def check_start(self, start: Path, plan: FreezePlan) -> None:
        """Lay the adapters over the start without its weights, and count theirs."""
        self.adapters = count_adapters(self.type, self.given, self.targets, str(start))

    def make_config(self, model: PreTrainedModel) -> PeftConfig:
        """PEFT's config for these layers."""
        return build_config(self.type, self.given, self.targets, isinstance(model.get_submodule(self.targets[0]), Conv1D))

    def prepare_model(self, model: PreTrainedModel, plan: FreezePlan, start: Path, mixed: bool, sharded: bool) -> None:
        """Lay new adapters over the layers of the plan; the weights below stay as they are."""
        self.base, self.plan = start, plan
        self.stored = stored = Start(self.spec.model, start, plan.trained)
        check_merging(stored, plan, mixed and sharded)
        if mixed and not sharded:  # only the adapters need float32
            for name in set(plan.trained) - set(stored.masters):
                weight = model.get_parameter(name)
                weight.data = weight.data.to(stored.get_dtype(name))
        self.config = self.make_config(model)
        if self.type == "SHIRA":
            torch.sparse.check_sparse_tensor_invariants.disable()  # which torch warns of where nobody says so
        below = {name: sum_bits(model.get_parameter(name)) for name in plan.trained}
        with torch.random.fork_rng():  # new adapters in every round, the same ones on all ranks
            torch.manual_seed(self.spec.train.seed + self.spec.index)
            self.tuner = make_tuner(self.config, model)
        moved = next((name for name, total in below.items() if sum_bits(find_parameter(model, name)) != total), None)
        if moved is not None:
            raise InputError(
                f"method.peft: adapters of type {self.type} with these keys change the weights below, such as {moved}, and "
                "these stay the start's",
                "drop the key that does this, or take another type",
            )
        self.layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.num_adapter_weights = sum(parameter.numel() for parameter in trained)
        if not sharded:
            for parameter in trained:
                parameter.data = parameter.data.float()

    @contextmanager
    def laying_aside(self) -> Iterator[None]:
        """The model without the adapters, some of which are no identity at their start."""
        for layer in self.layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)

    @contextmanager
    def holding_end(self, trainer: Trainer) -> Iterator[None]:
        """Where the files round them, the merged weights without the adapters for a while, rounded."""
        if not any(self.stored.is_rounded(name) for name in self.plan.trained):
            yield
            return
        try:
            with keeping_modules(trainer.model):
                with torch.no_grad():
                    dtypes = self._widen(trainer.model, trainer.is_deepspeed_enabled)
                    for layer in self.layers.values():
                        layer.merge()
                    for name, dtype in dtypes.items():
                        parameter = find_parameter(trainer.model, name)
                        parameter.data = self.stored.round(name, parameter.detach()).to(dtype)
                yield
        finally:
            for layer in self.layers.values():
                layer.merged_adapters.clear()

    def _widen(self, model: PreTrainedModel, sharded: bool) -> dict[str, torch.dtype]:
        """Adapters and the weights below them in float32, exactly; the data types in which the model held these."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = read_master(parameter, sharded).detach().float().clone()
        held = {}
        for name in self.plan.trained:
            parameter = find_parameter(model, name)
            held[name] = parameter.dtype
            parameter.data = self.stored.read_master(name).float().to(parameter.device)
        for layer in self.layers.values():
            layer.float()
        return held

    @torch.no_grad()
    def finish(self, trainer: Trainer, round_: Round) -> None:
        """Save the adapters, merge them in float32, and leave the model as if there had been none."""
        model, sharded, is_first = trainer.model, trainer.is_deepspeed_enabled, trainer.args.process_index == 0
        held = self._widen(model, sharded)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*have invalid shape.*")  # of no rank, which ADALORA may leave a layer
            kept = get_peft_model_state_dict(Holder(self.tuner), adapter_name=ADAPTER, save_embedding_layers=False)
        adapter = {name: values.detach().cpu().clone() for name, values in kept.items()}
        self.tuner.merge_and_unload(progressbar=False)
        for name in self.plan.trained:
            parameter = model.get_parameter(name)
            if sharded:
                if is_first:
                    self.merged[name] = parameter.detach().cpu()
                parameter.data = parameter.data.to(held[name])
        vars(model).pop("peft_config", None)
        if is_first:
            write_peft_folder(adapter, self.config, self.base, round_.adapter)

    def list_merged(self) -> dict[str, torch.Tensor]:
        """The weights with their adapters, in float32."""
        return self.merged


class Holder(torch.nn.Module):
    """What PEFT's own model is above its adapters, so that they have their names in a file."""

    def __init__(self, tuner: BaseTuner):
        super().__init__()
        self.base_model = tuner
        self.peft_config = tuner.peft_config

    def __getattr__(self, name: str) -> Any:
        """What the model below has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)


def choose_targets(kind: str, given: dict[str, Any], plan: FreezePlan, units: Sequence[Unit]) -> list[str]:
    """The layers that take adapters: of those that the plan trains, the ones that PEFT's own keys name.

    Raises:
        ModelError: there are none, or one of the names is that of no layer which takes adapters.
    """
    trained = set(plan.trained)
    adaptable = [
        unit
        for unit in units
        if unit.role in ROLES.get(kind, MATRICES) and (kind in ROLES or len(unit.parameters[0].shape) == 2)
    ]
    fitting = {unit.name for unit in adaptable if unit.parameters[0].name in trained}
    last_parts = list(dict.fromkeys(get_last(unit.name) for unit in adaptable if unit.name in fitting))
    asked = given.get("target_modules")
    config = build_config(kind, given, list(dict.fromkeys(get_last(unit.name) for unit in adaptable)))
    if asked not in (None, "all-linear"):
        config.target_modules = asked if isinstance(asked, str) else set(asked)
    for key in CHOOSING[1:]:
        if given.get(key) is not None:
            setattr(config, key, given[key])
    named = [unit.name for unit in adaptable if check_target_module_exists(config, unit.name)]
    targets = [name for name in named if name in fitting]
    if not targets:
        raise ModelError(
            f"no adapter would train: method.peft.target_modules is {asked or 'null'}, and of what {kind} adapts the freeze "
            f"plan trains {', '.join(last_parts) or 'nothing'}",
            "name some of these" if last_parts else "raise freeze.trainable_fraction, or let freeze.embeddings train",
        )
    for key in ("target_modules", "exclude_modules"):
        for name in given.get(key) or () if not isinstance(given.get(key), str) else ():
            refuse_unknown(name, f"method.peft.{key}", [unit.name for unit in adaptable])
    for name in list_names(given.get("feedforward_modules") or ()):
        refuse_unknown(name, "method.peft.feedforward_modules", [unit.name for unit in adaptable])
    for key in (key for key in given if key.endswith("_pattern") and key not in CHOOSING):
        for name in given[key] or ():
            refuse_unknown(f"{name}", f"method.peft.{key}", named, partial(is_matched, kind, f"{name}"))
    return targets


def narrow_to(
    kind: str, given: dict[str, Any], targets: Sequence[str], plan: FreezePlan, units: Sequence[Unit]
) -> FreezePlan:  # fmt: skip
    """A plan of what merged adapters change."""
    names = {f"{name}.weight" for name in targets}
    if kind in BIASED:
        inner = find_inner(given, targets) if kind == "IA3" else []
        scaled = [name for name in targets if name not in inner]
        names |= {f"{name}.bias" for name in scaled} & {value.name for unit in units for value in unit.parameters}
    return restrict_plan(plan, units, names)


def count_adapters(kind: str, given: dict[str, Any], targets: Sequence[str], path: str) -> Adapters:
    """What a budget has to know of them; of low-rank ones that are alike, also what they compute.

    Raises:
        InputError: PEFT refuses them there.
    """
    shapes, config = count_shapes(kind, given, targets, path), build_config(kind, given, targets)
    if kind not in RANKS or config.rank_pattern:
        return Adapters(0, name=kind, shapes=shapes)
    return Adapters(getattr(config, RANKS[kind]), has_dropout=config.lora_dropout > 0, name=kind, shapes=shapes)


def count_shapes(kind: str, given: dict[str, Any], targets: Sequence[str], path: str) -> tuple[tuple[int, ...], ...]:
    """The shapes of what trains of adapters, on a model without weights.

    Raises:
        InputError: PEFT refuses them there.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    modules = [model.get_submodule(name) for name in targets]
    config = build_config(kind, given, targets, isinstance(modules[0], Conv1D))
    if kind == "SHIRA":  # it draws its entries of the weights
        return tuple((config.r * sum(module.weight.shape),) for module in modules)
    with torch.random.fork_rng():
        make_tuner(config, model)
    trained = [parameter for name, parameter in model.named_parameters() if parameter.requires_grad and "ranknum" not in name]
    return tuple(tuple(parameter.shape) for parameter in trained)  # ADALORA's number of ranks trains on no real device


def make_tuner(config: PeftConfig, model: PreTrainedModel) -> BaseTuner:
    """Adapters laid over a model, which is changed.

    Raises:
        InputError: PEFT refuses them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of norms as layers, and of kernels that would be quicker
            return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, ADAPTER)
    except (ValueError, TypeError, NotImplementedError, AssertionError) as error:
        kind = PeftType(config.peft_type).value
        raise InputError(f"method.peft: PEFT lays no adapter of type {kind} over this model: {get_line(error)}") from None


def sum_bits(values: torch.Tensor) -> int:
    """The sum of a tensor's bits, taken as whole numbers: as good as always another one where a value is."""
    return int(values.detach().view(BITS[values.element_size()]).sum(dtype=torch.int64))


def get_last(name: str) -> str:
    """The last part of a layer's name."""
    return name.rpartition(".")[2]

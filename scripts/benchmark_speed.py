"""Step time of full and half fine-tuning beside what the FLOP count predicts: forward, backward and optimizer apart.

    python scripts/benchmark_speed.py --model FOLDER                        a real model's shape, on this machine
    python scripts/benchmark_speed.py --shape 1b --tokens 2048              where a GPU is at hand
    python scripts/benchmark_speed.py --model FOLDER --grains               the grains of `freeze.grain`
    python scripts/benchmark_speed.py --model FOLDER --levers               what `method` changes in the loss

Full fine-tuning, the paper's rule, the rule with a frozen prefix of a quarter, halves of whole layers, and LoRA on all linear
layers; each without and with activation checkpointing, and the first three once more in equal memory, with what `train.fit:
auto` would choose in it: by default, the least in which the paper's rule computes nothing again and full fine-tuning fits at
all (`--memory-bytes` sets another limit). With `--grains`: full fine-tuning, the paper's rule, columns, directions, directions
in blocks, and these within the paper's half, without checkpointing; which directions and columns they are makes no difference
to their time, so they are drawn. With `--levers`: full fine-tuning, plain and with each of the methods that change the loss;
all tokens are trained, and the last row of the batch counts as a text of the model's own. The settings take turns on one model,
so that a machine whose speed drifts is fair to all; the table gives medians over the turns, and for ratios the median of those
within a turn with their range. Prints Markdown.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig, LoraModel
from transformers import LlamaConfig, PreTrainedModel

from hftcli.freezing.activations import Flops, Network, Workload
from hftcli.freezing.budget import Budget
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan
from hftcli.launching.planning import find_arithmetic, list_kernels, list_works
from hftcli.methods import make_methods
from hftcli.methods.expectations import Expectations, read_distributions, take_likeliest
from hftcli.methods.method import Method
from hftcli.models.checkpoint import freeze_model
from hftcli.models.description import describe_model
from hftcli.models.device import is_faster_in_bfloat16, keep_freed_memory
from hftcli.models.division import divide_model, draw_choices
from hftcli.recipe.methods import MethodSection
from hftcli.recipe.sections import DataSection, LaunchSection, ModelSection, TrainSection
from hftcli.runs.spec import RoundSpec
from hftcli.training.loss import SFT_OUTPUTS, find_columns, keep_logits, set_loss_kernel, shape_loss
from hftcli.training.probe import compute_loss, make_inputs, make_random_model

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads
    "135m": (576, 1536, 30, 9, 3),
    "1b": (2048, 8192, 16, 32, 8),
    "7b": (4096, 11008, 32, 32, 32),
}
VOCABULARY = 32000
GRAINS = {
    "columns": {"grain": "columns"},
    "columns, quiet": {"grain": "columns", "part": "quiet"},
    "directions": {"grain": "directions"},
    "directions, blocks of 32": {"grain": "directions", "blocks": 32},
    "quiet: these within half": "quiet",
}
LEVERS = {
    **{f"token_weights: {kind}": {"token_weights": {"kind": kind}} for kind in ("dft", "talr", "eaft", "stm", "psft")},
    "anchor": {"anchor": {"strength": 1}},
    "anchor, top_k 32": {"anchor": {"strength": 1, "top_k": 32}},
    "self_replay: kl": {"self_replay": {"loss": "kl"}},
}
FULL, HALF, PREFIX, LORA = "full", "half", "half, prefix 0.25", "LoRA, r 8"
LORA_RANK = 8


@dataclass(frozen=True, eq=False)
class Setting:
    """One row of the table."""

    rule: str
    checkpointing: str
    budget: Budget
    method: MethodSection = field(default_factory=MethodSection)
    held_bytes: list[int] = field(default_factory=list)  # beside the model by its methods, once it was timed
    peak_bytes: list[int] = field(default_factory=list)  # of the GPU's allocator, in each turn

    @property
    def num_trained(self) -> int:
        if self.rule != LORA:
            return self.budget.plan.num_trainable
        units = [unit for unit in self.budget.network.units if unit.layer is not None]
        shapes = [parameter.shape for unit in units for parameter in unit.parameters]
        return sum(LORA_RANK * sum(shape) for shape in shapes if len(shape) == 2)

    @property
    def flops(self) -> Flops:
        """For each token. LoRA passes gradients on as full fine-tuning does, and computes those of its own weights alone."""
        _, flops = self.budget.half_step
        if self.rule != LORA:
            return flops
        return replace(
            flops,
            forward=flops.forward + 2 * self.num_trained,
            activation_gradient=flops.activation_gradient + 2 * self.num_trained,
            weight_gradient=2 * self.num_trained,
        )


@dataclass(frozen=True)
class Seconds:
    """Mean seconds of a step's parts in one turn."""

    forward: float
    backward: float
    optimizer: float

    @property
    def step(self) -> float:
        return self.forward + self.backward + self.optimizer


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        path = write_config(arguments.shape, folder) if arguments.shape else arguments.model
        settings = make_settings(path, arguments)
        model = make_random_model(path, None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    model.to(device).train()
    set_loss_kernel(model, "chunked")
    forwards = {"chunked": model.forward}
    keep_logits(model, SFT_OUTPUTS)
    forwards["plain"] = model.forward
    turns = []
    for number in range(arguments.repeats):
        times = {}
        for setting in settings:
            model.forward = forwards[setting.budget.work.loss]
            times[setting] = time_setting(model, setting, arguments.steps, arguments.cpu_time)
        turns.append(times)
        print(f"turn {number + 1} of {arguments.repeats} done", file=sys.stderr, flush=True)
    if arguments.levers:
        print_levers(turns, settings, arguments)
    else:
        print_table(turns, settings, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", help="a folder with a config.json; its weights are not read")
    start.add_argument("--shape", choices=SHAPES, help="a Llama of this shape")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a setting in a turn, after one that is not")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--memory-bytes", type=int, help="the limit of the last rows")
    parser.add_argument(
        "--grains", nargs="*", choices=GRAINS, metavar="NAME",
        help="compare the grains in place of the other rules, or those that are named alone",
    )  # fmt: skip
    parser.add_argument("--levers", action="store_true", help="compare what changes the loss in place of the other rules")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the CPU's seconds: on one thread of a machine that others use as well"
    )
    parser.add_argument("--float32", action="store_true", help="also where the device is faster in bfloat16")
    return parser.parse_args()


def write_config(shape: str, folder: str) -> str:
    hidden, intermediate, layers, heads, kv_heads = SHAPES[shape]
    LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=VOCABULARY, max_position_embeddings=4096,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_settings(path: str, arguments: argparse.Namespace) -> list[Setting]:
    described = describe_model(path)
    units = assign_roles(described.model_type, described.parameters)
    is_tied = all(unit.role != "head" for unit in units)
    rules = {
        FULL: FreezeRule(trainable_fraction=1),
        HALF: FreezeRule(),
        # A tied head is the embeddings, which the prefix freezes.
        PREFIX: FreezeRule(frozen_prefix=0.25, head="freeze" if is_tied else "train"),
        "half, whole layers": FreezeRule(group="layer"),
        # Its activations pass gradients on as if all layers trained.
        LORA: FreezeRule(trainable_fraction=1, embeddings="freeze", head="freeze"),
    }
    mixed = is_faster_in_bfloat16() and not arguments.float32
    kernels = list_kernels(TrainSection(), torch.cuda.is_available())
    work = Workload(arguments.micro_batch, arguments.tokens, loss=kernels[0], arithmetic=find_arithmetic(mixed, 1))
    network = Network(described.model_type, units, described.num_heads)

    def make_budget(rule: str, every: int | None = None) -> Budget:
        plan = make_plan(units, rules[rule], 0, described.num_heads)
        return Budget(plan, "mixed" if mixed else "float32", 1, 0, network=network, work=replace(work, checkpoint_every=every))

    if arguments.levers:
        levers = {"plain": {}} | LEVERS
        plain = make_budget(FULL)
        plain = replace(plain, work=replace(plain.work, loss="plain"))  # which most of them need
        return [Setting(name, "none", plain, MethodSection.model_validate(method)) for name, method in levers.items()]
    if arguments.grains is not None:
        rules = {FULL: rules[FULL], HALF: rules[HALF]}
        rules |= {
            name: FreezeRule.model_validate(rule) for name, rule in GRAINS.items() if name in (arguments.grains or GRAINS)
        }
        return [Setting(rule, "none", make_budget(rule)) for rule in rules]
    settings = [Setting(rule, name, make_budget(rule, every)) for name, every in (("none", None), ("all", 1)) for rule in rules]
    ways = {rule: [replace(make_budget(rule), work=way) for way in list_works(make_budget(rule), kernels)] for rule in rules}
    least = max(ways[HALF][0].half.high_bytes, min(way.half.high_bytes for way in ways[FULL]))
    memory_bytes = arguments.memory_bytes or least
    for rule in (FULL, HALF, PREFIX):
        way = next((way for way in ways[rule] if way.half.high_bytes <= memory_bytes), None)
        if way is None:
            print(f"{rule} does not fit in {memory_bytes / 2**20:,.0f} MiB at all", file=sys.stderr)
        else:
            settings.append(Setting(rule, f"in {memory_bytes / 2**20:,.0f} MiB: {name_checkpointing(way.work)}", way))
    return settings


def name_checkpointing(work: Workload) -> str:
    checkpointing = {None: "none", 1: "all"}.get(work.checkpoint_every, f"1 in {work.checkpoint_every}")
    return f"{checkpointing}, {work.loss} loss"


def time_setting(model: PreTrainedModel, setting: Setting, num_steps: int, is_cpu_time: bool) -> Seconds:
    """Freeze the model anew and take some steps with a fresh optimizer."""
    work = setting.budget.work
    device = next(model.parameters()).device
    freeze_model(model, setting.budget.plan)
    tuner = None
    if setting.rule == LORA:
        tuner = LoraModel(model, LoraConfig(r=LORA_RANK, target_modules="all-linear"), "default")
    for parameter in model.parameters():
        # One process under autocast holds in bfloat16 what is frozen.
        is_half = work.arithmetic == "autocast" and not parameter.requires_grad
        parameter.data = parameter.data.to(torch.bfloat16 if is_half else torch.float32)
        parameter.grad = None
    parts = setting.budget.plan.parts
    plain = {name.removesuffix(".weight"): model.get_submodule(name.removesuffix(".weight")) for name in parts}
    dtype = torch.bfloat16 if work.arithmetic == "autocast" else torch.float32
    layers = divide_model(model, parts, draw_choices(parts, dtype), True)
    for layer in layers.values():
        layer.weight.data = layer.weight.data.to(dtype)
    model.activation_checkpointing_disable()
    if work.checkpoint_every is not None:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=work.checkpoint_every)
        model.disable_input_require_grads()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-6, fused=True)
    inputs = make_inputs(model.config.vocab_size, work, device)
    methods = prepare_methods(model, setting, inputs)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    parts = []
    for _ in range(num_steps + 1):
        times = [read_clock(device, is_cpu_time)]
        with torch.autocast(device.type, torch.bfloat16, enabled=work.arithmetic == "autocast"):
            for method in methods:
                if method.asks_places:
                    method.see_places(find_places(inputs))
                if method.reads_ahead:
                    method.read_ahead(model, inputs, find_columns(inputs["labels"]))
            loss = compute_loss(model, inputs)
        times.append(read_clock(device, is_cpu_time))
        loss.backward()
        times.append(read_clock(device, is_cpu_time))
        optimizer.step()
        optimizer.zero_grad()
        for layer in layers.values():
            layer.refresh()
        for method in methods:
            method.end_step()
        times.append(read_clock(device, is_cpu_time))
        parts.append([later - earlier for earlier, later in pairwise(times)])
    if device.type == "cuda":
        setting.peak_bytes.append(torch.cuda.max_memory_allocated())
    if tuner is not None:
        tuner.unload()
    for place, layer in plain.items():
        model.set_submodule(place, layer)
    return Seconds(*(statistics.mean(values) for values in zip(*parts[1:], strict=True)))


def prepare_methods(model: PreTrainedModel, setting: Setting, inputs: dict[str, torch.Tensor]) -> list[Method]:
    """What changes the loss of the setting, ready to train, with its hand on the model's forward pass."""
    spec = RoundSpec(
        objective="sft", index=0, model=ModelSection(path="."), data=DataSection(), train=TrainSection(), method=setting.method,
        freeze=FreezeRule(trainable_fraction=1), launch=LaunchSection(num_processes=1),
    )  # fmt: skip
    methods = make_methods(spec) if setting.method.names else []
    for method in methods:
        method.prepare_model(model, setting.budget.plan, Path(), False, False)
        method.start(SimpleNamespace(model=model))
        method.num_given = len(inputs["input_ids"]) - 1
        if setting.method.anchor is not None and setting.method.anchor.top_k is not None:
            with torch.no_grad():
                log_probs_NV = read_distributions(model, inputs | {"places": find_places(inputs)}, False)
            counts = (inputs["labels"][:, 1:] >= 0).sum(1).cpu()
            starts_R1 = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            likeliest = take_likeliest(log_probs_NV, setting.method.anchor.top_k)
            method.expectations = Expectations(starts_R1, *(values.cpu() for values in likeliest))
    if methods:
        keep_logits(model, SFT_OUTPUTS, [method.penalize_tokens for method in methods if method.reads_distributions])
        shape_loss(model, [method.weigh_tokens for method in methods])
    setting.held_bytes[:] = [count_bytes(method) for method in methods]
    return methods


def count_bytes(method: Method) -> int:
    """What a method holds beside the model while it trains."""
    copy, expected = getattr(method, "copy", None), getattr(method, "expectations", None)
    return (copy.num_bytes if copy else 0) + (sum(values.nbytes for values in expected.tensors.values()) if expected else 0)


def find_places(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The rows of a batch of their own, as the trainer says them."""
    labels_BT = inputs["labels"]
    return torch.arange(len(labels_BT), device=labels_BT.device)[:, None].expand_as(labels_BT).masked_fill(labels_BT < 0, -1)


def read_clock(device: torch.device, is_cpu_time: bool) -> float:
    if is_cpu_time:
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def print_levers(turns: list[dict[Setting, Seconds]], settings: list[Setting], arguments: argparse.Namespace) -> None:
    threads = "one GPU" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{arguments.shape or Path(arguments.model).name}, {arguments.micro_batch} x {arguments.tokens} tokens, {threads}, "
        f"{settings[0].budget.work.arithmetic}{', CPU seconds' if arguments.cpu_time else ''}; medians of {len(turns)} "
        f"interleaved turns of {arguments.steps} steps; ratios: median (range) within a turn, over plain training\n"
    )
    has_peak = bool(settings[0].peak_bytes)
    columns = ("", "forward s", "backward s", "step s", "ratio", "holds MiB", *["peak MiB"] * has_peak)
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for setting in settings:
        parts = ("forward", "backward", "step")
        medians = [statistics.median(getattr(turn[setting], part) for turn in turns) for part in parts]
        ratios = sorted(turn[setting].step / turn[settings[0]].step for turn in turns)
        print(
            f"| {setting.rule} | {' | '.join(f'{value:.3f}' for value in medians)} | {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f}) | {sum(setting.held_bytes) / 2**20:.1f} |"
            + (f" {max(setting.peak_bytes) / 2**20:,.0f} |" if has_peak else "")
        )


def print_table(turns: list[dict[Setting, Seconds]], settings: list[Setting], arguments: argparse.Namespace) -> None:
    num_tokens = arguments.micro_batch * arguments.tokens
    threads = "one GPU" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    arithmetic = settings[0].budget.work.arithmetic
    print(
        f"{arguments.shape or Path(arguments.model).name}, {arguments.micro_batch} x {arguments.tokens} tokens, {threads}, "
        f"{arithmetic}{', CPU seconds' if arguments.cpu_time else ''}; "
        f"medians of {len(turns)} interleaved turns of {arguments.steps} steps; ratios: median (range) within a turn, over "
        "full fine-tuning with the same checkpointing or in the same memory; TFLOP/s without what is computed again\n"
    )
    columns = ("rule", "checkpointing", "trains", "forward s", "backward s", "optimizer s", "step s", "ratio", "FLOP count")
    has_peak = bool(settings[0].peak_bytes)
    columns = (*columns, "TFLOP/s", "needs MiB", *["peak MiB"] * has_peak)
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for setting in settings:
        name, _, _ = setting.checkpointing.partition(":")
        base = next((other for other in settings if other.rule == FULL and other.checkpointing.partition(":")[0] == name), None)
        seconds = [statistics.median(getattr(turn[setting], part) for turn in turns) for part in Seconds.__annotations__]
        step = statistics.median(turn[setting].step for turn in turns)
        flops = setting.flops
        cells = ["", ""]
        if base is not None:
            ratios = sorted(turn[setting].step / turn[base].step for turn in turns)
            cells[0] = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
            cells[1] = f"{flops.total / base.flops.total:.3f}"
        print(
            f"| {setting.rule} | {setting.checkpointing} | {setting.num_trained / setting.budget.plan.num_parameters:.1%} | "
            + " | ".join(f"{value:.4f}" for value in (*seconds, step))
            + f" | {' | '.join(cells)} | {(flops.total - flops.recompute) * num_tokens / step / 1e12:.3f} | "
            + ("" if setting.rule == LORA else f"{setting.budget.half.high_bytes / 2**20:,.0f}")
            + " |"
            + (f" {max(setting.peak_bytes) / 2**20:,.0f} |" if has_peak else "")
        )


if __name__ == "__main__":
    main()

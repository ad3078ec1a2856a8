"""hft in a script of one's own: the guide's snippets against TRL's own trainers, and what they prove."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from training.quiet_rounds import make_start
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hftcli import HalfCallback, freeze_half, quiet_lora
from hftcli.errors import InputError, ModelError, VerificationError
from hftcli.library import given

# TRL's own settings go by a name that transformers calls old.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")
ROWS = Dataset.from_list([{"text": f"Mira lives in town {number}."} for number in range(16)])
PAIRS = Dataset.from_list([{"prompt": f"Town {number} is", "chosen": " big.", "rejected": " small."} for number in range(16)])
SHORT = {
    "max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no",
    "use_cpu": True, "bf16": False, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("library") / "start")


def load(start: Path):
    return AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32), AutoTokenizer.from_pretrained(start)


def make_trainer(kind: str, model, tokenizer, folder: Path, **options):
    if kind == "sft":
        return SFTTrainer(model, SFTConfig(str(folder), **SHORT), train_dataset=ROWS, processing_class=tokenizer, **options)
    return DPOTrainer(model, args=DPOConfig(str(folder), **SHORT), train_dataset=PAIRS, processing_class=tokenizer, **options)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_half_is_frozen_and_proved(start: Path, tmp_path: Path, kind: str):
    model, tokenizer = load(start)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    plan = freeze_half(model, seed=1, round=0)
    make_trainer(kind, model, tokenizer, tmp_path).train()
    found = plan.verify(model)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == set(plan.plan.trained)
    assert (found.num_frozen, found.num_trained) == (len(before) - len(moved), len(moved))
    assert freeze_half(load(start)[0], seed=1, round=1).plan.trained != plan.plan.trained


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_callback_does_both(start: Path, tmp_path: Path, kind: str):
    model, tokenizer = load(start)
    callback = HalfCallback(seed=1)
    make_trainer(kind, model, tokenizer, tmp_path, callbacks=[callback]).train()
    assert callback.verification.passed
    assert callback.half.plan.trained == freeze_half(load(start)[0], seed=1).plan.trained


def test_what_moved_is_named(start: Path):
    model, _ = load(start)
    plan = freeze_half(model, seed=1)
    move(model)
    plan.verify(model)
    with torch.no_grad():
        model.get_parameter(plan.plan.frozen[0]).flatten()[3] += 1e-7
    with pytest.raises(VerificationError, match=plan.plan.frozen[0]):
        plan.verify(model)


@pytest.mark.parametrize(
    "rule", [{"grain": "directions", "blocks": 16}, {"grain": ("matrices", "directions")}, {"grain": "columns"}]
)
def test_parts_train_and_leave_a_plain_model(start: Path, tmp_path: Path, rule: dict):
    model, tokenizer = load(start)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    plan = freeze_half(model, seed=1, tokenizer=tokenizer, keep=["Mira lives in town 3."], **rule)
    make_trainer("sft", model, tokenizer, tmp_path).train()
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    with torch.no_grad():
        trained = model.eval()(ids).logits  # what the trainer's optimizer, a fused one, has left counts
        plan.verify(model)
        torch.testing.assert_close(model(ids).logits, trained, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == load(start)[0].state_dict().keys()
    for name, part in plan.plan.parts.items():
        change = model.get_parameter(name).detach().double() - before[name].double()
        assert 0 < torch.linalg.matrix_rank(change, rtol=1e-4) <= part.num_columns


PARTS = pytest.mark.parametrize("rule", [{"grain": "directions"}, {"grain": "columns"}, {"grain": "entries"}])


@PARTS
def test_a_part_that_trains_on_after_it_was_proved_is_named(start: Path, rule: dict):
    model, _ = load(start)
    plan = freeze_half(model, seed=1, part="random", **rule)
    move(model)
    plan.verify(model)
    name = next(iter(plan.plan.parts))
    before = model.get_parameter(name).clone()
    move(model)
    assert torch.equal(model.get_parameter(name), before)
    plan.verify(model)
    with torch.no_grad():
        model.get_parameter(name)[0, 0] += 1e-3
    with pytest.raises(VerificationError, match=f"1 matrices of which a part trained moved after this was proved: {name}"):
        plan.verify(model)


def move(model) -> None:
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1e-3 if value.requires_grad else 0)


@PARTS
def test_a_trainers_checkpoints_are_plain_and_can_be_gone_on_from(start: Path, tmp_path: Path, rule: dict):
    """The state after two steps, in its file; and four steps in one go beside two and two."""
    (whole, tokenizer), (first, _), (second, _) = (load(start) for _ in range(3))
    how, ends = {**SHORT, "save_strategy": "steps", "save_steps": 2}, []
    for model, folder, num_steps, goes_on in ((whole, "whole", 4, None), (first, "two", 2, None), (second, "two", 4, True)):
        plan = freeze_half(model, seed=1, part="random", **rule)
        settings = SFTConfig(str(tmp_path / folder), **how | {"max_steps": num_steps, "lr_scheduler_type": "constant"})
        trainer = SFTTrainer(model, settings, train_dataset=ROWS, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=goes_on)
        plan.verify(model)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / folder / f"checkpoint-{num_steps}", dtype=torch.float32)
        assert saved.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.state_dict().items())
        ends.append(model.state_dict())
    tolerance = 1e-5 if rule["grain"] == "directions" else 0
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[2][name], value, rtol=0, atol=tolerance)
        assert name not in plan.plan.parts or not torch.equal(ends[1][name], value)


@PARTS
def test_a_checkpoint_of_another_half_is_not_gone_on_from(start: Path, rule: dict):
    (other, _), (model, _) = load(start), load(start)
    freeze_half(other, seed=2, part="random", **rule)
    move(other)
    freeze_half(model, seed=1, part="random", **rule)
    with pytest.raises(ModelError, match="proj.weight has moved in what is frozen here"):
        model.load_state_dict(other.state_dict(), strict=False)


def test_a_long_text_is_kept_to_its_end(start: Path, monkeypatch: pytest.MonkeyPatch):
    """As three texts, of which each is read from its own beginning."""
    model, tokenizer = load(start)
    text = " ".join(f"Mira lives in town {number}." for number in range(12))
    ids = tokenizer(text).input_ids
    monkeypatch.setattr(given, "KEPT_TOKENS", len(ids) // 3 + 1)
    pieces = [ids[: len(ids) // 3 + 1], ids[len(ids) // 3 + 1 : 2 * (len(ids) // 3 + 1)], ids[2 * (len(ids) // 3 + 1) :]]
    inputs = {"up": ("model.layers.0.mlp.up_proj", 1, model.config.hidden_size)}
    found = given.read_earlier(model, inputs, tokenizer, [text])["up"]
    own = given.read_earlier(model, inputs, tokenizer, [])["up"]
    read = []
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda module, given: read.append(given[0][0].double()))
    with torch.no_grad():
        for piece in pieces:
            model.eval()(torch.tensor([piece]))
    tokens = torch.cat(read)
    assert len(tokens) == len(ids)
    torch.testing.assert_close(found[0], ((own[0] + (tokens.T @ tokens / len(ids)).float()) / 2), rtol=1e-4, atol=1e-6)


def test_quiet_lora_is_a_plain_adapter(start: Path, tmp_path: Path):
    model, tokenizer = load(start)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    plan = quiet_lora(model, tokenizer, keep=["Mira lives in town 3."])
    make_trainer("sft", model, tokenizer, tmp_path / "run").train()
    found = plan.verify(model)
    assert len(found) == 4
    assert max(found.values()) < 1e-6
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    model.eval()
    with torch.no_grad():
        said = model(ids).logits
        assert (said - load(start)[0](ids).logits).abs().max() > 1e-4
        loaded = PeftModel.from_pretrained(load(start)[0], tmp_path / "adapter").eval()(ids).logits
        merged = model.merge_and_unload()(ids).logits
    torch.testing.assert_close(loaded, said, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged, said, rtol=1e-4, atol=1e-5)


def adapt(model, **options):
    return get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"]} | options))


def test_quiet_lora_takes_no_adapter_that_is_not_at_zero(start: Path, tmp_path: Path):
    model, tokenizer = load(start)
    trained = adapt(model)
    with torch.no_grad():
        trained.get_base_model().model.layers[1].self_attn.q_proj.lora_B["default"].weight[2, 1] = 1e-3
    trained.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(start)[0], tmp_path / "adapter", is_trainable=True)
    others = [adapt(load(start)[0], init_lora_weights=how) for how in ("pissa", "olora", False)]
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    for adapted in (again, *others):
        adapted.eval()
        said = adapted(ids).logits
        with pytest.raises(InputError, match=r"the adapter is not at its start: B of model.layers.[01].self_attn.q_proj is"):
            quiet_lora(adapted, tokenizer)
        assert torch.equal(adapted(ids).logits, said)
    quiet_lora(adapt(load(start)[0], init_lora_weights="gaussian"), tokenizer)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lora_bias": True}, "q_proj.lora_B.default.bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.lora_embedding_A.default"),
        ({"bias": "all"}, "q_proj.base_layer.bias"),
        ({"bias": "lora_only"}, "q_proj.base_layer.bias"),
    ],
)
def test_quiet_lora_lets_nothing_else_train(start: Path, options: dict, named: str):
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(start, attention_bias=True, tie_word_embeddings=False))
    with pytest.raises(InputError, match=f"{named} would train too"):
        quiet_lora(adapt(model, **options), AutoTokenizer.from_pretrained(start))


def test_quiet_lora_names_whatever_else_moved(start: Path):
    model, tokenizer = load(start)
    model = adapt(model)
    plan = quiet_lora(model, tokenizer)
    plan.verify(model)
    with torch.no_grad():
        model.get_base_model().model.norm.weight[3] += 1e-3
    with pytest.raises(VerificationError, match="model.norm.weight"):
        plan.verify(model)


@pytest.mark.parametrize("grain", ["directions", "columns", "entries"])
def test_a_part_that_did_not_move_is_named(start: Path, grain: str):
    model, _ = load(start)
    plan = freeze_half(model, seed=1, grain=grain, part="random")
    still = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.add_(1e-3 if value.requires_grad and still.removesuffix("weight") not in name else 0)
    with pytest.raises(VerificationError, match=rf"0 frozen parameters moved, 1 trained ones did not.*{still}"):
        plan.verify(model)


@pytest.mark.parametrize("grain", ["directions", "columns"])
def test_a_random_part_is_drawn_whoever_gives_a_tokenizer(start: Path, grain: str):
    model, tokenizer = load(start)
    without = freeze_half(load(start)[0], seed=1, grain=grain, part="random").bases
    given = freeze_half(model, seed=1, grain=grain, part="random", tokenizer=tokenizer).bases
    assert given.keys() == without.keys()
    assert all(torch.equal(given[name], without[name]) for name in given)


def make_ready(model) -> None:
    """As TRL's trainers leave a model before they call the callbacks."""
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.model.layers[0].eval()  # what a user has put to rest stays so


def test_a_model_that_is_ready_to_train_has_the_same_quiet_half(start: Path):
    model, tokenizer = load(start)
    expected = freeze_half(load(start)[0].eval(), seed=1, grain="columns", tokenizer=tokenizer).bases
    make_ready(model)
    found = freeze_half(model, seed=1, grain="columns", tokenizer=tokenizer).bases
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert (model.training, model.model.layers[0].training, model.model.layers[1].training) == (True, False, True)


def test_quiet_lora_reads_the_same_of_a_model_that_is_ready_to_train(start: Path):
    config, found = LoraConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM"), []
    for is_ready in (False, True):
        model, tokenizer = load(start)
        model = get_peft_model(model.eval(), config)
        if is_ready:
            make_ready(model.get_base_model())
        readers = quiet_lora(model, tokenizer).readers
        found.append({name: reader.basis for name, reader in readers.items()})
    assert all(torch.allclose(found[1][name], basis, atol=1e-5) for name, basis in found[0].items())


def test_roles_are_taken_in_place_of_the_familys(start: Path):
    """The mlp's matrices among those of attention."""
    roles = {
        "embedding": "model.embed_tokens", "head": "lm_head", "final_norm": "model.norm",
        "norm": "model.layers.*.(input|post_attention)_layernorm",
        "attention": ["model.layers.*.self_attn.(q|k|v|o)_proj", "model.layers.*.mlp.(gate|up|down)_proj"],
    }  # fmt: skip
    found = freeze_half(load(start)[0], seed=1, roles=roles).plan.roles
    assert (found["attention"].num_units, "mlp" in found) == (14, False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"average": 0.9}, "average acts while a round trains"),
        ({"interpolate": 0.5}, "interpolate acts while"),
        ({"pull": {"strength": 1}}, "pull acts while"),
        ({"redraw": {"every": 5}}, "redraw acts while"),
        ({"blocks": 16}, "blocks would have no effect beside grain matrices"),
        ({"part": "random"}, "part would have no effect beside grain matrices"),
        ({"keep": ["a text"]}, "keep would have no effect beside grain matrices"),
        ({"grain": "entries", "keep": ["a text"]}, "keep would have no effect beside grain entries and part random"),
        ({"grain": "columns", "part": "random", "keep": ["a text"]}, "beside grain columns and part random"),
        ({"trainable_fraction": 0.3}, "give share|has share"),
        ({"embedings": "freeze"}, "embedings: Extra inputs"),
        *(
            ({"grain": grain, "balance": "weights"}, f"balance weights would have no effect beside grain {grain}, with")
            for grain in ("directions", "columns", "entries")
        ),
        ({"part": "ssu"}, "grain matrices has quiet, random"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(start: Path, given: dict, said: str):
    with pytest.raises(InputError, match=said):
        freeze_half(load(start)[0], **given)


def test_what_cannot_be_is_refused(start: Path):
    model, tokenizer = load(start)
    with pytest.raises(InputError, match="give the tokenizer|goes by what the model writes"):
        freeze_half(model, grain="directions")
    with pytest.raises(InputError, match="keep takes texts, and got one string"):
        freeze_half(model, grain="directions", tokenizer=tokenizer, keep="a text")
    dora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(InputError, match="DoRA scales whole rows"):
        quiet_lora(dora, tokenizer)


def test_the_package_itself_opens_no_torch():
    code = "import sys, hftcli; assert 'torch' not in sys.modules; print(hftcli.__version__)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_guide_does_what_it_says(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its snippets, one after another, on a model that is here."""
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parent.parent / "recipes" / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", guide.partition("## In a script of your own")[2].partition("\n## ")[0], re.S)
    assert len(snippets) == 3
    given = {"rows": ROWS, "pairs": PAIRS, "texts": ["Mira lives in town 3."], "SHORT": SHORT}
    for snippet in snippets:
        here = snippet.replace("HuggingFaceTB/SmolLM2-135M", str(start)).replace('Config("out")', 'Config("out", **SHORT)')
        assert here != snippet
        exec(here, given)
    assert max(given["plan"].verify(given["model"]).values()) < 1e-6
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()

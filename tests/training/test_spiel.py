"""SpIEL: its steps by hand, what is dropped is the start again, what is proved, resumed, planned and refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training.quiet_rounds import LEARNING_RATE, go_back, launch, make_spec, make_start, read_batch, read_model, run

from hftcli.errors import InputError, RecipeError
from hftcli.launching.planning import check_pull
from hftcli.launching.processes import StopRequest
from hftcli.models.proof import verify_round
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.sections import CheckpointSection, LaunchSection
from hftcli.runs.run import Round
from hftcli.training.round import run_round

SPIEL = {"grain": "entries", "part": "spiel", "trainable_fraction": 0.1}
STEPS, DECAY = 50, 0.1
TRAIN = {
    "max_steps": STEPS, "global_batch_size": 16, "per_device_train_batch_size": 16, "weight_decay": DECAY,
    "learning_rate": LEARNING_RATE / 30,
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("spiel") / "start")


@pytest.fixture(scope="module")
def done(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Round:
    """A round with step checkpoints inside the second window and after it, when entries are of several ages."""
    policy = CheckpointSection(save_steps=23, keep=9)
    return run(tmp_path_factory.mktemp("spiel") / "00", make_spec(start, SPIEL, train=TRAIN, checkpoint=policy))


class ByHand:
    """A matrix that trains by the paper, in numpy: changes, moments and ages of entries, dense gradients in the windows."""

    def __init__(self, start: np.ndarray, places: np.ndarray):
        self.start, self.places = start.astype(np.float64), places.copy()
        self.change, self.first, self.second, self.age = (np.zeros(len(places)) for _ in range(4))
        self.window: list[np.ndarray] = []

    def step(self, gradient: np.ndarray, number: int) -> np.ndarray:
        rate, own = TRAIN["learning_rate"], gradient[self.places]
        self.age += 1
        self.first += 0.1 * (own - self.first)
        self.second += 0.001 * (own**2 - self.second)
        self.change *= 1 - rate * DECAY
        corrected = self.first / (1 - 0.9**self.age), self.second / (1 - 0.999**self.age)
        self.change -= rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        if (number - 1) % 20 < 5:
            self.window.append(gradient)
        if number % 20 == 5:
            self.exchange(1.0 if number == 5 else 0.2 * (1 - number / STEPS))
        weight = self.start.copy()
        weight[self.places] += self.change
        return weight

    def exchange(self, share: float) -> None:
        candidates = np.argsort(-np.abs(self.window[0]))[: len(self.places)]
        sums = np.sum(self.window, 0)[candidates]
        number = int(share * len(self.places))
        dropped = np.argsort(np.abs(self.change))[:number]
        staying = set(np.delete(self.places, dropped).tolist())
        grown = [place for place in candidates[np.argsort(-np.abs(sums))] if place not in staying][:number]
        common = set(grown) & set(self.places[dropped].tolist())
        dropped = [i for i in dropped if self.places[i] not in common]
        grown = [place for place in grown if place not in common]
        for i, place in zip(dropped, grown, strict=False):
            seen = np.array([gradient[place] for gradient in self.window])
            self.places[i], self.change[i], self.age[i] = place, 0.0, 5
            self.first[i], self.second[i] = seen.mean() * (1 - 0.9**5), (seen**2).mean() * (1 - 0.999**5)
        self.window = []


def test_steps_by_hand(start: Path, done: Round):
    """Fifty steps with three exchanges; of places on a border, rounding may decide a few."""
    plan, model, batch = done.read_plan(), read_model(start), read_batch(done)
    begun, ended = load_file(done.bases_path), load_file(done.entries_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (start, done.checkpoint))
    matrices = {name: ByHand(before[name].numpy().ravel(), begun[name].numpy()) for name in plan.entries}
    others = {name: value for name, value in model.named_parameters() if name in plan.trained and name not in matrices}
    norms = [value for name, value in others.items() if name.endswith(("bias", "norm.weight"))]
    weights = [value for name, value in others.items() if not name.endswith(("bias", "norm.weight"))]
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": weights, "weight_decay": DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=TRAIN["learning_rate"])
    for number in range(1, STEPS + 1):
        model.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        for name, matrix in matrices.items():
            value = model.get_parameter(name)
            value.data = torch.from_numpy(matrix.step(value.grad.double().numpy().ravel(), number)).float().view_as(value)
    num_unlike = num_all = num_begun = 0
    differences, is_younger = [], []
    for name, matrix in matrices.items():
        found, expected = set(ended[name].tolist()), set(matrix.places.tolist())
        num_unlike, num_all = num_unlike + len(found - expected), num_all + len(found)
        num_begun += len(found & set(begun[name].tolist()))
        is_common = np.isin(matrix.places, list(found))
        own = matrix.places[is_common]
        differences.append(after[name].double().numpy().ravel()[own] - matrix.start[own] - matrix.change[is_common])
        is_younger.append(matrix.age[is_common] < STEPS)
    print(f"{num_unlike} of {num_all} places differ, {num_begun} were there at the beginning")
    younger = np.concatenate(is_younger)
    assert 0.05 * num_all < younger.sum() < 0.15 * num_all  # of the second and the third exchange
    for own in (younger, ~younger):
        assert np.mean(np.abs(np.concatenate(differences)[own]) < 1e-6) > 0.98
    assert num_unlike <= 0.01 * num_all
    assert num_begun < 0.25 * num_all  # by chance a tenth, and what was dropped and grown at once


def test_what_was_dropped_is_the_start_again(start: Path, done: Round):
    before, after = (load_file(folder / "model.safetensors") for folder in (start, done.checkpoint))
    ended = load_file(done.entries_path)
    for name, part in done.read_plan().entries.items():
        own = ended[name].long()
        assert len(own.unique()) == part.num_entries == round(0.1 * before[name].numel())
        is_frozen = torch.ones(before[name].numel(), dtype=torch.bool)
        is_frozen[own] = False
        old, new = (values[name].flatten()[is_frozen].view(torch.int32) for values in (before, after))
        assert torch.equal(old, new)
    result = done.read_result()
    assert result.verification.passed
    assert verify_round(done).passed
    trained = sum(part.num_entries for part in done.read_plan().entries.values())
    rest = sum(before[name].numel() for name in done.read_plan().trained if name not in ended)
    assert (result.gradient_bytes, result.optimizer_bytes) == (4 * (trained + rest), 8 * (trained + rest))


@pytest.mark.parametrize("step", [23, 46])
def test_a_round_that_was_killed_ends_in_the_same_bits(done: Round, tmp_path: Path, step: int):
    round_ = go_back(done, step, tmp_path / "00")
    round_.entries_path.unlink()
    run_round(round_, StopRequest(round_))
    assert round_.read_result().resumed_from == step
    for path in ("checkpoint/model.safetensors", "quiet/bases.safetensors", "quiet/entries.safetensors"):
        assert (round_.folder / path).read_bytes() == (done.folder / path).read_bytes(), path


def test_a_planted_change_and_another_file_are_found(done: Round, tmp_path: Path):
    round_ = go_back(done, STEPS, tmp_path / "00")
    for path in ("result.json", "checkpoint"):
        source = done.folder / path
        if source.is_dir():
            (round_.folder / path).mkdir()
            for file in source.iterdir():
                (round_.folder / path / file.name).write_bytes(file.read_bytes())
        else:
            (round_.folder / path).write_bytes(source.read_bytes())
    path = round_.checkpoint / "model.safetensors"
    weights, (name, own) = load_file(path), next(iter(load_file(round_.entries_path).items()))
    frozen = next(place for place in range(weights[name].numel()) if place not in own.tolist())
    weights[name].view(torch.int32).view(-1)[frozen] ^= 1
    save_file(weights, path, {"format": "pt"})
    assert verify_round(round_).moved_entries[0].startswith(f"{name} (1 of ")
    round_.entries_path.write_bytes(round_.bases_path.read_bytes())
    assert verify_round(round_).damaged_parts == ("quiet/entries.safetensors has other bytes than were written",)
    round_.entries_path.unlink()
    assert verify_round(round_).damage == (*verify_round(round_).damaged, "quiet/entries.safetensors is missing")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.optim=sgd", "spiel begins AdamW's moments anew, and train.optim is sgd"),
        ("launch.offload=optimizer", "freeze.part: spiel does not go with launch.offload"),
        ("eval.num_points=3", "freeze.part: spiel does not go with eval.every_steps and eval.num_points"),
        ("method.l2sp.strength=1", "method.l2sp works on whole matrices"),
    ],
)
def test_what_does_not_go_together_is_refused(override: str, said: str):
    with pytest.raises(RecipeError, match=said):
        load_recipe("tinyworld", ["freeze.grain=entries", "freeze.part=spiel", override])


def test_other_stages_are_refused(start: Path):
    spec = make_spec(start, SPIEL, launch=LaunchSection(num_processes=2, zero_stage=2))
    with pytest.raises(InputError, match="each process steps on flat pieces"):
        check_pull(spec)


@pytest.mark.slow
def test_two_ranks_train_what_one_does(start: Path, tmp_path: Path):
    """Data parallel, without pieces, through one exchange; of places on a border, rounding may decide a few."""
    train = TRAIN | {"max_steps": 8}
    alone = run(tmp_path / "00", make_spec(start, SPIEL, train=train))
    ranks = LaunchSection(num_processes=2, zero_stage=0)
    round_ = launch(tmp_path / "01", make_spec(start, SPIEL, launch=ranks, train=train | {"per_device_train_batch_size": 8}))
    first, second = (load_file(own.checkpoint / "model.safetensors") for own in (alone, round_))
    places = [load_file(own.entries_path) for own in (alone, round_)]
    unlike = [len(set(own.tolist()) - set(places[1][name].tolist())) / len(own) for name, own in places[0].items()]
    assert np.mean(unlike) < 0.02
    for name, value in first.items():
        is_close = (second[name] - value).abs() < 2e-5
        assert is_close.float().mean() > 0.99, name

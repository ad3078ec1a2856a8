"""The recipe: what the user asks for, all sections of it. The docstring under a field is that field's only documentation."""

from pathlib import Path
from typing import Literal

from hftcli.freezing.budget import ReferenceMode
from hftcli.freezing.rule import FreezeRule
from hftcli.recipe.evaluation import EvalSection, StopSection
from hftcli.recipe.methods import MethodSection
from hftcli.recipe.section import FileSection, HomePath, Version
from hftcli.recipe.sections import (
    CheckpointSection,
    ContinualSection,
    DataSection,
    DpoSection,
    LaunchSection,
    ModelSection,
    TrainSection,
)

Objective = Literal["sft", "dpo", "continual"]


class Recipe(FileSection):
    """One YAML file, resolved."""

    version: Version = 2
    """Version of the file's form; a file without one is of this one. In the first, `train.bf16: true` is what null is now."""
    model: ModelSection
    data: DataSection = DataSection()
    freeze: FreezeRule = FreezeRule()
    train: TrainSection = TrainSection()
    launch: LaunchSection = LaunchSection()
    dpo: DpoSection | None = None
    """Preference optimization. A recipe with this section is one for `hft dpo`, which fills it in where it is not given."""
    reference: ReferenceMode | None = None
    """Where DPO's reference comes from: `precompute` (the default) asks the untouched model once about all pairs and keeps its
    answers on disk, so that no second model exists in training; `shared` is the model with the trained half as it was, of which
    a copy is kept; `full` is a second model. All three give the same losses."""
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    stop: StopSection = StopSection()
    continual: ContinualSection | None = None
    """Learning task after task. A recipe with this section is one for `hft continual`, which fills it in where it is not
    given."""
    method: MethodSection = MethodSection()
    output: HomePath | None = None
    """Folder of the run; null gives `runs/<name of the recipe>`."""

    @property
    def folder(self) -> Path:
        """Folder of the run; loading the recipe fills `output` in."""
        assert self.output is not None
        return Path(self.output)

    @property
    def objective(self) -> Objective:
        """Which of the commands the recipe is for."""
        return "continual" if self.continual else "dpo" if self.dpo else "sft"

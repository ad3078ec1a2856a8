"""How the questions of tasks are asked, by a recipe under `eval` and by `hft eval`."""

from hftcli.recipe.section import Section


class AskingSection(Section):
    """How the questions of tasks are asked."""

    strict: bool = False
    """Refuse tasks with a right answer that would not count as right if a model gave it. Otherwise such questions are named and
    counted."""

    @property
    def asking(self) -> "AskingSection":
        """These keys alone, of a section that has more."""
        return AskingSection(**{name: getattr(self, name) for name in AskingSection.model_fields})

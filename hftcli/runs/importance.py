"""What the units of a round's start matter, where `freeze.rank` goes by that."""

from hftcli.recipe.section import FileSection


class UnitScores(FileSection):
    """What `importance.json` of a round holds."""

    rank: str
    """The score: `freeze.rank`."""
    source: str
    """What it was taken of, besides the weights; empty where it is of them alone."""
    key: str
    """SHA-256 of all that the scores come from."""
    scores: dict[str, float]
    """By unit in the layers, but for those of which the rank says nothing."""

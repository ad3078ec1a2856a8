"""What counts as earlier than a round, where its matrices train in directions or columns."""

from hftcli.recipe.section import Section


class EarlierInputs(Section):
    """What was earlier than a round whose matrices train in parts, and how much of it the round left alone."""

    sources: tuple[str, ...]
    """What was read: samples of the model, kept rows, the rows of the rounds before; each counts the same."""
    closed_energy: dict[str, float]
    """By input of the matrices that train in directions or columns, or by matrix where each has columns of its own, the share
    of the energy of the earlier inputs in what is closed. It falls as earlier rounds fill the space."""

"""A comparison of methods as a page of its own: what is shown at equal learning, the figure, and the settings in numbers."""

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hftcli.comparing.comparison import Comparison
from hftcli.reporting.figures import render_frontier
from hftcli.reporting.measures import show_estimate
from hftcli.reporting.places import hide_folders
from hftcli.runs.files import write_text

TEMPLATE = "compare.html.jinja"


def write_comparison(comparison: Comparison, tuning: str, path: Path) -> None:
    """Write the page.

    Args:
        tuning: how the settings were chosen; empty where all that ran are reported.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    unit = comparison.unit
    rows = [
        (
            method.name, setting.label, str(len(setting.points)), show_estimate(setting.learning, unit),
            show_estimate(setting.forgetting, unit), "yes" if index in method.frontier else "",
        )
        for method in comparison.methods
        for index, setting in enumerate(method.settings)
    ]  # fmt: skip
    text = environment.get_template(TEMPLATE).render(
        title=" against ".join(method.name for method in comparison.methods),
        unit=unit.name,
        learned=hide_folders(", ".join(comparison.learned), comparison.learned),
        known=hide_folders(", ".join(comparison.known), comparison.known),
        tuning=tuning,
        differences=[difference.sentence for difference in comparison.differences],
        figure=base64.b64encode(render_frontier(comparison)).decode(),
        rows=rows,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)

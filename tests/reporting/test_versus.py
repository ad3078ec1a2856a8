"""The page of a comparison."""

import base64
import re

from written_runs import FACTS, SKILL, write_run

from hftcli.comparing.comparison import compare_runs
from hftcli.reporting.versus import write_comparison


def test_the_page_says_what_is_shown_and_holds_its_figure(tmp_path):
    folders = []
    for share, seed, learned in ((1.0, 1, 0.9), (1.0, 2, 0.8), (0.5, 1, 0.85), (0.5, 2, 0.95)):
        rows = ({FACTS: 1.0, SKILL: 0.0}, {FACTS: 1 - learned / 2, SKILL: learned})
        settings = (f"freeze.trainable_fraction={share}", f"freeze.seed={seed}", f"train.seed={seed}")
        folders.append(write_run(tmp_path / f"{share}-{seed}", *settings, rows=rows))
    comparison = compare_runs(folders)
    path = tmp_path / "pages" / "comparison.html"
    write_comparison(comparison, "", path)
    text = path.read_text(encoding="utf-8")
    assert "<h1>full against half</h1>" in text
    assert '<td class="text">' in text
    assert FACTS in text
    (figure,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', text)
    assert b"<svg" in base64.b64decode(figure)
    assert re.findall(r"""(?:src|href)="(?!data:)|url\(|@import""", text) == []
    assert str(tmp_path) not in text

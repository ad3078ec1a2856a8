"""A run's page holds what the run holds, escapes what others wrote, asks nothing of the network, and can be read by all."""

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from reporting.contrast import compute_luminance
from written_runs import FACTS, SKILL, complete_round, make_answers, write_run

from hftcli import PACKAGE
from hftcli.comparing.forgetting import ForgettingMatrix, assemble_matrix
from hftcli.comparing.items import read_item_changes
from hftcli.errors import InputError
from hftcli.reporting.page import make_page, write_page
from hftcli.runs.files import write_model
from hftcli.runs.run import Run

VOID = {"meta", "link", "br", "img", "hr", "path", "rect"}


@pytest.fixture
def run(tmp_path) -> Run:
    """A finished run of the embedded model's size: a plan, a loss curve, scores and predictions."""
    run = Run(write_run(tmp_path / "<b>my & run"))
    complete_round(run, 0)
    return run


class Page(HTMLParser):
    """Elements with their attributes, and whether each one that opens is closed in its turn."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_page_is_whole_and_names_its_run_as_text(run):
    page = Page(make_page(run))
    assert page.open == []
    assert page.texts["title"].startswith("<b>my & run – hft")
    assert page.texts["h1"] == "<b>my & run"


def test_page_asks_nothing_of_the_network(run):
    text = make_page(run)
    page = Page(text)
    assert "default-src 'none'" in [meta.get("content", "") for meta in page.find("meta")][2]
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in page.elements}
    assert not re.search(r"""(?:src|href)=|url\(|@import""", text)


def test_page_can_be_read_by_all(run):
    """Language, one heading of the first rank, no rank left out, figures and regions that scroll with names, headed tables."""
    page = Page(make_page(run))
    assert page.find("html")[0]["lang"] == "en"
    ranks = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert ranks.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(ranks))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.find("svg"))
    assert all(region["aria-label"] and region["tabindex"] == "0" for region in page.find("div") if "role" in region)
    assert all("scope" in head for head in page.find("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_text_has_the_contrast_that_wcag_asks_for():
    """At least 4.5 : 1 (WCAG 2.2, 1.4.3) on the paper and on what is shaded, in both dresses."""
    style = (PACKAGE / "reporting" / "style.css.jinja").read_text(encoding="utf-8")
    dresses = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(dresses) == 2
    for dress in dresses:
        light = {name: compute_luminance(colour) for name, colour in re.findall(r"--(\w+): (#\w+)", dress)}
        for ink in ("ink", "muted"):
            for ground in ("paper", "shade"):
                lighter, darker = sorted((light[ink], light[ground]), reverse=True)
                assert (lighter + 0.05) / (darker + 0.05) >= 4.5, f"{ink} on {ground}"


def test_page_shows_scores_questions_and_losses(run):
    text = make_page(run)
    for shown in ("tinyworld/facts", "-30.0", "+90.0", "2 of 4", "8.000 to 0.400 in 20 steps", "supervised fine-tuning"):
        assert shown in text
    assert "learning_rate: 0.0007" in text  # the recipe


def test_time_of_a_resumed_round_is_that_of_its_last_start(run):
    (round_,) = run.rounds
    write_model(
        round_.result_path, round_.read_result().model_copy(update={"resumed_from": 40, "kept_step": 20, "num_steps": 60})
    )
    page = make_page(run)
    assert "1.0 s, 00-sft from step 40" in page
    assert "00-sft; the weights are those of step 20" in page


def test_plan_has_a_square_for_each_unit_that_says_what_it_is(run):
    page, plan = make_page(run), run.rounds[0].read_plan()
    squares = re.findall(r'class="(trained|frozen)"><title>(\S+): (trained|frozen)</title>', page)
    assert len(squares) == 16
    for kind, unit, told in squares:
        assert kind == told == ("trained" if f"{unit}.weight" in plan.trained else "frozen")
    assert "attention: q_proj, k_proj, v_proj, o_proj" in page


def test_continual_run_shows_its_matrix_with_its_metrics(tmp_path):
    tasks = ("tinyworld/topic", SKILL)
    rows = ({tasks[0]: 0.0, SKILL: 0.1}, {tasks[0]: 0.8, SKILL: 0.1}, {tasks[0]: 0.5, SKILL: 0.9})
    run = Run(write_run(tmp_path / "run", rows=rows, tasks=tasks, objective="continual"))
    for index in range(2):
        complete_round(run, index)
    scores = ((0.0, 0.1), (0.8, None), (0.5, 0.9))
    write_model(run.matrix_path, ForgettingMatrix(tasks=("topic", "skill"), scores=scores))
    page = make_page(run)
    assert re.findall(r'class="own"[^>]*>([\d.]+)<', page) == ["80.0", "90.0"]
    assert re.search(r"bwt</th><td>-30.0<", page)
    assert page.count('aria-label="Training loss of') == 2


def test_only_runs_with_a_finished_round_have_a_page(tmp_path, run):
    with pytest.raises(InputError, match="only a run has a page"):
        write_page(Run(tmp_path / "nothing"), tmp_path / "page.html")
    open_ = Run(write_run(tmp_path / "open", is_finished=False))
    with pytest.raises(InputError, match="has no finished round"):
        write_page(open_, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    write_page(run, tmp_path / "pages" / "page.html")
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["page.html"]


def test_questions_are_compared_one_by_one(run):
    found = read_item_changes(run)[FACTS]
    assert found.change.mean == -0.5
    assert (found.transitions.num_lost, found.transitions.num_known) == (2, 4)
    assert found.p_value == 0.5  # two lost, none won: 2 / 2^2
    assert list(read_item_changes(run)) == [FACTS]  # what kept no predictions is left out


def test_questions_lost_and_won_are_shown_less_guessing_where_there_are_choices(hft, run):
    """Five of ten right before, three after: guessing among four shows 5 x 7 / (10 x 3) = 7/6 lost, and as many won."""
    round_ = run.rounds[0]
    assert "less guessing" not in make_page(run)
    round_.write_predictions("before", SKILL, make_answers(*[1] * 5, *[0] * 5))
    round_.write_predictions("after", SKILL, make_answers(1, 0, 0, 0, 0, 1, 1, 0, 0, 0))
    found = read_item_changes(run)
    assert found[FACTS].adjusted is None
    assert (found[SKILL].adjusted.lost, found[SKILL].adjusted.won) == pytest.approx(((4 - 7 / 6) / 10, (2 - 7 / 6) / 10))
    page = make_page(run)
    assert "<td>4 of 5</td><td>2 of 5</td><td>0.688</td><td>28.3</td><td>8.3</td>" in page
    rows = re.findall("<tr>.*?</tr>", page[page.index("Knowledge before") : page.index("</section>")], re.DOTALL)
    assert {len(re.findall("<t[dh]", row)) for row in rows} == {12}
    shown = hft("report", run.folder).stdout
    assert re.search(r"4 of 5 │ 2 of 5 │ 0.688 │ +28.3 │ +8.3 │", shown)
    assert "less guessing" in shown


def test_report_command_writes_the_page(hft, run, tmp_path):
    path = tmp_path / "page.html"
    done = hft("report", run.folder, "--html", path)
    assert "2 of 4" in done.stdout
    assert path.read_text(encoding="utf-8") == make_page(run)


def test_what_it_learned_and_forgot_stands_first(run):
    text = make_page(run)
    head = text[text.index("<h1>") : text.index('<dl class="facts">')]
    assert re.search(r"What it learned</h2><ul><li>tinyworld/skill \+90.0 points", head)
    assert re.search(r"What it forgot</h2><ul><li>tinyworld/facts -30.0 points", head)


def test_axes_have_names_and_places_say_their_values(run):
    text = make_page(run)
    assert '<span class="across">optimizer steps</span><span class="upwards">loss</span>' in text
    assert "<title>step 4: 2.000</title>" in text


def test_the_page_says_what_to_do_next_and_not_who_wrote_it(run, tmp_path):
    text = make_page(run)
    assert "hft report" in text[text.index("What to do next") :]
    assert str(tmp_path.parent) not in text


def test_a_sequence_names_the_files_of_questions_without_their_folders(tmp_path):
    tasks, known = ("tinyworld/topic", SKILL), "/home/me/secret/known.jsonl"
    rows = tuple({tasks[0]: 0.1, SKILL: 0.1, known: 1.0 - 0.1 * place} for place in range(3))
    run = Run(write_run(tmp_path / "run", f"eval.tasks=[{known}]", rows=rows, tasks=tasks, objective="continual"))
    for index in range(2):
        complete_round(run, index)
    write_model(run.matrix_path, assemble_matrix(run))
    text = make_page(run)
    assert "known.jsonl" in text
    assert "secret" not in text

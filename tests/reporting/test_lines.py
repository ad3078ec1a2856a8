"""Lines on a terminal and elsewhere."""

import io

from hftcli.reporting.lines import fold


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_break_between_words_below_their_text(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    text = "rows    1,600 of 1,600 (messages); 80,650 tokens"
    assert fold(text, Terminal()) == "rows    1,600 of 1,600\n        (messages); 80,650\n        tokens"
    assert fold("a-very-long-name/that-is-one-word-alone", Terminal()) == "a-very-long-name/that-is-one-word-alone"


def test_elsewhere_a_line_is_a_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    assert fold("word " * 20, io.StringIO()) == "word " * 20

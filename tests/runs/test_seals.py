"""Seals: files known again by their bytes."""

from hftcli.runs.seals import find_damage, list_files, seal_files


def test_seals_name_each_damage(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("text")
    seals = seal_files(tmp_path, list_files(tmp_path))
    assert find_damage(tmp_path, seals) == []
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_text("texts")
    (tmp_path / "c").write_text("test")
    assert find_damage(tmp_path, seals) == [
        "a is missing", "b has 5 bytes instead of 4", "c has other bytes than were written",
    ]  # fmt: skip

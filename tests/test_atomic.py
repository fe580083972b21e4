"""Files and folders that appear whole: names of what is half-written."""

from __future__ import annotations

import os

from prefdistill.atomic import fresh_file, fresh_folder, remove_unfinished


def test_containers_with_one_process_id_do_not_meet(tmp_path, monkeypatch):
    """On a file system that hosts share, process 1 of each writes the same file, or the same folder."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with fresh_file(tmp_path / "file") as one, fresh_file(tmp_path / "file") as other:
        one.write_text("one")
        other.write_text("other")
        assert one.read_text() == "one"
    with fresh_folder(tmp_path / "folder") as one:
        (one / "a").write_text("one")
        with fresh_folder(tmp_path / "folder") as other:
            (other / "a").write_text("other")
        assert (one / "a").read_text() == "one"
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "a").read_text() == "one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_what_is_half_written_is_known_by_its_name(tmp_path):
    """Whatever a killed process leaves, the next start removes."""
    with fresh_file(tmp_path / "file") as part, fresh_folder(tmp_path / "folder") as other:
        part.write_text("half")
        (other / "a").write_text("half")
        remove_unfinished(tmp_path, lambda path: False)
        assert not list(tmp_path.iterdir())
        part.write_text("whole")
        other.mkdir()
    assert (tmp_path / "file").read_text() == "whole"

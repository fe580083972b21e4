"""Files and folders that appear whole: names of what is half-written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from prefdistill.atomic import fresh_file, fresh_folder, remove_unfinished
from prefdistill.manifest import Manifest, StageRecord
from prefdistill.seals import checksum


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


def test_what_appears_would_outlive_a_power_cut(tmp_path, monkeypatch):
    """Before a name appears its bytes are on disk, and the name's own folder after it."""
    done, real_sync, real_replace = [], os.fsync, os.replace

    def sync(handle):
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        real_sync(handle)

    def replace(old, new):
        done.append(("appears", Path(new).name))
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    with fresh_folder(tmp_path / "folder") as part:
        (part / "inner").mkdir()
        (part / "inner" / "a").write_text("x")
    at = done.index(("appears", "folder"))
    assert {name for _, name in done[:at]} == {"inner", "a", part.name}
    assert done[at + 1 :] == [("sync", tmp_path.name)]
    with monkeypatch.context() as patch:
        real_remove = shutil.rmtree
        patch.setattr(
            shutil, "rmtree", lambda path, **how: done.append(("goes", path.name)) or real_remove(path, **how)
        )
        done.clear()
        with fresh_folder(tmp_path / "folder") as part:
            (part / "b").write_text("x")
    assert done.index(("sync", tmp_path.name)) < next(
        i for i, (what, name) in enumerate(done) if ".old-" in name and what == "goes"
    )
    done.clear()
    with fresh_file(tmp_path / "file") as part:
        part.write_text("x")
    assert done == [("sync", part.name), ("appears", "file"), ("sync", tmp_path.name)]


def test_a_manifest_leaves_out_what_others_write(tmp_path):
    """Runs that share a folder of columns write into it at any time."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "shard-00000-x.parquet").write_text("whole")
    manifest = Manifest(tmp_path / "run")
    with fresh_file(tmp_path / "shared" / "shard-00001.parquet") as part:
        part.write_text("half")
        manifest.finish("score", StageRecord("f", 1.0, 1.0), [tmp_path / "shared"])
    outputs = Manifest(tmp_path / "run").stages["score"].outputs
    assert [Path(name).name for name in outputs] == ["shard-00000-x.parquet"]


def test_a_manifest_bears_that_another_run_removes_what_is_stale(tmp_path, monkeypatch):
    shared, own = tmp_path / "shared", tmp_path / "run" / "columns"
    for folder in (shared, own):
        folder.mkdir(parents=True)
        for name in ("a", "b"):
            (folder / name).write_text(name)

    def gone(file):
        file.unlink(missing_ok=file.name == "a")
        return checksum(file)

    monkeypatch.setattr(
        "prefdistill.manifest.checksum", lambda file: gone(file) if file.name == "a" else checksum(file)
    )
    manifest = Manifest(tmp_path / "run")
    manifest.finish("score", StageRecord("f", 1.0, 1.0), [shared])
    assert [Path(name).name for name in manifest.stages["score"].outputs] == ["b"]
    with pytest.raises(FileNotFoundError):  # in the run's own folder nobody else has a say
        manifest.finish("score", StageRecord("f", 1.0, 1.0), [own])

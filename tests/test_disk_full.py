"""A disk that fills up: a line that says so, nothing half, and the run comes out as on a large one."""

from __future__ import annotations

import subprocess

import pytest

from prefdistill import pipeline
from prefdistill.cli import main
from prefdistill.errors import is_disk_full
from tiny_runs import small


@pytest.fixture
def disk(tmp_path):
    """A function that makes a small file system larger; skipped where nobody may mount one."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(kilobytes: int, how: str = "") -> bool:
        command = ["mount", "-t", "tmpfs", "-o", f"{how}size={kilobytes}k", "tmpfs", str(place)]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            return False

    if not mount(256):
        pytest.skip("no small file system can be mounted here")
    yield place, lambda kilobytes: mount(kilobytes, "remount,")
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_run_goes_on_when_there_is_room_again(disk, data, model_folder, tmp_path, capsys):
    place, grow = disk
    options = {"methods": "[dpo]", "distill.save_steps": 1, "distill.logging_steps": 1, "reward.hold": "full"}
    whole = tmp_path / "whole"
    pipeline.run(small(data, model_folder, whole, **options))
    (tmp_path / "c.yaml").write_text(small(data, model_folder, place / "run", **options).as_yaml())
    size, full = 256, 0
    while True:
        capsys.readouterr()
        status = main(["run", str(tmp_path / "c.yaml")])
        said = capsys.readouterr().err
        if status == 0:
            break
        full += 1
        assert status == 2, said[-2000:]
        assert "Traceback" not in said
        assert "the disk is full" in said.strip().splitlines()[-1]
        assert not list((place / "run").rglob("*.part-*"))
        size *= 2
        grow(size)
    assert full >= 3, "it was full in several stages"
    for file in (
        "policy/dpo/model.safetensors",
        "judge/model.safetensors",
        "data/prompts.parquet",
        "evaluation/samples/dpo.json",
    ):
        assert (place / "run" / file).read_bytes() == (whole / file).read_bytes()


def test_how_libraries_say_it():
    assert is_disk_full(OSError(28, "No space left on device"))
    assert is_disk_full(Exception("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert is_disk_full(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 9408 vs 9300"))
    assert not is_disk_full(OSError(13, "Permission denied"))
    assert not is_disk_full(ValueError("28"))

"""What runs of the main job start from, in many tests."""

from __future__ import annotations

import pytest

from tiny_runs import rows, save_model, write_rows


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_rows(path, rows())
    return path

"""A little of `make flip-test`: damaged files of a run are found, named, and what they held is computed again."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from crash.flips import Missed, Scene, here, strike, table
from prefdistill.manifest import Manifest


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flips")
    return {state: Scene(folder, state, here, 24, folder / "run") for state in ("finished", "a choice")}


@pytest.mark.parametrize(
    ("state", "kind", "how", "expected"),
    [
        ("a choice", "checkpoint", "flip", "computed again"),
        ("a choice", "column shard", "cut", "computed again"),
        ("a choice", "sample part", "flip", "computed again"),
        ("a choice", "kept weights", "flip", "refused"),
        ("finished", "manifest", "cut", "refused"),
        ("finished", "weights", "gone", "computed again"),
    ],
)
def test_damage_is_found_and_mended(state, kind, how, expected, scenes):
    draw = random.Random(kind)
    scenes[state].fresh()
    assert strike(scenes[state].files[kind][-1], how, draw, scenes[state]) == expected


def test_damage_that_is_not_looked_for_is_told(scenes, monkeypatch):
    """The harness can fail: without the checksums of a manifest the run says that all is done."""
    scene = scenes["finished"]
    monkeypatch.setattr(Manifest, "is_done", lambda self, stage, fingerprint: stage in self.stages)
    scene.fresh()
    (weights,) = [f for f in scene.files["weights"] if f.parts[0] == "policy"]
    with pytest.raises(Missed, match=r"policy/.*the result differs in policy/"):
        strike(weights, "flip", random.Random(0), scene)


def test_the_backbone_may_go_and_not_change(scenes):
    """Members hold its weights too: lost as a file of its own it is no loss, and damaged it is damage to them."""
    scene = scenes["finished"]
    (backbone,) = [f for f in scene.files["weights"] if f.name.startswith("backbone-")]
    for how, expected in (("gone", "not read"), ("flip", "computed again")):
        scene.fresh()
        assert strike(backbone, how, random.Random(0), scene) == expected


def test_the_table_sums_up():
    said = table(Counter({("weights", "missed"): 1, ("manifest", "refused"): 2, ("seal", "not read"): 3}))
    assert said.splitlines()[-1] == "6 damaged, 2 found, 3 not read, 1 missed"

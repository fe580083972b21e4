"""The report's pictures: valid SVG whatever is drawn, the same colours and settings always."""

from __future__ import annotations

import math
import subprocess
import sys

import matplotlib

from prefdistill.report import canvas, pictures
from test_report import svg


def test_one_colour_a_method_whoever_is_beside_it():
    one = canvas.Palette(["dpo", "zeta"])
    other = canvas.Palette(["zeta", "e-dpo", "dpo", "reference"])
    assert one.colour("dpo") == other.colour("dpo")
    assert one.colour("zeta") == other.colour("zeta")
    names = ["dpo", "ipo", "p-dpo", "d-dpo", "dp-dpo", "e-dpo", "hull-dpo", "reference", *"abcdef"]
    many = canvas.Palette(names)
    assert len({many.colour(name) for name in names}) == len(names)


def test_nothing_to_draw():
    palette = canvas.Palette(())
    nothing = (math.nan, None, None)
    assert pictures.intervals([("a", nothing)], palette, xlabel="x", zero=0.0) is None
    assert pictures.reward_and_kl([("a", (1.0, 0.0, 2.0), nothing)], palette) is None
    assert pictures.lines([("a", [1, 2], [None, math.nan])], palette, ylabel="y") is None
    assert pictures.calibration([("a", [], [])], mean=None) is None
    assert pictures.histogram([None, "x"], xlabel="x") is None
    assert pictures.correlations([], []) is None
    assert pictures.correlations([[1.0, 2.0]], ["a"]) is None


def test_odd_input_is_drawn():
    palette = canvas.Palette(())
    turned_round = (0.5, 0.9, 0.1)
    assert svg(pictures.intervals([("_a$b$" * 20, turned_round)], palette, xlabel="x", zero=0.5, percent=True))
    assert svg(pictures.lines([("_x", [1, 2, 3], [0.5])], palette, ylabel="y"))
    assert svg(pictures.histogram([2.0] * 5, xlabel="x"))
    assert svg(pictures.correlations([[1.0, math.nan], [None, 1.0]], ["only one name"]))
    assert svg(pictures.calibration([(str(k), [0.6, 0.8], [0.5, 0.9]) for k in range(12)], mean=None))


def test_settings_of_the_user_neither_matter_nor_change():
    def draw():
        return pictures.histogram([1.0, 2.0, 3.0], xlabel="x")

    expected = draw()
    with matplotlib.rc_context({"text.usetex": True, "svg.fonttype": "none", "font.size": 30}):
        before = dict(matplotlib.rcParams)
        assert draw() == expected
        assert dict(matplotlib.rcParams) == before


def test_pyplot_stays_out():
    program = "import sys, prefdistill.report.html; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0

"""The report: hostile text stays text, missing parts say so, and every number shown stands in the input."""

from __future__ import annotations

import base64
import copy
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from prefdistill.report import canvas, html
from prefdistill.report.html import write_report

METHODS = ("reference", "dpo", "d-dpo", "e-dpo", "my own")
VOID = {"meta", "img", "br"}
TAGS = """html head title style body header main footer nav section h1 h2 h3 p a div span strong bdi pre
details summary figure figcaption table thead tbody tr th td meta img br"""


def _method(i):
    mean = 0.1137 * i
    return {
        "advantage": {"mean": mean, "ci95": [mean - 0.0871, mean + 0.0872]},
        "advantage_equal_length": {"mean": mean - 0.0313, "ci95": [mean - 0.1219, mean + 0.0615]},
        "win_rate": {"mean": 0.5 + 0.0417 * i, "ci95": [0.4531 + 0.0417 * i, 0.5472 + 0.0417 * i]},
        "win_rate_equal_length": {"mean": 0.5 + 0.0301 * i, "ci95": [0.4431 + 0.0301 * i, 0.5572 + 0.0301 * i]},
        **{"wins": 0.4127 + 0.0417 * i, "ties": 0.1746, "losses": 0.4127 - 0.0417 * i},
        "kl_policy_ref": {"mean": 1.7391 * i, "standard_error": 0.1381},
        "kl_ref_policy": {"mean": 1.2873 * i, "standard_error": 0.0943},
        **{"length_mean": 41.37 + i, "length_reference_mean": 40.86},
        "chosen_logp_change": 0.7319 - 1.1643 * i,
        "truncated": 0.0382,
    }


def _member(k):
    return {
        "name": f"member-{k}",
        "resample": f"resample {k}",
        "accuracy": 0.6813 + 0.0129 * k,
        **{"log_loss": 0.6127, "ece": 0.0431, "temperature": 1.1713, "n_heldout": 873},
        "length_correlation": -0.2179 + 0.3139 * k,
        "calibration": {"predicted": [0.55, 0.7, 0.9], "observed": [0.5, 0.72, 0.8], "count": [291, 291, 291]},
    }


def full_run():
    """Every key of the schema, with numbers that do not occur by chance."""
    return {
        **{"title": "A run", "generated": "some day", "version": "dev"},
        "summary": {
            "verdict": "It went well.",
            "prompts": 1871,
            "judge": {"name": "oracle", "description": "a held-out model", "heldout_accuracy": 0.7237},
            "methods": {name: _method(i) for i, name in enumerate(METHODS)},
            "tests": [
                {
                    "a": "e-dpo",
                    "b": "dpo",
                    "difference": {"mean": 0.2273, "ci95": [0.1131, 0.34]},
                    "p_value": 2e-4,
                    "p_holm": 4e-4,
                    "detectable": 0.16,
                },
                {
                    "a": "d-dpo",
                    "b": "dpo",
                    "difference": {"mean": -0.1139, "ci95": [-0.25, 0.02]},
                    "p_value": 0.0973,
                    "p_holm": 0.0973,
                    "detectable": 0.19,
                },
            ],
        },
        "training": {
            name: {
                "loss": f"loss of {name}",
                "steps": [17, 34, 51],
                "logps/chosen_change": [-0.3127, -0.8131, -1.3733],
                "rewards/margins": [0.1173, 0.2319, 0.3377],
                "loss_values": [0.6931, 0.6127, 0.5573],
                "level_change": [-0.2137, -0.6719, -1.1739],
            }
            for name in METHODS[1:]
        },
        "members": [_member(k) for k in range(3)],
        "ensemble_mean": {**_member(3), "name": "mean"},
        "disagreement": {
            "margin_std": [0.1 * i for i in range(40)],
            "member_correlation": [[1.0, 0.62, 0.41], [0.62, 1.0, -0.3], [0.41, -0.3, 1.0]],
            "agreement_rate": 0.5833,
        },
        "mixtures": {
            "hull <dpo>": {
                "per_prompt": True,
                "weights": [0.6213, 0.3787, 0.0],
                "beta": 0.1,
                "samples": 7.4,
                "prompts": 200,
                "policies": {
                    "mixture": {"worst_case": 0.2191, "by_member": [0.2191, 0.2191, 0.3]},
                    "mean of the members": {"worst_case": -0.1034, "by_member": [0.4, -0.1034, 0.2]},
                },
            }
        },
        "samples": [
            {
                "prompt": f"question {letter} " + "and so on " * 30,
                "reference": "plain answer",
                "responses": {name: f"answer of {name}" for name in METHODS[1:]},
                "scores": {name: 0.3719 * i - 0.5 for i, name in enumerate(METHODS)},
            }
            for letter in "abcdefgh"
        ],
        "warnings": [{"kind": "danger", "text": "something is wrong", "what_to_do": "mend it"}],
        "config": "beta: small\n",
        "environment": {"python": "three", "cpu": "slow"},
        "stages": [{"name": "policy", "seconds": 8137.0, "said": "done"}],
    }


class Reader(HTMLParser):
    """Tags, attributes and visible text, as a browser would see them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.pieces, self.open = set(), [], [], []
        self.feed(text)
        self.close()
        self.text = "\n".join(self.pieces)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"unbalanced </{tag}>"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.pieces.append(data)

    def sources(self):
        return [value for _, name, value in self.attributes if name == "src"]


def _replaced(value, kind, change):
    """A copy with every value of that kind changed, keys of method records included where they are text."""
    if isinstance(value, dict):
        return {key: _replaced(item, kind, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, kind, change) for item in value]
    return change(value) if isinstance(value, kind) and not isinstance(value, bool) else value


def _check_inert(reader):
    assert reader.tags <= set(TAGS.split())
    assert reader.open == []
    for tag, name, value in reader.attributes:
        assert not name.startswith("on"), (tag, name)
        if name == "src":
            assert value.startswith("data:image/svg+xml;base64,")
        elif name == "href":
            assert re.fullmatch(r"#[a-z]+", value)
        elif name == "style":
            assert re.fullmatch(r"(background|border-top-color):#[0-9a-f]{6}", value)
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in reader.attributes


@pytest.fixture(scope="module")
def full():
    text = write_report(full_run())
    return text, Reader(text)


@pytest.mark.parametrize(
    "attack",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "'><svg onload=alert(1)>",
        "</style></title></pre></details><iframe src=javascript:alert(1)>",
        "{{ 7 * 7 }}{% include 'x' %}<!--",
        "$\\frac{1}{$ & _x --> \n ]]>",
    ],
)
def test_hostile_text_stays_text(attack):
    run = full_run()
    seen = []

    def hostile(value):
        seen.append(f"mark{len(seen)}x")
        return seen[-1] + attack + value

    def renamed(record):
        return {name if name == "reference" else attack + name: item for name, item in record.items()}

    run["summary"]["methods"] = renamed(run["summary"]["methods"])
    run["training"] = renamed(run["training"])
    run["environment"] = {attack + name: value for name, value in run["environment"].items()}
    for sample in run["samples"]:
        sample["responses"], sample["scores"] = renamed(sample["responses"]), renamed(sample["scores"])
    reader = Reader(write_report(_replaced(run, str, hostile)))
    _check_inert(reader)
    shown = set(re.findall(r"mark\d+x", reader.text))
    assert shown == set(seen), "some text of the run is not in the report"
    everything = re.sub(r"\s+", " ", reader.text)
    assert re.sub(r"\s+", " ", attack + "d-dpo") in everything
    for uri in reader.sources():
        svg(uri)


def svg(uri):
    root = ElementTree.fromstring(base64.b64decode(uri.partition(",")[2], validate=True))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    for element in root.iter():
        assert not str(element.tag).endswith(("}script", "}image", "}foreignObject", "}text"))
        for name, value in element.attrib.items():
            assert not name.startswith("on")
            if name.endswith("href"):
                assert value.startswith("#")
    return root


def test_pictures_are_valid_and_all_there(full):
    uris = full[1].sources()
    assert len(uris) == 10
    for uri in uris:
        assert len(list(svg(uri).iter("{http://www.w3.org/2000/svg}path"))) > 5
    assert len(full[0]) < 1_000_000


def test_the_mixture_is_shown(full):
    _text, reader = full
    assert "hull <dpo>" in reader.text
    assert "0.62, 0.38, 0.00" in " ".join(reader.text.split())
    assert "−0.103" in reader.text


def test_one_file_that_is_inert_and_whole(full):
    text, reader = full
    _check_inert(reader)
    assert "Left out" not in text
    assert html.NOT_KNOWN not in reader.text
    assert write_report(full_run()) == text, "the same run gives the same file"


def _numbers(value):
    if isinstance(value, dict):
        return [n for item in value.values() for n in _numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in _numbers(item)]
    if isinstance(value, str):
        return [float(token) for token in re.findall(r"\d+", value)]
    return [float(value)] if canvas.is_number(value) else []


def test_every_number_stands_in_the_input(full):
    run = full_run()
    known = _numbers(run)
    known += [100 * number for number in known]
    fixed = ["95%", "below .01", "log 2", "of 7", "2 more", "< 0.001", "2 h 15 min", "member-0", "-1", "-2", "1,871"]
    visible = full[1].text
    for phrase in fixed:
        visible = visible.replace(phrase, " ")
    tokens = re.findall(r"[−-]?\d+(?:\.\d+)?", visible)
    assert len(tokens) > 150
    for token in tokens:
        decimals = len(token.partition(".")[2])
        shown = float(token.replace("−", "-"))
        assert any(abs(shown - number) <= 0.5000001 * 10**-decimals for number in known), token


def test_what_is_shown(full):
    text = re.sub(r"\s+", " ", full[1].text)
    advantage, rate, outcomes, kl = "+0.34 [0.25, 0.43]", "62.5% [57.8, 67.2]", "54% / 17% / 29%", "5.22 ± 0.14"
    rest = ("44.4 (40.9)", "−0.11 [−0.25, 0.02]", "0.097", "< 0.001", "72.4%", "1,871", "2 h 15 min", "It went well.")
    for expected in (advantage, rate, outcomes, kl, *rest):
        assert expected in text


WHY = {
    "training": "no training records",
    "samples": "no samples",
    "warnings": "no list of warnings",
    "config": "no configuration",
    "environment": "no environment",
    "stages": "no stages",
    "disagreement": "no record of how an ensemble disagrees",
}


@pytest.mark.parametrize(("key", "why"), WHY.items())
def test_a_missing_section_says_why(key, why):
    run = full_run()
    del run[key]
    text = write_report(run)
    assert text.count("Left out:") == 1
    assert why in text


def test_the_least_run():
    reader = Reader(write_report({"title": "t", "summary": {"verdict": "v"}}))
    _check_inert(reader)
    assert reader.text.count("Left out:") == 13
    assert reader.sources() == []
    for broken in ({}, {"title": "t"}, {"title": "t", "summary": {}}, {"summary": {"verdict": "v"}}):
        with pytest.raises(ValueError, match="title"):
            write_report(broken)


def test_no_warnings_is_not_the_same_as_none_looked_for():
    assert "None." in write_report({**full_run(), "warnings": []})


@pytest.mark.parametrize("value", [None, math.nan, -math.inf, "text", {}, True])
def test_numbers_that_are_none(value):
    run = _replaced(full_run(), (int, float), lambda _: copy.copy(value))
    reader = Reader(write_report(run))
    _check_inert(reader)
    assert html.NOT_KNOWN in reader.text
    assert not re.search(r"\b(nan|inf|None|Undefined|True)\b", reader.text)


@pytest.mark.parametrize("shape", [None, [], {}, "text", 3])
def test_records_of_the_wrong_shape(shape):
    run = full_run()
    for key in set(run) - {"title", "summary"}:
        run[key] = shape
    for key in ("judge", "methods", "tests"):
        run["summary"][key] = shape
    _check_inert(Reader(write_report(run)))
    run = {"title": "t", "summary": {"verdict": "v", "methods": {"dpo": shape}}, "training": {"dpo": shape}}
    for rows in ("members", "samples", "warnings", "stages"):
        run[rows] = [shape]
    run["summary"]["tests"] = [shape]
    _check_inert(Reader(write_report(run)))


def test_characters_that_no_file_can_hold():
    run = full_run()
    run["samples"][0]["reference"] = "bell \x07 null \x00 half \ud83d whole 😀 tab\tkept"
    text = write_report(run)
    text.encode("utf-8")
    assert "bell \ufffd null \ufffd half \ufffd whole 😀 tab\tkept" in text


def test_json_round_trip_changes_nothing(full):
    assert write_report(json.loads(json.dumps(full_run()))) == full[0]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (html.number(-0.001), "−1.0e−03"),
        (html.number(-0.0), "0.00"),
        (html.number(3.14159, 3, True), "+3.142"),
        (html.number(3e9), "3.0e+09"),
        (html.percent(0.6583), "65.8%"),
        (html.percent(0.002, 0), "< 1%"),
        (html.percent(-0.0002), "−< 0.1%"),
        (html.percent(0.0, 0), "0%"),
        (html.estimate({"mean": 0.361, "ci95": [0.201, 0.519]}), "+0.36 [0.20, 0.52]"),
        (html.estimate({"mean": 0.0361, "ci95": [0.0201, 0.0519]}), "+0.036 [0.020, 0.052]"),
        (html.estimate({"mean": 361.2, "ci95": [201, 519]}), "+361 [201, 519]"),
        (html.estimate({"mean": -0.001, "ci95": [-0.2, 0.198]}), "0.00 [−0.20, 0.20]"),
        (html.estimate({"mean": 0.0, "ci95": [0.0, 0.0]}), "0.00 [0.00, 0.00]"),
        (html.estimate({"mean": 0.5, "ci95": [None, None]}), "+0.50 [n/a]"),
        (html.estimate({"mean": None, "ci95": [0, 1]}), "n/a"),
        (html.estimate({"mean": 0.658, "ci95": [0.61, 0.702]}, True, False), "65.8% [61.0, 70.2]"),
        (html.with_error({"mean": 3.214, "standard_error": 0.118}), "3.21 ± 0.12"),
        (html.with_error({"mean": 3.214, "standard_error": math.nan}), "3.21"),
        (html.p_value(0.0004), "< 0.001"),
        (html.p_value(0.0131), "0.013"),
        (html.duration(3.24), "3.2 s"),
        (html.duration(412), "6 min 52 s"),
        (html.duration(5025), "1 h 23 min"),
        (html.duration(-1), "n/a"),
    ],
)
def test_formats(shown, expected):
    assert shown == expected

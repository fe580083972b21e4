"""What a person sees of a long pass where no terminal is."""

from __future__ import annotations

import pytest

from prefdistill import progress


@pytest.mark.parametrize(
    ("rate", "said"), [(850.4, "850 tokens/s"), (2.54, "2.5 tokens/s"), (0.25, "4.0 s each"), (0.0, "")]
)
def test_rates_are_readable(rate, said):
    assert progress.rate_text(rate, "tokens") == said


def test_a_line_now_and_then_with_what_is_left(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.on_terminal(400, "tokens") as tick:
        tick(100)
        tick(100)
        tick(100)
    assert capsys.readouterr().err == "    200/400 tokens, 10 tokens/s, 20 s left\n"

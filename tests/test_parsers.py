"""A little of `make fuzz-bytes`: seeds and blindly changed ones; what the coverage-guided runs found, one test each."""

from __future__ import annotations

import pytest

from fuzz.parsers import TARGETS, blindly


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_read_or_refused(name, tmp_path):
    blindly(name, 20 if name in ("yaml", "arrow", "state") else 100, 0, tmp_path)

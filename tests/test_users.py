"""docs/users.md: every row names tests, and they are there."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (HERE.parent / "docs" / "users.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| what they meet")
]


def test_every_row_names_tests_that_exist():
    assert len(ROWS) == 14
    for what, where, here, tests in ROWS:
        assert what
        assert re.search(r"\d", where), f"no thread for {what!r}"
        assert here
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
        assert named, f"no test for {what!r}"
        for file, name in named:
            assert re.search(rf"^def {name}\(", (HERE / file).read_text(encoding="utf-8"), re.MULTILINE), (file, name)

"""A progress bar with a rate, or a line now and then where no terminal is; stages are given one and know no more."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

Tick = Callable[[int], None]
Progress = Callable[[int, str], AbstractContextManager[Tick]]

LINE_EVERY_SECONDS = 20.0


@contextlib.contextmanager
def silent(total: int, unit: str) -> Iterator[Tick]:
    yield lambda amount: None


@contextlib.contextmanager
def on_terminal(total: int, unit: str) -> Iterator[Tick]:
    """A rich bar on a terminal; elsewhere a line every 20 seconds with the rate and the time left."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = [
            TextColumn("    "),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        ]
        began, done = time.monotonic(), 0
        with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task("", total=total, unit=unit, rate="")

            def tick(amount: int) -> None:
                nonlocal done
                done += amount
                rate = done / max(time.monotonic() - began, 1e-9)
                bars.update(task, advance=amount, rate=rate_text(rate, unit))

            yield tick
        return
    began = last = time.monotonic()
    done = 0

    def line(amount: int) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= LINE_EVERY_SECONDS:
            last = now
            rate = done / (now - began)
            left = (total - done) / rate
            said = f"    {done}/{total} {unit}, {rate_text(rate, unit)}, {left:.0f} s left"
            print(said, file=sys.stderr, flush=True)

    yield line


def rate_text(rate: float, unit: str) -> str:
    """A rate that a person can read: 850 tokens/s, 2.5 prompts/s, or 4.0 s for one of the slow ones."""
    if rate >= 10:
        return f"{rate:.0f} {unit}/s"
    if rate >= 1:
        return f"{rate:.1f} {unit}/s"
    return f"{1 / rate:.1f} s each" if rate > 0 else ""

"""How a command is told to stop: SIGTERM ends it as Ctrl-C does, and a training first writes a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prefdistill.ranks import is_main


class Terminated(KeyboardInterrupt):
    """SIGTERM: what a scheduler sends before it takes the machine away."""


@dataclass
class Request:
    """A wish to stop, as the exception that will end the command; None while there is none."""

    reason: KeyboardInterrupt | None = None


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends what runs in the block as Ctrl-C does: files whole, locks free."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to whoever runs us in a thread
        return

    def terminate(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def stop_requests() -> Iterator[Request]:
    """In the block the first SIGINT or SIGTERM is a request that the block may fulfil; the next one ends it at once.

    Signals that the process ignores, or leaves to the system, stay as they are.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: Any) -> None:
        reason = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        if request.reason is not None:
            raise reason
        request.reason = reason
        if is_main():
            print(
                "    stopping after this step, with a checkpoint; once more stops at once", file=sys.stderr, flush=True
            )

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if callable(signal.getsignal(number)):
            before[number] = signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

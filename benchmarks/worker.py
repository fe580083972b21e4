"""A side in a process of its own: its memory and its allocator's habits are its own, and it waits while others step."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent


class Fallen(RuntimeError):
    """A side that was killed: memory fell short, if nobody else did it."""


@dataclass
class Worker:
    """A side that steps when it is told to.

    Attributes:
        peak: gigabytes that it has held at most so far.
        returned: what its last step returned: its loss, if it trained.
    """

    process: subprocess.Popen[str]
    errors: IO[str]
    peak: float = 0.0
    returned: float = 0.0

    def step(self) -> float:
        """Takes one step; returns its seconds.

        Raises:
            Fallen: the side was killed.
            RuntimeError: it ended by itself; the message holds the end of what it wrote.
        """
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # said by the answer that does not come
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        answer = self._answer()
        self.peak, self.returned = answer["peak"], answer["returned"]
        return float(answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            kind = Fallen if code == -signal.SIGKILL else RuntimeError
            raise kind(f"a side of the benchmark ended with {code}:\n{self.errors.read()[-2000:]}")
        return json.loads(line)  # type: ignore[no-any-return]


@contextlib.contextmanager
def worker(row: str, side: str, precision: str, sizes: Any, *, trial: bool = False) -> Iterator[Worker]:
    """A side of a row, made and ready for its first step, or one of less work to try it; ended on leaving."""
    shape = ["--model", sizes.model, "--prompt-tokens", str(sizes.prompt_tokens)]
    shape += ["--response-tokens", str(sizes.response_tokens), "--batch-prompts", str(sizes.batch_prompts)]
    command = [sys.executable, "-m", "benchmarks", *shape, "--worker", row, side, precision]
    command += ["--trial"] if trial else []
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        tempfile.TemporaryDirectory() as scratch,  # what the side leaves on disk goes with it
    ):
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": scratch},
        )
        try:
            made = Worker(process, errors)
            made._answer()
            yield made
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


def serve(row: str, side: str, precision: str, sizes: Any, *, trial: bool) -> None:
    """The worker's own end: a step on every line that it reads, answered by its seconds, value and peak memory."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed is no answer
    import time

    from benchmarks.rows import ROWS
    from benchmarks.steps import peak_gigabytes

    found = next(r for r in ROWS if r.name == row)
    step = found.sides[side](found.prompts(sizes, trial=trial), sizes, precision)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    answer(ready=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        returned = step()
        answer(seconds=time.perf_counter() - start, returned=returned, peak=peak_gigabytes())

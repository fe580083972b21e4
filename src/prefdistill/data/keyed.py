"""Numbers under keys: scalars in memory, vectors in a file without a name once they are many."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

import numpy as np

IN_MEMORY = 2**28  # bytes of vectors before they go to the disk


class Keyed(Mapping[str, np.ndarray]):
    """key -> a float64, or a vector of them; vectors are kept in float32.

    All values have one width. The file lies where temporary files do ($TMPDIR) and goes with the process.
    """

    def __init__(self) -> None:
        self._row: dict[str, int] = {}
        self._scalars = array("d")
        self._vectors: IO[bytes] | None = None
        self._width = 0
        self._written = 0

    def put(self, keys: Sequence[str], values: np.ndarray) -> None:
        """Values [n] or [n, width] of new or known keys."""
        if values.ndim == 1:
            first = len(self._scalars)
            self._scalars.frombytes(np.ascontiguousarray(values, dtype=np.float64).tobytes())
        else:
            if self._vectors is None:
                self._vectors, self._width = tempfile.SpooledTemporaryFile(IN_MEMORY), values.shape[1]  # noqa: SIM115
            first = self._written
            self._vectors.seek(0, 2)
            self._vectors.write(np.ascontiguousarray(values, dtype=np.float32).tobytes())
            self._written += len(values)
        self._row.update(zip(keys, range(first, first + len(values)), strict=True))

    def __getitem__(self, key: str) -> np.ndarray:
        row = self._row[key]
        if self._vectors is None:
            return np.array(self._scalars[row])
        self._vectors.seek(4 * self._width * row)
        return np.frombuffer(self._vectors.read(4 * self._width), dtype=np.float32).astype(np.float64)

    def __contains__(self, key: object) -> bool:
        return key in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

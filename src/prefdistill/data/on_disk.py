"""Sequences that lie in a Parquet file: a row group at a time is in memory, however many there are."""

from __future__ import annotations

import bisect
import contextlib
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, overload

import pyarrow as pa
import pyarrow.parquet as pq

T = TypeVar("T")
U = TypeVar("U")
ROWS = 128  # of a row group: what one access reads
GROUPS_KEPT = 8
IN_MEMORY = 2**26  # bytes of a spool before it goes to the disk


class View(Sequence[U], Generic[T, U]):
    """What `make` makes of the items of another sequence, or of those at `indices`, anew at every access."""

    def __init__(self, of: Sequence[T], make: Callable[[T], U], indices: Sequence[int] | None = None) -> None:
        self.of, self.make, self.indices = of, make, indices

    def __len__(self) -> int:
        return len(self.of if self.indices is None else self.indices)

    @overload
    def __getitem__(self, i: int) -> U: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[U]: ...
    def __getitem__(self, i: int | slice) -> U | Sequence[U]:
        if isinstance(i, slice):
            chosen = range(len(self.of)) if self.indices is None else self.indices
            return View(self.of, self.make, chosen[i])
        return self.make(self.of[i if self.indices is None else self.indices[i]])

    def __iter__(self) -> Iterator[U]:
        if self.indices is None:
            yield from map(self.make, self.of)  # in order, which is read faster than here and there
        else:
            for i in self.indices:
                yield self.make(self.of[i])


class Rows(Sequence[dict[str, Any]]):
    """The rows of a Parquet file, each read when it is asked for.

    Args:
        file: a path, or an open file that nobody else reads from.
    """

    def __init__(self, file: Path | IO[bytes]) -> None:
        self._file = pq.ParquetFile(file)
        meta = self._file.metadata
        counts = (meta.row_group(g).num_rows for g in range(meta.num_row_groups))
        self._starts = list(accumulate(counts, initial=0))
        self._recent: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[dict[str, Any]]: ...
    def __getitem__(self, i: int | slice) -> dict[str, Any] | Sequence[dict[str, Any]]:
        if isinstance(i, slice):
            return View(self, lambda row: row, range(len(self))[i])
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        i %= len(self)
        group = bisect.bisect_right(self._starts, i) - 1
        row: dict[str, Any] = self._group(group).slice(i - self._starts[group], 1).to_pylist()[0]
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for group in range(len(self._starts) - 1):
            yield from self._file.read_row_group(group).to_pylist()

    def column(self, name: str) -> list[Any]:
        """A column of all rows."""
        return [value for batch in self._file.iter_batches(columns=[name]) for value in batch.column(0).to_pylist()]

    def _group(self, group: int) -> pa.Table:
        if group not in self._recent:
            while len(self._recent) >= GROUPS_KEPT:
                self._recent.popitem(last=False)
            self._recent[group] = self._file.read_row_group(group)
        self._recent.move_to_end(group)
        return self._recent[group]


class RowsWriter:
    """Writes rows to Parquet as they come.

    Args:
        file: a path, or a file open for writing, which stays open.
    """

    def __init__(self, file: Path | IO[bytes], schema: pa.Schema) -> None:
        self._schema = schema
        self._writer = pq.ParquetWriter(file, schema, compression="zstd")
        self._waiting: list[Mapping[str, Any]] = []
        self.count = 0

    def add(self, row: Mapping[str, Any]) -> int:
        """Adds a row; returns its number."""
        self._waiting.append(row)
        self.count += 1
        if len(self._waiting) == ROWS:
            self._write()
        return self.count - 1

    def _write(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._waiting, self._schema))
        self._waiting = []

    def close(self) -> None:
        if self._waiting:
            self._write()
        self._writer.close()


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """A Parquet file of rows, which are taken one after the other."""
    with contextlib.closing(RowsWriter(file, schema)) as writer:
        for row in rows:
            writer.add(row)


class Spool:
    """Rows that are kept for this process only: in memory while they are few, else in a file without a name.

    The file lies where temporary files do ($TMPDIR) and goes with the process, however it ends.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115  (it lives with the rows)
        self._writer = RowsWriter(self._file, schema)
        self.add = self._writer.add

    def rows(self) -> Rows:
        """All that was added; nothing can be added after it."""
        self._writer.close()
        self._file.seek(0)
        return Rows(self._file)

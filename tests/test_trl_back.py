"""And back: our columns and our policy in TRL's trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from prefdistill import pipeline
from test_formats import assistant, pair_row, user
from test_trl_data import CHATS
from tiny_models import tiny
from tiny_runs import rows as plain_rows
from tiny_runs import small, write_rows


class WithColumns(DPOTrainer):
    """As docs/files.md tells: TRL 1.16 by itself would compute ids and columns again (trl 3985)."""

    def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset


class TokensOfTRL(WithColumns):
    """Our columns beside the ids that TRL makes of the rows' text."""

    _prepare_dataset = DPOTrainer._prepare_dataset


def trainer_on(kind: Any, scored: Dataset, model: Path, folder: Path, **options: Any) -> Any:
    args = DPOConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_length=None, **options
    )
    return kind(model=str(model), args=args, train_dataset=scored)


def test_our_columns_and_our_policy_in_trls_trainer(data, model_folder, tmp_path):
    """scored.parquet as it is: TRL trains on its reference log-probs without a reference, and finds the same itself.

    The policy's folder is the model of such a trainer, its tokenizer too, and it trains there.
    """
    out = tmp_path / "run"
    pipeline.run(small(data, model_folder, out, methods="[d-dpo]"), until="distill")
    scored = Dataset.from_parquet(str(out / "data" / "scored.parquet"), cache_dir=str(tmp_path / "cache"))
    ours = trainer_on(WithColumns, scored, model_folder, tmp_path / "a", precompute_ref_log_probs=True)
    assert ours.ref_model is None
    batch = ours.data_collator([ours.train_dataset[i] for i in range(len(scored))])
    assert batch["ref_chosen_logps"].tolist() == pytest.approx(list(scored["ref_chosen_logps"]))
    found = ours.compute_ref_log_probs(ours.model.eval(), batch)
    for side, logps in zip(("chosen", "rejected"), found, strict=True):
        assert logps.tolist() == pytest.approx(list(scored[f"ref_{side}_logps"]), rel=1e-4)
    with torch.no_grad():  # the policy is the reference before its first step
        assert ours.compute_loss(ours.model, batch).item() == pytest.approx(math.log(2), abs=1e-5)
    trained = trainer_on(
        WithColumns,
        scored,
        out / "policy" / "d-dpo",
        tmp_path / "b",
        precompute_ref_log_probs=True,
        max_steps=2,
        learning_rate=1e-3,
    )
    before = [p.detach().clone() for p in trained.model.parameters()]
    trained.train()
    assert any(not old.equal(new) for old, new in zip(before, trained.model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "phi3"])
def test_columns_of_chats_are_those_of_our_ids(name, tmp_path):
    """TRL's own columns hold what a template writes behind the end token as well; on our ids they are ours."""
    writes_on = name in ("chatml", "gemma")  # a line break
    tokenizer = CHATS[name]()
    model, out = tmp_path / "model", tmp_path / "run"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tiny("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = [
        pair_row(prompt=[user(r["prompt"])], chosen=[assistant(r["chosen"])], rejected=[assistant(r["rejected"])])
        for r in plain_rows()
    ]
    write_rows(tmp_path / "chats.jsonl", rows)
    config = small(tmp_path / "chats.jsonl", model, out, methods="[d-dpo]", **{"reward.members": 1})
    pipeline.run(config, until="score")
    scored = Dataset.from_parquet(str(out / "data" / "scored.parquet"), cache_dir=str(tmp_path / "cache"))

    ours = trainer_on(WithColumns, scored, model, tmp_path / "a", precompute_ref_log_probs=True)
    trls = trainer_on(TokensOfTRL, scored, model, tmp_path / "b", precompute_ref_log_probs=True)
    ours.model.eval(), trls.model.eval()
    batch, own = (t.data_collator([t.train_dataset[i] for i in range(len(scored))]) for t in (ours, trls))
    for side, found, of_trl in zip(
        ("chosen", "rejected"),
        ours.compute_ref_log_probs(ours.model, batch),
        trls.compute_ref_log_probs(trls.model, own),
        strict=True,
    ):
        column = torch.tensor(scored[f"ref_{side}_logps"][:])
        torch.testing.assert_close(found, column, rtol=1e-4, atol=1e-4, check_dtype=False)
        # What TRL's column holds besides is the log-prob of the tokens behind our end, and nothing else.
        behind = []
        for row, of_trls in zip(scored, trls.train_dataset, strict=True):
            prompt, ids = of_trls["prompt_ids"], of_trls[f"{side}_ids"]
            assert prompt == row["prompt_ids"]
            assert ids[: len(row[f"{side}_ids"])] == row[f"{side}_ids"]
            whole = torch.tensor([prompt + ids])
            with torch.no_grad():
                logps = trls.model(whole).logits[:, :-1].log_softmax(-1).gather(-1, whole[:, 1:, None])[0, :, 0]
            behind.append(float(logps[len(prompt) + len(row[f"{side}_ids"]) - 1 :].sum()))
        torch.testing.assert_close(of_trl, column + torch.tensor(behind), rtol=1e-4, atol=1e-4, check_dtype=False)
        assert (min(map(abs, behind)) > 0.1) == writes_on
    with torch.no_grad():  # a first loss of log 2: no margin before the first step
        assert ours.compute_loss(ours.model, batch).item() == pytest.approx(math.log(2), abs=1e-5)
        first = trls.compute_loss(trls.model, own).item()
    assert (first != pytest.approx(math.log(2), abs=1e-5)) == writes_on

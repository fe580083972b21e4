"""Makes the embedded default: preference pairs over docstrings of the standard library, and the policy they start from.

    python scripts/make_embedded.py --output src/prefdistill/embedded

1. The docstrings of this Python (PSF licence) are split, by a seeded shuffle, into demonstrations and prompts.
2. SmolLM2-135M-Instruct is tuned on the demonstrations (LoRA): pi_ref, written as `adapter/`.
3. pi_ref draws several responses for every prompt at temperature 1.
4. `prefdistill.embedded.oracle` scores them; every pair of a prompt's distinct responses gets a label drawn from
   Bradley-Terry, P(first preferred) = sigmoid(scale * (score_1 - score_2)).

Every step is seeded; the Parquet file's metadata holds versions, seeds and figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

from prefdistill.atomic import fresh_file, fresh_folder
from prefdistill.data.tokenise import Encoder
from prefdistill.data.tree import Tree
from prefdistill.embedded.corpus import collect_docstrings, prompt_messages
from prefdistill.embedded.oracle import score
from prefdistill.evaluation.sampling import SamplingOptions, sample
from prefdistill.models.loading import EMBEDDED_MODEL, add_lora, load_policy, load_tokenizer
from prefdistill.models.precision import choose_precision
from prefdistill.training.sft import SFTTrainer

SPLITS = ("train", "validation", "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("src/prefdistill/embedded"))
    parser.add_argument("--work", type=Path, default=Path("runs/make-embedded"))
    parser.add_argument("--demonstrations", type=int, default=300)
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--responses", type=int, default=5, help="drawn for each prompt")
    parser.add_argument("--scale", type=float, default=1.5, help="log-odds of a label a point of the oracle")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.time()

    docstrings = collect_docstrings()
    random.Random(args.seed).shuffle(docstrings)
    demonstrations, prompts = docstrings[: args.demonstrations], docstrings[args.demonstrations :]
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    encoder = Encoder(tokenizer, max_prompt_tokens=256, max_response_tokens=64)
    print(f"{len(docstrings)} docstrings: {len(demonstrations)} demonstrations, {len(prompts)} prompts", flush=True)

    model = load_policy(EMBEDDED_MODEL)
    precision = choose_precision("auto", model.config)
    transformers.set_seed(args.seed)
    policy = add_lora(model, rank=args.rank, task="CAUSAL_LM")
    trees = []
    for d in demonstrations:
        messages = prompt_messages(d)
        response = encoder.response_ids(messages, d.summary)
        assert response is not None, d.name
        trees.append(Tree(encoder.prompt_ids(messages).ids, (response,)))
    trainer = SFTTrainer(
        policy,
        transformers.TrainingArguments(
            output_dir=str(args.work),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=8,
            learning_rate=args.learning_rate,
            warmup_steps=5,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            seed=args.seed,
            use_cpu=not torch.cuda.is_available(),
            bf16=precision == "bfloat16",
        ),
        trees=trees,
    )
    trainer.train()
    policy.to(torch.float32)
    with fresh_folder(args.output / "adapter") as folder:
        # bfloat16 halves the file; what is drawn below is drawn from the rounded adapter.
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
        policy.peft_config["default"].base_model_name_or_path = EMBEDDED_MODEL
        policy.peft_config["default"].inference_mode = True
        policy.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
    for parameter in policy.parameters():
        parameter.data = parameter.data.float()
    reference = policy.merge_and_unload()
    print(f"pi_ref after {time.time() - began:.0f} s", flush=True)

    ids = [encoder.prompt_ids(prompt_messages(d)).ids for d in prompts]
    done = 0

    def progress(n: int) -> None:
        nonlocal done
        done += n
        print(f"sampled {done}/{len(ids)} prompts, {time.time() - began:.0f} s", flush=True)

    drawn = sample(
        reference,
        ids,
        n=args.responses,
        end_ids=encoder.end_ids,
        options=SamplingOptions(max_new_tokens=48, temperature=1.0, seed=args.seed),
        precision=precision,
        progress=progress,
    )

    rng = np.random.default_rng(args.seed)
    rows, scores, agree, lengths, unfinished = [], [], [], [], 0
    places = [*["validation"] * args.validation, *["test"] * args.test]
    places = ["train"] * (len(prompts) - len(places)) + places
    for d, place, responses in zip(prompts, places, drawn, strict=True):
        unfinished += sum(not s.finished for s in responses)
        texts = dict.fromkeys(encoder.decode_response(s.ids).strip() for s in responses if s.finished)
        texts.pop("", None)
        valued = [(t, score(t, d.summary)) for t in texts]
        scores += [v for _, v in valued]
        lengths += [len(t) / len(d.summary) for t, _ in valued]
        for (first, a), (second, b) in itertools.combinations(valued, 2):
            preferred = rng.random() < 1 / (1 + np.exp(-args.scale * (a - b)))
            agree.append(float(preferred == (a > b)) if a != b else 0.5)
            chosen, rejected = (first, second) if preferred else (second, first)
            rows.append(
                {
                    "prompt": prompt_messages(d),
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                    "human": d.summary,
                    "name": d.name,
                    "split": place,
                }
            )
    # Two docstrings can be clipped to one prompt; the first keeps it, or it would stand in two splits.
    owner: dict[str, str] = {}
    for row in rows:
        owner.setdefault(json.dumps(row["prompt"]), row["name"])
    rows = [row for row in rows if owner[json.dumps(row["prompt"])] == row["name"]]
    provenance = {
        "text": f"docstrings of the standard library of Python {platform.python_version()}, PSF License Agreement",
        "responses": f"drawn from {EMBEDDED_MODEL} (Apache-2.0) with the adapter beside this file, temperature 1",
        "labels": f"Bradley-Terry, log-odds {args.scale} a point of prefdistill.embedded.oracle.score",
        "command": " ".join(["python", "scripts/make_embedded.py", *sys.argv[1:]]),
        "seed": args.seed,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "prompts": len(owner),
        "pairs": len(rows),
        "labels_agree_with_oracle": round(statistics.mean(agree), 4),
        "oracle_mean": round(statistics.mean(scores), 3),
        "oracle_sd": round(statistics.stdev(scores), 3),
        "length_ratio_median": round(statistics.median(lengths), 3),
        "unfinished": unfinished,
    }
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"provenance": json.dumps(provenance)})
    with fresh_file(args.output / "docstring_pairs.parquet") as part:
        pq.write_table(table, part, compression="zstd", compression_level=19)
    print(json.dumps(provenance, indent=2))
    print(f"{(args.output / 'docstring_pairs.parquet').stat().st_size} bytes, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()

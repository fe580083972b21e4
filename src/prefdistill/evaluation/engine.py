"""vLLM as the sampler: an engine on a policy's folder that draws what `sampling.sample` would, token ids in and out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from prefdistill.errors import ConfigError, DataError
from prefdistill.evaluation.sampling import Sample, SamplingOptions
from prefdistill.models.allocator import give_back_memory

REQUESTS_AT_ONCE = 1024  # handed to the engine, which batches them itself; what was drawn is kept after as many
MEMORY_SHARE = 0.9  # of what is free on the GPU when the engine starts
TEMPERATURES = (0.01, 2.0)  # vLLM raises what is below (but for 0) and refuses what is above


def check_vllm(option: str, temperatures: Sequence[float] = ()) -> None:
    """Whether vLLM can sample here.

    Raises:
        ConfigError: it is not installed, or a temperature is one that it does not sample at.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"{option} is vllm, and the package vllm is not installed; run 'pip install prefdistill[vllm]' (it needs "
            f"Linux and a GPU), or set {option}: own"
        )
    low, high = TEMPERATURES
    for t in temperatures:
        if t != 0 and not low <= t <= high:
            raise ConfigError(f"vLLM samples at temperature 0 or from {low} to {high}, not at {t}; set {option}: own")


class VLLMEngine:
    """Samples from a policy by vLLM; a context whose end shuts the engine down and gives its memory back.

    vLLM is started at the first prompt that has to be sampled.

    Args:
        folder: a folder or hub id in Hugging Face's format, no adapter.
        precision: float32, or bfloat16, in which vLLM rounds the weights too.
        arguments: more arguments of vllm.LLM, or others than those chosen here.
        trust_remote_code: let a hub model run its own code.
    """

    def __init__(
        self,
        folder: str,
        *,
        precision: str = "float32",
        arguments: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.folder = folder
        self.precision = precision
        self.arguments = dict(arguments or {})
        self.trust_remote_code = trust_remote_code
        self._llm: Any = None
        self._length = 0

    def __enter__(self) -> VLLMEngine:
        return self

    def __exit__(self, *raised: object) -> None:
        self.shut_down()

    def shut_down(self) -> None:
        """Ends vLLM's process and frees its memory; the next prompt would start it again."""
        if self._llm is None:
            return
        # LLM has no method of its own for it, and a deleted one keeps its GPU until Python collects it.
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        give_back_memory()

    def sample(
        self,
        prompts: Sequence[tuple[int, ...]],
        *,
        n: int,
        end_ids: Sequence[int],
        options: SamplingOptions,
        keys: Sequence[int] | None = None,
        progress: Callable[[int], None] = lambda done: None,
        known: Mapping[int, list[Sample]] | None = None,
        keep: Callable[[dict[int, list[Sample]]], None] = lambda drawn: None,
    ) -> list[list[Sample]]:
        """`n` samples for each prompt, in the prompts' order; see `sampling.sample` for the arguments.

        Every sample is a request with a seed of its own, made from (seed, key, sample). So far as vLLM's sums do not
        hang on the batch, what is drawn does not either; other samples than those of `sampling.sample`, of the same
        distribution.

        Raises:
            ConfigError: vLLM cannot be started, on this model or with an argument in `sample.engine_arguments`.
            DataError: vLLM gave something else than one response for a request, or ended one for an unknown reason.
        """
        known = known or {}
        keys = range(len(prompts)) if keys is None else keys
        out: list[list[Sample]] = [[] for _ in prompts]
        longest = max((len(p) for p in prompts), default=0) + options.max_new_tokens
        size = max(1, REQUESTS_AT_ONCE // n)
        for start in range(0, len(prompts), size):
            rows = range(start, min(start + size, len(prompts)))
            if all(i in known for i in rows):
                for i in rows:
                    out[i] = known[i]
            else:
                requests = [(prompts[i], _seed(options.seed, keys[i], s)) for i in rows for s in range(n)]
                drawn = self._draw(requests, longest, end_ids, options)
                for j, i in enumerate(rows):
                    out[i] = drawn[j * n : (j + 1) * n]
                keep({i: out[i] for i in rows})
            progress(len(rows))
        return out

    def _draw(
        self,
        requests: Sequence[tuple[tuple[int, ...], int]],
        longest: int,
        end_ids: Sequence[int],
        options: SamplingOptions,
    ) -> list[Sample]:
        import vllm

        llm = self._started(longest)
        parameters = [
            vllm.SamplingParams(
                n=1,
                seed=seed,
                max_tokens=options.max_new_tokens,
                temperature=options.temperature,
                top_p=options.top_p,
                stop_token_ids=list(end_ids),
                # The ends are ours: those that the model's own files name may differ.
                ignore_eos=True,
                detokenize=False,
            )
            for _, seed in requests
        ]
        texts = [vllm.TokensPrompt(prompt_token_ids=list(ids)) for ids, _ in requests]
        answers = llm.generate(texts, parameters, use_tqdm=False)
        ends = set(end_ids)
        if len(answers) != len(requests) or any(len(a.outputs) != 1 for a in answers):
            raise DataError(f"vLLM gave {len(answers)} answers to {len(requests)} prompts, not one response for each")
        return [_sample_of(a.outputs[0], ends, options.max_new_tokens) for a in answers]

    def _started(self, longest: int) -> Any:
        """The engine, started where there is none or only one for shorter sequences."""
        given = self.arguments.get("max_model_len")
        if isinstance(given, int) and 0 < given < longest:
            raise ConfigError(
                f"sample.engine_arguments has max_model_len {given}, and prompts with their responses take up to "
                f"{longest} tokens; leave it out"
            )
        if self._llm is not None and (given is not None or self._length >= longest):
            return self._llm
        self.shut_down()
        import vllm

        arguments = {
            "model": self.folder,
            "skip_tokenizer_init": True,
            "trust_remote_code": self.trust_remote_code,
            "dtype": self.precision,
            "max_model_len": longest,
            "seed": 0,
            **({} if "gpu_memory_utilization" in self.arguments else _memory()),
            **self.arguments,
        }
        try:
            self._llm = vllm.LLM(**arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"vLLM cannot be started on {self.folder} ({str(error).strip()}); look at sample.engine_arguments "
                f"({self.arguments or 'none'}), or set sample.engine: own"
            ) from error
        self._length = longest
        return self._llm


def _memory() -> dict[str, float]:
    """vLLM takes a share of the whole GPU, and fails where less is free: what this process holds is left out."""
    if not torch.cuda.is_available():
        return {}
    give_back_memory()
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": round(MEMORY_SHARE * free / total, 3)}


def _seed(*parts: int) -> int:
    """A seed of 63 bits that no other sample of a run has."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _sample_of(output: Any, ends: set[int], bound: int) -> Sample:
    """vLLM's response with its end token; finished where it stopped at one.

    Raises:
        DataError: the finish reason and the ids do not agree.
    """
    ids, reason = tuple(int(t) for t in output.token_ids), output.finish_reason
    finished = reason == "stop"
    agree = bool(ids) and ids[-1] in ends if finished else reason == "length" and len(ids) == bound
    if not agree:
        raise DataError(
            f"vLLM ended a response of {len(ids)} tokens (at most {bound}) with the reason {reason!r} at token "
            f"{ids[-1] if ids else None}; its end tokens are {sorted(ends)}. Set sample.engine: own"
        )
    return Sample(ids, finished)

"""DPO and IPO against TRL 1.16's own `DPOTrainer._compute_loss`, on the same log-probs.

TRL has no free function for these losses: they live inside the trainer. So a real `DPOTrainer` is built, around two
random Llamas of one layer and a word-level tokenizer made here (nothing is downloaded), and driven in two ways:

* whole: policy and reference are the models, the batch comes from TRL's tokenising and collator; our log-probs come
  from plain forwards of the same weights, one unpadded sequence at a time. Losses and parameter gradients must agree.
* known: the policy is a stand-in that returns chosen token log-probs, and the reference log-probs ride in the batch as
  TRL's precomputed columns. Any margin can be set, in float64, and the gradients of the log-probs compared.

TRL 1.16's "sigmoid" ignores `label_smoothing` (pinned below). Its own code of the smoothed loss survives in "aot" and
"aot_unpaired", which sort margins over the batch before applying it: for a batch of one pair that is cDPO exactly. For
larger batches cDPO is checked as the mixture of TRL's plain loss of the pairs and of the pairs exchanged.
"""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from prefdistill.losses import dpo, implicit_margin, ipo, robust_dpo

PAIRS = [
    {"prompt": "w1 w2 w3", "chosen": " w4 w5", "rejected": " w6 w7 w8 w9"},
    {"prompt": "w9", "chosen": " w1 w2 w3 w2 w11", "rejected": " w6"},
    {"prompt": "w7 w20", "chosen": " w13", "rejected": " w13 w14"},
]


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,  # far from uniform, so that margins are of several nats
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(29)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


class Bench:
    """A real trainer, and copies of its two models as they were before TRL touched them."""

    def __init__(self, folder: str) -> None:
        policy, reference = tiny_llama(0), tiny_llama(1)
        self.policy, self.reference = copy.deepcopy(policy), copy.deepcopy(reference)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer = DPOTrainer(
                model=policy,
                ref_model=reference,
                args=DPOConfig(folder, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True),
                train_dataset=Dataset.from_list(PAIRS),
                processing_class=word_tokenizer(),
            )
        self.examples = [self.trainer.train_dataset[i] for i in range(len(PAIRS))]

    def set(self, loss_type: str, beta: float, label_smoothing: float) -> None:
        self.trainer.loss_types, self.trainer.loss_weights = [loss_type], [1.0]
        self.trainer.beta, self.trainer.label_smoothing = beta, label_smoothing

    def trl_whole(self, examples: list[dict[str, Any]]) -> Tensor:
        self.trainer.precompute_ref_logps = False
        return self.trainer._compute_loss(self.trainer.model, self.trainer.data_collator(examples), False)

    def our_margin(self, examples: list[dict[str, Any]], average: bool) -> Tensor:
        def logps(model: nn.Module, side: str) -> Tensor:
            rows = []
            for example in examples:
                prompt, response = example["prompt_ids"], example[side]
                logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
                tokens = logits.log_softmax(-1)[range(len(response)), response]
                rows.append(tokens.mean() if average else tokens.sum())
            return torch.stack(rows)

        with torch.no_grad():
            reference = [logps(self.reference, side) for side in ("chosen_ids", "rejected_ids")]
        return implicit_margin(*(logps(self.policy, side) for side in ("chosen_ids", "rejected_ids")), *reference)

    def trl_known(self, policy: list[Tensor], reference: list[Tensor], lengths: list[list[int]]) -> Tensor:
        """TRL's loss where the responses have these summed log-probs and lengths; index 0 chosen, 1 rejected.

        A sum is spread evenly over its response's tokens. Prompts have one token.
        """
        counts = torch.tensor(lengths[0] + lengths[1])
        width = int(counts.max())
        position = torch.arange(width + 1)
        completion_mask = ((position >= 1) & (position <= counts[:, None])).long()
        token_logps = torch.cat(policy)[:, None] / counts[:, None] * completion_mask[:, 1:]
        rows = len(counts)

        def stand_in(**inputs: Any) -> SimpleNamespace:
            assert inputs["fused_lm_head"]
            blank = torch.zeros(rows, width)
            return SimpleNamespace(log_probs=token_logps, entropy=blank, mean_logits=blank, is_top1=blank.bool())

        self.trainer.precompute_ref_logps = True
        batch = {
            "input_ids": torch.full((rows, width + 1), 5),
            "attention_mask": (position <= counts[:, None]).long(),
            "completion_mask": completion_mask,
            "ref_chosen_logps": reference[0],
            "ref_rejected_logps": reference[1],
        }
        return self.trainer._compute_loss(stand_in, batch, False)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(str(tmp_path_factory.mktemp("trl")))


# TRL's loss_type and label_smoothing, ours; "aot" is right for batches of one pair only (see above)
PLAIN = [
    pytest.param("sigmoid", 0.0, lambda h, b: dpo(h, beta=b), id="dpo"),
    pytest.param("ipo", 0.0, lambda h, b: ipo(h, tau=b), id="ipo"),
    pytest.param("robust", 0.0, lambda h, b: robust_dpo(h, beta=b, label_smoothing=0.0), id="robust-0"),
    pytest.param("robust", 0.1, lambda h, b: robust_dpo(h, beta=b, label_smoothing=0.1), id="robust-0.1"),
    pytest.param("robust", 0.4, lambda h, b: robust_dpo(h, beta=b, label_smoothing=0.4), id="robust-0.4"),
]
SMOOTHED = [
    pytest.param(loss_type, e, lambda h, b, e=e: dpo(h, beta=b, label_smoothing=e), id=f"cdpo-{e}-{loss_type}")
    for loss_type in ("aot", "aot_unpaired")
    for e in (0.1, 0.4)
]
BETAS = pytest.mark.parametrize("beta", [0.05, 0.5])


def test_this_is_the_trl_that_was_read():
    assert trl.__version__ == "1.16.0"


@BETAS
@pytest.mark.parametrize(("loss_type", "smoothing", "ours"), PLAIN + SMOOTHED)
def test_each_pair_of_real_models(bench, loss_type, smoothing, ours, beta):
    bench.set(loss_type, beta, smoothing)
    for example in bench.examples:
        h = bench.our_margin([example], average=loss_type == "ipo")
        assert h.abs().item() > 0.1  # not a comparison of nothing
        torch.testing.assert_close(ours(h, beta).mean(), bench.trl_whole([example]), rtol=1e-4, atol=1e-5)


@BETAS
@pytest.mark.parametrize(("loss_type", "smoothing", "ours"), PLAIN)
def test_a_padded_batch_and_its_gradients(bench, loss_type, smoothing, ours, beta):
    bench.set(loss_type, beta, smoothing)
    theirs = bench.trl_whole(bench.examples)
    mine = ours(bench.our_margin(bench.examples, average=loss_type == "ipo"), beta).mean()
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    names, parameters = zip(*bench.policy.named_parameters(), strict=True)
    assert names == tuple(name for name, _ in bench.trainer.model.named_parameters())
    our_grads = torch.autograd.grad(mine, parameters)
    their_grads = torch.autograd.grad(theirs, list(bench.trainer.model.parameters()))
    assert sum(grad.abs().sum() for grad in our_grads) > 0.1
    for name, a, b in zip(names, our_grads, their_grads, strict=True):
        scale = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=lambda m, n=name: f"{n}: {m}")


MARGINS = [0.0, 1e-6, 0.3, -0.3, 12.0, -12.0, 300.0, -300.0, 1e4, -1e4]


def known(h: float | list[float]) -> tuple[list[Tensor], list[Tensor], list[list[int]]]:
    """Log-probs of margin h: policy (with gradient), reference, lengths."""
    h = torch.tensor(h, dtype=torch.float64).reshape(-1)
    n = len(h)
    reference = [torch.linspace(-90.0, -70.0, n).double(), torch.linspace(-20.0, -40.0, n).double()]
    policy = [(reference[0] + h - 3.0).requires_grad_(), (reference[1] - 3.0).requires_grad_()]
    return policy, reference, [[7 + i for i in range(n)], [4 + 2 * i for i in range(n)]]


def our_known(loss, policy, reference, lengths, average):
    if average:
        counts = [torch.tensor(side) for side in lengths]
        policy = [x / n for x, n in zip(policy, counts, strict=True)]
        reference = [x / n for x, n in zip(reference, counts, strict=True)]
    return loss(implicit_margin(*policy, *reference))


@BETAS
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize(("loss_type", "smoothing", "ours"), PLAIN + SMOOTHED)
def test_known_margins_and_their_gradients(bench, loss_type, smoothing, ours, margin, beta):
    bench.set(loss_type, beta, smoothing)
    policy, reference, lengths = known(margin)
    theirs = bench.trl_known(policy, reference, lengths)
    mine = our_known(lambda h: ours(h, beta), policy, reference, lengths, loss_type == "ipo")
    assert mine.shape == (1,)
    torch.testing.assert_close(mine[0], theirs, rtol=1e-11, atol=1e-12)
    for a, b in zip(torch.autograd.grad(mine[0], policy), torch.autograd.grad(theirs, policy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@BETAS
@pytest.mark.parametrize(("loss_type", "smoothing", "ours"), PLAIN)
def test_a_batch_of_known_margins(bench, loss_type, smoothing, ours, beta):
    bench.set(loss_type, beta, smoothing)
    policy, reference, lengths = known(MARGINS)
    theirs = bench.trl_known(policy, reference, lengths)
    mine = our_known(lambda h: ours(h, beta), policy, reference, lengths, loss_type == "ipo").mean()
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)
    for a, b in zip(torch.autograd.grad(mine, policy), torch.autograd.grad(theirs, policy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@BETAS
@pytest.mark.parametrize("e", [0.1, 0.4])
def test_smoothed_batch_is_the_mixture_of_both_labels(bench, e, beta):
    bench.set("sigmoid", beta, 0.0)
    policy, reference, lengths = known(MARGINS)
    right = bench.trl_known(policy, reference, lengths)
    wrong = bench.trl_known(policy[::-1], reference[::-1], lengths[::-1])
    mine = dpo(implicit_margin(*policy, *reference), beta=beta, label_smoothing=e).mean()
    torch.testing.assert_close(mine, (1 - e) * right + e * wrong, rtol=1e-11, atol=1e-12)


def test_trl_sigmoid_ignores_label_smoothing(bench):
    """Why cDPO is compared with "aot": should TRL smooth its "sigmoid" again, this fails and says so."""
    arguments = known(2.0)
    bench.set("sigmoid", 0.5, 0.0)
    plain = bench.trl_known(*arguments)
    bench.set("sigmoid", 0.5, 0.3)
    assert torch.equal(bench.trl_known(*arguments), plain)


def test_trl_ipo_is_not_the_papers(bench):
    """TRL's IPO averages over tokens; on summed log-probs, as in the paper, the loss is another one."""
    policy, reference, lengths = known(2.0)
    bench.set("ipo", 0.5, 0.0)
    theirs = bench.trl_known(policy, reference, lengths)
    summed = ipo(implicit_margin(*policy, *reference), tau=0.5)[0]
    assert (summed - theirs).abs() > 0.1

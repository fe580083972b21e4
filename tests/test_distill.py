"""Policy training against float64 by hand on plain transformers log-probs."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import warnings

import numpy as np
import pytest
import torch
from scipy import optimize, special

import plain
from prefdistill.data.tree import Tree
from prefdistill.errors import ConfigError, DataError
from prefdistill.models.loading import add_lora
from prefdistill.training.distill import DistillConfig, DistillExample, DistillTrainer
from prefdistill.training.methods import METHODS, LossOptions, pair_losses
from prefdistill.training.pessimism import mixture_of, promises
from prefdistill.training.reward import RewardExample
from tiny_models import QUIET, first_step, tiny

TREES = [
    Tree((5, 6, 7), ((20, 21, 2), (22, 2), (23, 24, 25, 2), (26, 27))),
    Tree((8, 9), ((30, 2), (31, 32, 2))),
    Tree((10,), ((40, 41, 42, 2), (43, 2), (44, 45, 2))),
]
PAIRS = [((0, 1), (2, 0)), ((1, 0),), ((2, 1),)]
SAMPLES = [(2, 3), (), (0,)]
MEMBERS = 3
NEEDS_REWARDS = [name for name, method in METHODS.items() if method.needs_rewards]


def config(folder, method: str, **options) -> DistillConfig:
    return DistillConfig(
        output_dir=str(folder), method=method, **{**QUIET, "per_device_train_batch_size": len(TREES), **options}
    )


def policy(**options):
    return tiny("llama", **{"num_hidden_layers": 2, **options})


def examples_near(model, seed: int = 0, **changes) -> list[DistillExample]:
    """Reference log-probs a few nats from the model's, so that no margin is 0; rewards at random."""
    rng = np.random.default_rng(seed)
    out = []
    for tree, pairs, samples in zip(TREES, PAIRS, SAMPLES, strict=True):
        n = len(tree.responses)
        with torch.no_grad():
            near = np.array([float(v) for v in plain.logps(plain.doubled(model), tree)]) + rng.normal(size=n) * 2
        rewards = tuple(map(tuple, rng.normal(size=(MEMBERS, n)).tolist()))
        fields = {"rewards": rewards, "pairs": pairs, "from_reference": samples, **changes}
        out.append(DistillExample(tree, tuple(near.tolist()), **fields))
    return out


# -- by hand -----------------------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def kl_of_coins(p, q):
    return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))


def by_hand(method: str, args: DistillConfig, examples, logps) -> dict[str, torch.Tensor]:
    """The loss and the metrics, pair for pair in float64 from the formulas of the paper; `logps` carry gradient."""
    b, e, eta, k = args.beta, args.label_smoothing, args.reward_scale, MEMBERS
    h, margins, levels, labelled, samples = [], [], [], [], []
    for x, logp in zip(examples, logps, strict=True):
        change = [p - r for p, r in zip(logp, x.reference_logps, strict=True)]
        levels += change
        wanted = list(itertools.combinations(range(len(logp)), 2)) if args.pairs == "all" else x.pairs
        for one, two in wanted:
            h.append(change[one] - change[two])
            margins.append([x.rewards[m][one] - x.rewards[m][two] for m in range(k)])
        labelled += [(change[c], change[r], logp[c], logp[r]) for c, r in x.pairs]
        samples += [-change[i] for i in x.from_reference]
    mean = [sum(m) / k for m in margins]
    squares = [[(m[j] - b * d) ** 2 for j in range(k)] for m, d in zip(margins, h, strict=True)]
    sums = [sum(s[j].item() for s in squares) for j in range(k)]
    picked = [
        sums.index(min(sums)) if args.pessimism == "batch" else min(range(k), key=lambda j, s=s: s[j].item())
        for s in squares
    ]
    log_loss = [torch.log(1 + torch.exp(-b * d)) for d in h]
    flipped = [torch.log(1 + torch.exp(b * d)) for d in h]
    per_pair = {
        "dpo": lambda: log_loss,
        "p-dpo": lambda: log_loss,
        "cdpo": lambda: [(1 - e) * x + e * y for x, y in zip(log_loss, flipped, strict=True)],
        "robust-dpo": lambda: [((1 - e) * x - e * y) / (1 - 2 * e) for x, y in zip(log_loss, flipped, strict=True)],
        "ipo": lambda: [(d - 1 / (2 * args.tau)) ** 2 for d in h],
        "d-dpo": lambda: [(m - b * d) ** 2 for m, d in zip(mean, h, strict=True)],
        "dp-dpo": lambda: [(m - b * d) ** 2 for m, d in zip(mean, h, strict=True)],
        "e-dpo": lambda: [s[j] for s, j in zip(squares, picked, strict=True)],
        "rpo-sq": lambda: [(b * d - eta * m) ** 2 for m, d in zip(mean, h, strict=True)],
        "rpo-bwd-kl": lambda: [
            kl_of_coins(sigmoid(torch.tensor(eta * m)), sigmoid(b * d)) for m, d in zip(mean, h, strict=True)
        ],
        "rpo-fwd-kl": lambda: [
            kl_of_coins(sigmoid(b * d), sigmoid(torch.tensor(eta * m))) for m, d in zip(mean, h, strict=True)
        ],
    }[method]()
    kl = sum(samples) / len(samples)
    scale = eta if method.startswith("rpo") else 1
    average = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        "loss": average(per_pair) + (args.kl_alpha * kl if method in ("p-dpo", "dp-dpo", "e-dpo") else 0),
        "rewards/chosen": average([b * c for c, _, _, _ in labelled]),
        "rewards/rejected": average([b * r for _, r, _, _ in labelled]),
        "rewards/margins": average([b * (c - r) for c, r, _, _ in labelled]),
        "rewards/accuracies": average([(c > r).double() for c, r, _, _ in labelled]),
        "logps/chosen": average([c for _, _, c, _ in labelled]),
        "logps/rejected": average([r for _, _, _, r in labelled]),
        "logps/chosen_change": average([c for c, _, _, _ in labelled]),
        "logps/level_change": average(levels),
        "kl/forward": kl,
        "distillation/error": average([(scale * m - b * d) ** 2 for m, d in zip(mean, h, strict=True)]) ** 0.5,
        **{f"ensemble/member_{j}": average([float(i == j) for i in picked]) for j in range(k) if method == "e-dpo"},
    }


CASES = [
    *((m, "labelled", "pair") for m in METHODS if m != "hull-dpo"),  # which has a test of its own
    *((m, "all", "pair") for m in NEEDS_REWARDS if m != "hull-dpo"),
    ("e-dpo", "labelled", "batch"),
    ("e-dpo", "all", "batch"),
]


@pytest.mark.parametrize(("method", "pairs", "over"), CASES)
def test_a_step_is_the_formula(method, pairs, over, tmp_path):
    """Loss, every metric, and the gradient in every weight."""
    model = policy()
    examples = examples_near(model)
    options = {"beta": 0.3, "tau": 0.2, "label_smoothing": 0.15, "reward_scale": 1.7, "kl_alpha": 0.05}
    args = config(tmp_path, method, max_steps=1, pairs=pairs, pessimism=over, **options)
    truth = plain.doubled(model)
    expected = by_hand(method, args, examples, [plain.logps(truth, t) for t in TREES])
    expected["loss"].backward()
    logged, grads = first_step(DistillTrainer(model, args, examples=examples))
    numbers = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in expected.items()}
    for name, number in numbers.items():
        assert logged[name] == pytest.approx(number, rel=2e-4, abs=2e-5), name
    assert {n for n in logged if "/" in n} == {n for n in numbers if "/" in n}
    assert max(float(g.norm()) for g in grads.values()) > 1e-2
    for name, p in truth.named_parameters():
        assert float((grads[name] - p.grad).norm()) <= 2e-3 * float(p.grad.norm()) + 1e-5, name


def weights_by_slsqp(examples, beta):
    """The mixture by a general solver, from the convex function as it is written."""

    def spelt_out(w):
        total = 0.0
        for e in examples:
            r = w @ np.array(e.rewards)[:, list(e.from_reference)]
            total += beta * (special.logsumexp(r / beta) - np.log(len(r))) - r.mean()
        return total / len(examples)

    found = optimize.minimize(
        spelt_out,
        np.full(MEMBERS, 1 / MEMBERS),
        bounds=[(0, 1)] * MEMBERS,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return found.x


@pytest.mark.parametrize(
    ("method", "pessimism"), [("hull-dpo", "pair"), ("e-dpo", "hull"), ("e-dpo", "hull-per-prompt")]
)
def test_hull_pessimism_distils_the_mixture(method, pessimism, tmp_path):
    """A step is dp-DPO's towards sum_k w_k r_k, with weights that another solver found."""
    model = policy()
    # Enough samples for the weights to be one point only; an example without any takes the mean.
    counts = (4, 0, 3)
    examples = [
        dataclasses.replace(e, from_reference=tuple(range(n)))
        for e, n in zip(examples_near(model), counts, strict=True)
    ]
    options = {"beta": 0.6, "kl_alpha": 0.05, "max_steps": 1}
    args = config(tmp_path, method, pessimism=pessimism, **options)
    trainer = DistillTrainer(model, args, examples=examples)
    sampled = [e for e in examples if e.from_reference]
    if pessimism == "hull-per-prompt":
        own = iter([weights_by_slsqp([e], 0.6) for e in sampled])
        mean = np.mean([weights_by_slsqp([e], 0.6) for e in sampled], axis=0)
        weights = [next(own) if e.from_reference else mean for e in examples]
    else:
        weights = [weights_by_slsqp(sampled, 0.6)] * len(examples)
        np.testing.assert_allclose(trainer.mixture.weights, weights[0], atol=1e-4)
        assert np.ptp(weights[0]) > 0.05
    by_slsqp = [
        dataclasses.replace(e, rewards=(tuple((w @ np.array(e.rewards)).tolist()),) * MEMBERS)
        for e, w in zip(examples, weights, strict=True)
    ]
    truth = plain.doubled(model)
    expected = by_hand("dp-dpo", args, by_slsqp, [plain.logps(truth, t) for t in TREES])
    logged, _ = first_step(trainer)
    for name in ("loss", "distillation/error", "kl/forward", "rewards/margins"):
        assert logged[name] == pytest.approx(float(torch.as_tensor(expected[name]).detach()), rel=1e-3, abs=1e-4), name
    assert not [n for n in logged if n.startswith("ensemble/")]


def test_hull_pessimism_needs_the_references_samples(tmp_path):
    model = policy()
    with pytest.raises(ConfigError, match="reference_per_prompt"):
        DistillTrainer(
            model, config(tmp_path, "hull-dpo", kl_alpha=0.0), examples=examples_near(model, from_reference=())
        )


def test_promises_are_exact_over_the_samples():
    """The mixture keeps its promise to the last digit, and no other policy promises more in the worst case."""
    examples = examples_near(policy())
    for per_prompt in (False, True):
        mixture = mixture_of(examples, beta=0.5, per_prompt=per_prompt)
        found = promises(examples, mixture, beta=0.5)
        worst = {name: p["worst_case"] for name, p in found["policies"].items()}
        assert sum(found["weights"]) == pytest.approx(1)
        if not per_prompt:
            assert worst["mixture"] == pytest.approx(found["value"], abs=1e-9)
            assert max(worst, key=worst.get) == "mixture"
        else:
            assert found["value"] <= worst["mixture"] + 1e-9
        assert worst.keys() == {"mixture", "mean of the members", *(f"member {k} alone" for k in range(MEMBERS))}


def test_metrics_of_what_examples_lack_are_not_logged(tmp_path):
    model = policy()
    logged, _ = first_step(
        DistillTrainer(
            model,
            config(tmp_path, "dpo", max_steps=1),
            examples=examples_near(model, rewards=(), from_reference=()),
        )
    )
    assert not {"kl/forward", "distillation/error", "ensemble/member_0"} & set(logged)
    assert "rewards/margins" in logged


def test_all_pairs_reach_responses_that_no_label_names(tmp_path):
    """Sampled responses have rewards and no label: only pairs: all distils them."""
    model = policy()
    examples = examples_near(model)
    for pairs, expected in (("labelled", 4), ("all", 6 + 1 + 3)):
        trainer = DistillTrainer(model, config(tmp_path, "d-dpo", pairs=pairs), examples=examples)
        assert len(trainer.join(next(iter(trainer.get_train_dataloader()))["items"])["pairs"]) == expected
    unlabelled = [DistillExample(e.tree, e.reference_logps, e.rewards) for e in examples]
    logged, _ = first_step(DistillTrainer(model, config(tmp_path, "d-dpo", max_steps=1), examples=unlabelled))
    assert logged["distillation/error"] > 0
    assert "rewards/margins" not in logged


def test_label_methods_train_on_labelled_pairs_whatever_is_said(tmp_path):
    assert config(tmp_path, "dpo", pairs="all").pairs == "labelled"
    assert config(tmp_path, "d-dpo", pairs="all").pairs == "all"


@pytest.mark.parametrize("method", ["dpo", "e-dpo"])
def test_evaluation_is_the_formula(method, tmp_path):
    model = policy()
    examples = examples_near(model)
    alone = DistillExample(Tree((5,), ((6, 2),)), (-3.0,), ((0.0,),) * MEMBERS)  # no pair: nothing to say about it
    args = config(tmp_path, method, per_device_eval_batch_size=4)
    trainer = DistillTrainer(model, args, examples=examples[:1], eval_examples=[*examples, alone])
    with torch.no_grad():
        expected = by_hand(method, args, examples, [plain.logps(plain.doubled(model), t) for t in TREES])
    trainer.evaluate()
    logged = trainer.state.log_history[-1]
    for name, value in expected.items():
        assert logged["eval_" + name] == pytest.approx(float(value), rel=2e-4, abs=2e-5), name


def test_trainers_defaults_warn_of_nothing(tmp_path):
    """They pin memory, of which torch warns where there is no GPU."""
    model = policy()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        arguments = config(tmp_path, "dpo", max_steps=1, use_cpu=False)
        DistillTrainer(model, arguments, examples=examples_near(model)).train()


def test_a_process_takes_the_batch_that_was_asked_for_on_one_of_many_gpus(tmp_path):
    model = policy()
    arguments = config(tmp_path, "dpo", per_device_train_batch_size=2, use_cpu=False)
    assert arguments.n_gpu <= 1
    arguments._n_gpu = 8
    assert arguments.train_batch_size == 16
    trainer = DistillTrainer(model, arguments, examples=examples_near(model))
    assert trainer.args.train_batch_size == len(next(iter(trainer.get_train_dataloader()))["items"]) == 2


def test_a_lora_policy_starts_as_the_policy_and_trains_its_adapters_only(tmp_path):
    model = policy()
    examples = examples_near(model)
    args = config(tmp_path, "e-dpo", max_steps=1)
    full, _ = first_step(DistillTrainer(copy.deepcopy(model), args, examples=examples))
    lora, grads = first_step(DistillTrainer(add_lora(model, rank=4, task="CAUSAL_LM"), args, examples=examples))
    assert lora["loss"] == pytest.approx(full["loss"], rel=1e-5)
    assert grads
    assert all("lora_" in name for name in grads)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    model = policy()
    examples = examples_near(model)
    found = []
    for on in (False, True):
        args = config(tmp_path, "dp-dpo", max_steps=1, gradient_checkpointing=on)
        found.append(first_step(DistillTrainer(copy.deepcopy(model), args, examples=examples)))
    assert found[0][0]["loss"] == pytest.approx(found[1][0]["loss"], rel=1e-6)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, atol=1e-4, rtol=1e-3)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NEEDS_REWARDS)
def test_methods_that_need_rewards_say_so(method, tmp_path):
    model = policy()
    with pytest.raises(ConfigError, match=f"{method} needs rewards"):
        DistillTrainer(model, config(tmp_path, method, kl_alpha=0.0), examples=examples_near(model, rewards=()))


@pytest.mark.parametrize("method", ["p-dpo", "dp-dpo", "e-dpo"])
def test_methods_with_a_kl_term_need_samples_of_the_reference(method, tmp_path):
    model = policy()
    examples = examples_near(model, from_reference=())
    with pytest.raises(ConfigError, match=r"sample\.reference_per_prompt"):
        DistillTrainer(model, config(tmp_path, method, kl_alpha=0.1), examples=examples)
    DistillTrainer(model, config(tmp_path, method, kl_alpha=0.0), examples=examples)


def test_no_pair_to_train_on(tmp_path):
    model = policy()
    with pytest.raises(ConfigError, match="no example has a pair"):
        DistillTrainer(model, config(tmp_path, "dpo"), examples=examples_near(model, pairs=()))
    single = DistillExample(Tree((5,), ((6, 2),)), (-3.0,), ((0.0,),))
    with pytest.raises(ConfigError, match="no example has a pair"):
        DistillTrainer(model, config(tmp_path, "d-dpo"), examples=[single])


def test_examples_of_several_ensembles(tmp_path):
    model = policy()
    *two, third = examples_near(model)
    mixed = [*two, dataclasses.replace(third, rewards=third.rewards[:1])]
    with pytest.raises(ConfigError, match=r"\[1, 3\] members"):
        DistillTrainer(model, config(tmp_path, "d-dpo"), examples=mixed)


@pytest.mark.parametrize("fields", [{"reference_logps": (1.0,)}, {"rewards": ((1.0, 2.0, 3.0),)}])
def test_columns_of_another_length(fields):
    with pytest.raises(DataError, match="2 responses"):
        DistillExample(TREES[1], **{"reference_logps": (1.0, 2.0), **fields})


@pytest.mark.parametrize("places", [{"pairs": ((1, 2),)}, {"pairs": ((0, -1),)}, {"pairs": ((1, 1),)}])
def test_responses_that_are_not_there(places):
    """In a batch such a number would be a response of another prompt."""
    said = "my prompt has 2 responses, counted from 0, and the pair"
    with pytest.raises(DataError, match=said):
        DistillExample(TREES[1], (1.0, 2.0), **places, name="my prompt")
    with pytest.raises(DataError, match=said):
        RewardExample(TREES[1], **places, weights=(1,), name="my prompt")
    with pytest.raises(DataError, match="and 2 is asked for"):
        DistillExample(TREES[1], (1.0, 2.0), from_reference=(1, 2))
    with pytest.raises(DataError, match="1 pairs and 2 weights"):
        RewardExample(TREES[1], ((0, 1),), (1, 1))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "ppo"}, "dpo, cdpo"),
        ({"method": "dpo", "pairs": "some"}, "labelled or all"),
        ({"method": "e-dpo", "pessimism": "run"}, "hull-per-prompt"),
        ({"method": "e-dpo", "kl_alpha": -1.0}, "kl_alpha"),
    ],
)
def test_options_are_checked(options, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        config(tmp_path, **options)


def test_unknown_and_rewardless_losses():
    h = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ConfigError, match="needs reward columns"):
        pair_losses("d_dpo", h, None, LossOptions())
    with pytest.raises(ConfigError, match="unknown loss"):
        pair_losses("nonsense", h, h[None], LossOptions())

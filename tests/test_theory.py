"""The theory lab: its numbers are held to the paper's claims, its tools to closed forms; and its page and command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from prefdistill.cli import main
from prefdistill.theory import degeneracy, distillation, lab, paths, pessimism
from prefdistill.theory.world import (
    all_pairs,
    forward_kl,
    margins_of,
    minimise,
    random_world,
    rlhf_optimum,
    total_variation,
)


@pytest.fixture(scope="module")
def numbers():
    return lab.numbers(seed=0)


def test_dpo_is_at_its_infimum_with_no_probability_on_any_chosen_response(numbers):
    assert numbers["degenerate_max_loss"] < 1e-9
    assert numbers["degenerate_max_prob_chosen"] < 1e-6
    assert {r["beta"] for r in numbers["degenerate"]} == {0.01, 0.1, 1.0, 5.0}
    assert all(r["dpo_loss_at_start"] == pytest.approx(math.log(2)) for r in numbers["degenerate"])


def test_regularised_losses_come_back_from_there(numbers):
    assert numbers["regularised_min_ratio"].keys() == {"p-dpo", "dp-dpo", "e-dpo"}
    assert min(numbers["regularised_min_ratio"].values()) > 0.3


def test_distillation_is_rlhf_and_loses_with_support(numbers):
    assert numbers["distillation_gap"] < 1e-6
    lost = [r["total_variation"] for r in numbers["shrinking_support"]]
    assert lost[0] < 1e-6
    assert lost == sorted(lost)
    assert lost[-1] < numbers["shrinking_support"][-1]["reference_total_variation"] + 1e-9


def test_pessimism_has_two_equal_sides_over_a_convex_set_only(numbers):
    assert numbers["pessimism_gap"] < 1e-5
    assert max(r["policy_gap"] for r in numbers["convex"]) < 1e-5
    assert numbers["hull_gap"] < 1e-6
    for r in numbers["finite"]:
        assert r["least_kl_member"] < r["exact"] - 0.1
        assert r["mean_reward"] <= r["exact"] + 1e-9
    assert numbers["least_kl_shortfall"] > 0.3


def test_few_samples_bias_the_value_more_than_the_policy(numbers):
    few = numbers["few_samples"]
    assert all(f["value"] < f["exact_value"] for f in few)
    values = [f["value"] for f in few]
    assert values == sorted(values)
    assert all(f["worst_case"] <= f["exact_value"] + 1e-9 for f in few)
    assert few[-1]["worst_case"] > 0.9 * few[-1]["exact_value"]
    assert few[0]["exact_value"] - few[0]["worst_case"] < few[0]["exact_value"] - few[0]["value"]


def test_only_dpos_chosen_log_prob_falls_without_end(numbers):
    late = {m: p["chosen"][-1] - p["chosen"][-6] for m, p in numbers["paths"].items()}
    assert late["dpo"] < -3
    assert all(abs(change) < 0.5 for m, change in late.items() if m != "dpo")
    assert numbers["paths"]["dpo"]["chosen"][-1] < min(
        p["chosen"][-1] for m, p in numbers["paths"].items() if m != "dpo"
    )
    for regularised, plain in (("p-dpo", "dpo"), ("dp-dpo", "d-dpo")):
        assert numbers["paths"][regularised]["kl"][-1] < numbers["paths"][plain]["kl"][-1]


# -- the tools ---------------------------------------------------------------------------------------------------------


def test_rlhf_optimum_beats_every_other_policy():
    world = random_world(3, prompts=2, responses=5)
    beta = 0.7

    def objective(policy):
        kl = (policy.exp() * (policy - world.reference)).sum(-1)
        return ((policy.exp() * world.reward).sum(-1) - beta * kl).mean()

    best = rlhf_optimum(world.reference, world.reward, beta)
    # The optimum's value in closed form: beta log E_ref exp(r / beta).
    closed = beta * torch.logsumexp(world.reference + world.reward / beta, -1).mean()
    assert float(objective(best)) == pytest.approx(float(closed))
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = (best + 0.3 * torch.randn(best.shape, generator=draw, dtype=torch.float64)).log_softmax(-1)
        assert objective(other) < objective(best)


def test_small_tools():
    world = random_world(0)
    assert torch.allclose(world.reference.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    x, chosen, rejected = world.pairs.unbind(1)
    assert (world.reward[x, chosen] > world.reward[x, rejected]).all()
    assert torch.equal(margins_of(world.reward, world.pairs), world.reward[x, chosen] - world.reward[x, rejected])
    assert margins_of(world.members, world.pairs).shape == (3, 4)
    assert all_pairs(2, torch.tensor([0, 2, 5])).tolist() == [
        [0, 0, 2], [0, 0, 5], [0, 2, 5], [1, 0, 2], [1, 0, 5], [1, 2, 5],
    ]  # fmt: skip
    assert float(forward_kl(world.reference, world.reference).abs().max()) == 0
    a, b = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert total_variation(a, b) == pytest.approx(0.4)
    found = minimise(
        lambda z: ((z - torch.arange(6.0).reshape(2, 3)) ** 2).sum(), torch.zeros(2, 3, dtype=torch.float64)
    )
    np.testing.assert_allclose(found, torch.arange(6.0).reshape(2, 3), atol=1e-7)


def test_uncovered_responses_keep_their_logits():
    world = random_world(1, prompts=1, responses=6)
    covered = torch.tensor([0, 1, 2])
    found = distillation.distilled(world, 0.5, covered)
    outside = torch.tensor([3, 4, 5])
    ratio = (found - world.reference)[0, outside]
    assert float(ratio.max() - ratio.min()) < 1e-9
    within = (found - world.reference)[0, covered] * 0.5 - world.reward[0, covered]
    assert float(within.max() - within.min()) < 1e-6


@pytest.mark.parametrize("method", ["dpo", "ipo", "p-dpo", "d-dpo", "dp-dpo", "e-dpo"])
def test_exact_losses_are_those_spelt_out(method):
    world = random_world(2, prompts=3, responses=5)
    beta, alpha = 0.4, 0.2
    policy = random_world(9, prompts=3, responses=5).reference
    total = 0.0
    for x, w, lost in world.pairs.tolist():
        h = (policy[x, w] - world.reference[x, w]) - (policy[x, lost] - world.reference[x, lost])
        margins = world.members[:, x, w] - world.members[:, x, lost]
        total += {
            "dpo": lambda h, m: math.log(1 + math.exp(-beta * h)),
            "ipo": lambda h, m: (h - 1 / (2 * beta)) ** 2,
            "d-dpo": lambda h, m: (m.mean() - beta * h) ** 2,
            "e-dpo": lambda h, m: min((mk - beta * h) ** 2 for mk in m),
        }[{"p-dpo": "dpo", "dp-dpo": "d-dpo"}.get(method, method)](float(h), margins.numpy()) / 3
    if method in ("p-dpo", "dp-dpo", "e-dpo"):
        total += (
            alpha
            * sum(
                float(q.exp() * (q - p))
                for ref, pol in zip(world.reference, policy, strict=True)
                for q, p in zip(ref, pol, strict=True)
            )
            / 3
        )
    assert float(degeneracy.loss_of(method, world, beta, alpha)(policy)) == pytest.approx(total)


def test_features_of_a_pair_are_alike():
    world = random_world(0, prompts=3, responses=8)
    features = paths.alike_features(world, 16, seed=0)
    for x, w, lost in world.pairs.tolist():
        assert float(features[x, w] @ features[x, lost]) == pytest.approx(paths.LIKENESS)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3, 8, dtype=torch.float64))


def test_the_exact_worst_case_of_opposite_members_is_to_stay():
    rng = np.random.default_rng(0)
    r, p = rng.normal(size=(1, 1, 5)), rng.dirichlet(np.ones(5))[None]
    value, policy = pessimism.worst_case_optimum(np.concatenate([r, -r]), p, 0.5)
    assert value == pytest.approx(0, abs=1e-8)
    np.testing.assert_allclose(policy, p, atol=1e-4)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_page_and_the_numbers(tmp_path, capsys, numbers, monkeypatch):
    monkeypatch.setattr(lab, "numbers", lambda seed: numbers)
    assert main(["theory", "--output-dir", str(tmp_path)]) == 0
    page = (tmp_path / "theory.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml") == 4
    assert "<script" not in page
    assert "undefined" not in page.lower()
    assert "n/a" not in page
    assert json.loads((tmp_path / "theory.json").read_text()) == json.loads(json.dumps(numbers))
    capsys.readouterr()
    assert main(["theory", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"degenerate_max_prob_chosen", "distillation_gap", "pessimism_gap"} <= printed.keys()


def test_a_wrong_seed_is_refused(capsys):
    assert main(["theory", "--seed", "-1"]) == 2
    assert "--seed" in capsys.readouterr().err

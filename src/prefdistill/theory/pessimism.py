"""Theorem 2 and its limits: pessimism over a convex set, over a finite ensemble, and from few samples.

Fisch et al., arXiv 2405.19316, Theorem 2; the mixture is this project's, see `prefdistill.ensemble`.
"""

from __future__ import annotations

import numpy as np
from scipy import optimize, special

from prefdistill.ensemble import Floats, advantages, hull_mixture, tilted
from prefdistill.theory.world import random_world


def worst_case_optimum(scores: Floats, reference: Floats, beta: float) -> tuple[float, Floats]:
    """max over pi of min over members, straight from its definition: the value, and pi [X, Y].

    An epigraph program (t below every member's advantage, pi in the simplex) for SLSQP. Nothing of the theorem is used;
    the minimum over members is the minimum over their hull, since an advantage is linear in the reward.
    """
    k, n, s = scores.shape

    def constraints(z: Floats) -> Floats:
        pi = np.maximum(z[:-1].reshape(n, s), 1e-300)
        kl = special.rel_entr(pi, reference).sum(1).mean()
        out: Floats = np.array([((pi - reference) * r).sum(1).mean() - beta * kl for r in scores]) - z[-1]
        return out

    def slopes(z: Floats) -> Floats:
        pi = np.maximum(z[:-1].reshape(n, s), 1e-300)
        rows = np.array([(r - beta * (np.log(pi / reference) + 1)).ravel() / n for r in scores])
        return np.hstack([rows, -np.ones((k, 1))])

    sums = np.hstack([np.kron(np.eye(n), np.ones(s)), np.zeros((n, 1))])
    found = optimize.minimize(
        lambda z: -z[-1],
        np.append(reference.ravel(), 0.0),
        jac=lambda z: np.append(np.zeros(n * s), -1.0),
        bounds=[(1e-12, 1.0)] * (n * s) + [(None, None)],
        constraints=[
            {"type": "ineq", "fun": constraints, "jac": slopes},
            {"type": "eq", "fun": lambda z: sums @ z - 1, "jac": lambda z: sums},
        ],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 1000},
    )
    return float(found.x[-1]), found.x[:-1].reshape(n, s)


def convex_set(seed: int, draws: int = 4, beta: float = 0.5) -> list[dict[str, float]]:
    """Both sides of Theorem 2 over the hull of three rewards: worst-case optimum, and beta times least forward KL."""
    out = []
    for d in range(draws):
        scores, reference = _draw(seed + d, prompts=2)
        primal, policy = worst_case_optimum(scores, reference, beta)
        mixture = hull_mixture(scores, reference, beta=beta)
        nearest = tilted(reference, np.tensordot(mixture.weights, scores, 1), beta)
        kl = float(special.rel_entr(reference, nearest).sum(1).mean())
        out.append(
            {
                "draw": d,
                "worst_case_optimum": primal,
                "beta_least_forward_kl": beta * kl,
                "gap": abs(primal - beta * kl),
                "policy_gap": float(np.abs(policy - nearest).max()),
            }
        )
    return out


def finite_ensemble(seed: int, draws: int = 4, beta: float = 0.5) -> list[dict[str, float]]:
    """Worst-case advantage of four policies: the exact one, the least-KL member's, the mean reward's, e-DPO's min."""
    out = []
    for d in range(draws):
        scores, reference = _draw(seed + d, prompts=1)
        mixture = hull_mixture(scores, reference, beta=beta)
        hull = tilted(reference, np.tensordot(mixture.weights, scores, 1), beta)
        members = [tilted(reference, r, beta) for r in scores]
        nearest = min(members, key=lambda pi: float(special.rel_entr(reference, pi).sum()))
        mean = tilted(reference, scores.mean(0), beta)
        exact = worst_case_optimum(scores, reference, beta)[0]
        out.append(
            {
                "draw": d,
                "exact": exact,
                "hull": _worst(hull, scores, reference, beta),
                "least_kl_member": _worst(nearest, scores, reference, beta),
                "mean_reward": _worst(mean, scores, reference, beta),
            }
        )
    return out


def few_samples(
    seed: int, beta: float = 0.5, prompts: int = 200, counts: tuple[int, ...] = (2, 4, 8, 16, 64), repeats: int = 5
) -> list[dict[str, float]]:
    """What estimating the weights from S samples a prompt costs, exactly evaluated.

    `value` is F as estimated, `exact_value` its truth; `worst_case` the worst-case advantage, over all responses, of
    RLHF's optimum for the mixture found.
    """
    scores, reference = _draw(seed, prompts=prompts, responses=40)
    exact = hull_mixture(scores, reference, beta=beta)
    out = []
    for count in counts:
        values, worst, distance = [], [], []
        for repeat in range(repeats):
            rng = np.random.default_rng((seed, count, repeat))
            drawn = np.stack([rng.choice(reference.shape[1], size=count, p=p) for p in reference])
            seen = np.take_along_axis(scores, np.broadcast_to(drawn, (len(scores), *drawn.shape)), axis=2)
            found = hull_mixture(seen, np.full(drawn.shape, 1 / count), beta=beta)
            values.append(found.value)
            distance.append(float(np.abs(found.weights - exact.weights).sum() / 2))
            policy = tilted(reference, np.tensordot(found.weights, scores, 1), beta)
            worst.append(_worst(policy, scores, reference, beta))
        out.append(
            {
                "samples": count,
                "value": float(np.mean(values)),
                "exact_value": exact.value,
                "weight_distance": float(np.mean(distance)),
                "worst_case": float(np.mean(worst)),
            }
        )
    return out


def _worst(policy: Floats, scores: Floats, reference: Floats, beta: float) -> float:
    return float(advantages(policy, scores, reference, beta=beta).min())


def _draw(seed: int, *, prompts: int, responses: int = 12) -> tuple[Floats, Floats]:
    world = random_world(seed, prompts=prompts, responses=responses, spread=0.0)
    return world.members.numpy(), world.reference.exp().numpy()

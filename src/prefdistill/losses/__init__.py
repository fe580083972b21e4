"""Preference losses: tensors in, one loss a pair out.

| objective         | function                    | loss of one pair                                              |
|-------------------|-----------------------------|---------------------------------------------------------------|
| DPO               | `dpo`                       | `-log sigmoid(beta h)`                                        |
| cDPO              | `dpo`, label_smoothing > 0  | `(1 - e) dpo(h) + e dpo(-h)`                                  |
| robust DPO        | `robust_dpo`                | `((1 - e) dpo(h) - e dpo(-h)) / (1 - 2 e)`                    |
| IPO               | `ipo`                       | `(h - 1/(2 tau))^2`                                           |
| d-DPO             | `distilled_dpo`             | `(r_1 - r_2 - beta h)^2`                                      |
| e-DPO             | `ensemble_dpo`              | min over K members of the member's d-DPO loss                 |
| hull-DPO          | `distilled_dpo`             | d-DPO towards the mixture `sum_k w_k r_k`; the caller mixes   |
| RPO, squared      | `rpo_sq`                    | `(beta h - eta (r_1 - r_2))^2`                                |
| RPO, backward KL  | `rpo_bwd_kl`                | `KL(Bern(sigmoid(eta (r_1 - r_2))) || Bern(sigmoid(beta h)))` |
| RPO, forward KL   | `rpo_fwd_kl`                | `KL(Bern(sigmoid(beta h)) || Bern(sigmoid(eta (r_1 - r_2))))` |
| p-, dp-, e-DPO+KL | the above, and `forward_kl` | `loss.mean() + alpha * forward_kl(...).mean()`                |

Conventions, the same in every function:

* ``P`` pairs, ``K`` reward models (members), ``S`` samples. Arguments of one function have equal shapes; nothing is
  broadcast, so that a ``[P, 1]`` beside a ``[P]`` is an error and not a ``[P, P]`` loss. Where one shape is asked for
  a docstring says ``[P]``, but any shape serves; only `ensemble_dpo` insists on ``[K, P]`` and ``[P]``.
* A log-prob is ``log pi(y | x)``, in nats: the SUM over the response's tokens, its end token included, prompt tokens
  excluded.
* ``h`` is the implicit margin of `implicit_margin`, in nats and NOT multiplied by beta; ``beta * h`` is the difference
  of implicit rewards. Where labels matter (`dpo`, `robust_dpo`, `ipo`), response 1 is the preferred one.
* A reward margin is ``r(x, y_1) - r(x, y_2)`` on the Bradley-Terry scale, where sigmoid(margin) is the probability that
  response 1 is preferred. It needs no label: any two responses to one prompt are a pair.
* beta is in reward units a nat. A larger beta holds the policy closer to the reference.
* Nothing is reduced and nothing is detached. Gradients flow to whatever asks for them; compute the reference and the
  rewards without gradient.
* Floating-point tensors of any width are taken, and mixed widths promote as usual in PyTorch. Hand over float32 or
  wider sums: near -300 nats, neighbouring bfloat16 numbers are 2 nats apart, and squares leave float16's range at 256.

Errors: `TypeError` for an argument that is not a floating-point tensor or a hyper-parameter that is not a number,
`ValueError` for unequal shapes or a hyper-parameter out of its range. Values are not looked at (that would make a GPU
wait): NaN and infinity pass through to the losses they touch.
"""

from prefdistill.losses.labels import dpo, ipo, robust_dpo
from prefdistill.losses.policy import forward_kl, implicit_margin
from prefdistill.losses.rewards import distilled_dpo, ensemble_dpo, rpo_bwd_kl, rpo_fwd_kl, rpo_sq

__all__ = [
    "distilled_dpo",
    "dpo",
    "ensemble_dpo",
    "forward_kl",
    "implicit_margin",
    "ipo",
    "robust_dpo",
    "rpo_bwd_kl",
    "rpo_fwd_kl",
    "rpo_sq",
]

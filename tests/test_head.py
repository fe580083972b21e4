"""Log-probs of the chunked head against float64 and torch's own gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prefdistill.models import head as module
from prefdistill.models.head import Scaling, head_logps

N, H, V = 23, 7, 31
SCALINGS = [Scaling(), Scaling(factor=0.3), Scaling(cap=2.0), Scaling(factor=1.7, cap=3.0)]


class Other(nn.Linear):
    """A head that is no plain linear layer as far as the type tells: it is asked for its logits."""


def draw(bias, kind=nn.Linear):
    torch.manual_seed(0)
    head = kind(H, V, bias=bias)
    hidden = (3 * torch.randn(N, H)).requires_grad_()
    return head, hidden, torch.randint(0, V, (N,)), torch.randn(N)


def truth(head, hidden, targets, scaling):
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * scaling.factor
    if scaling.cap is not None:
        logits = torch.tanh(logits / scaling.cap) * scaling.cap
    return logits.log_softmax(1)[torch.arange(N), targets]


@pytest.mark.parametrize("kind", [nn.Linear, Other])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("piece", [(2**9, 2**12), (5, V), (N, 8), (7, 9), (1, 1)])
@pytest.mark.parametrize("kept", [False, True])
def test_values_and_gradients(kind, bias, scaling, piece, kept, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", N * V if kept else min(N * V - 1, piece[0] * piece[1]))
    monkeypatch.setattr(module, "ON_CPU", piece)
    head, hidden, targets, weights = draw(bias, kind)
    ours = head_logps(head, scaling, hidden, targets)
    expected = truth(head, hidden, targets, scaling)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    over = [hidden, *head.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((ours * weights).sum(), over),
        torch.autograd.grad((expected * weights).sum(), over),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_only_what_is_trained_gets_a_gradient():
    head, hidden, targets, _ = draw(True)
    head.requires_grad_(False)
    head_logps(head, Scaling(), hidden, targets).sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32():
    head, hidden, targets, weights = draw(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = head_logps(head, Scaling(), hidden, targets)
    (ours * weights).sum().backward()
    with torch.no_grad():
        rounded = (hidden.bfloat16() @ head.weight.bfloat16().T).float().log_softmax(1)[torch.arange(N), targets]
    torch.testing.assert_close(ours, rounded)
    assert ours.dtype == head.weight.grad.dtype == hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_pieces_are_of_about_one_size(n):
    sizes = [s.stop - s.start for s in module._pieces(n, 8)]
    assert sum(sizes) == n
    assert max(sizes) <= 8
    assert max(sizes) - min(sizes) < len(sizes) or len(sizes) == 1


def test_a_head_with_a_hook_is_called():
    head, hidden, targets, _ = draw(False)
    seen = []
    head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    ours = head_logps(head, Scaling(), hidden, targets)
    assert seen == [(N, V)]
    torch.testing.assert_close(ours.double(), truth(head, hidden, targets, Scaling()), atol=1e-5, rtol=1e-5)


def test_a_second_backward_pass_gives_the_same():
    head, hidden, targets, weights = draw(True)
    loss = (head_logps(head, Scaling(cap=2.0), hidden, targets) * weights).sum()
    first, again = (torch.autograd.grad(loss, [hidden, *head.parameters()], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gradients_of_bfloat16_weights_are_summed_up_in_float32(monkeypatch):
    """A piece's part is rounded, their sum but once: a hundred pieces are no worse than one product of all rows."""
    monkeypatch.setattr(module, "ON_CPU", (16, 16))
    torch.manual_seed(0)
    n = 1600
    hidden, targets = torch.randn(n, H).bfloat16(), torch.randint(0, V, (n,))
    head = nn.Linear(H, V, bias=True, dtype=torch.bfloat16)
    head_logps(head, Scaling(), hidden, targets).sum().backward()
    wide = nn.Linear(H, V, bias=True, dtype=torch.float64)
    with torch.no_grad():
        wide.weight.copy_(head.weight)
        wide.bias.copy_(head.bias)
    wide(hidden.double()).log_softmax(1)[torch.arange(n), targets].sum().backward()
    for ours, exact in ((head.weight.grad, wide.weight.grad), (head.bias.grad, wide.bias.grad)):
        assert (ours.double() - exact).norm() <= 2**-8 * exact.norm()


@pytest.mark.parametrize("kind", [nn.Linear, Other])
def test_no_targets_have_no_log_probs(kind):
    head, hidden = draw(False, kind)[:2]
    found = head_logps(head, Scaling(), hidden[:0], torch.empty(0, dtype=torch.long))
    assert found.shape == (0,)
    assert found.dtype == torch.float32
    found.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_a_head_whose_forward_was_replaced_is_called():
    head, hidden, targets, _ = draw(False)
    plain = head.forward
    head.forward = lambda x: plain(x) * 2  # as accelerate does to weights that lie elsewhere
    found = head_logps(head, Scaling(), hidden, targets)
    head.forward = plain
    torch.testing.assert_close(found.double(), truth(head, hidden, targets, Scaling(factor=2.0)), atol=1e-5, rtol=1e-5)

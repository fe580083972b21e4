"""Runs a compiled library's float32 functions over many shapes against float64: `python native_exercise.py LIBRARY`."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import nn

from prefdistill.models.attention import blocks_of
from prefdistill.native import attention
from prefdistill.native.elementwise import Gate, Norm
from prefdistill.native.library import Library
from prefdistill.native.linear import linear
from test_attention import dense, places_of, visible

SHAPES = [
    [(1, (1,))],
    [(33, (5, 1))],  # a prompt's last row of keys alone, and a response's
    [(47, (49,)), (64, (64, 31)), (2, (3,))],
    [(130, (20, 60, 1)), (97, (33, 7))],
]


def exercise(compiled: Library) -> None:
    """Raises AssertionError where values or gradients are not those of float64."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    for shapes in SHAPES:
        places = places_of(shapes)
        tokens = places[-1].end
        for heads, groups, d in ((6, 3, 32), (4, 4, 64), (5, 1, 96), (2, 1, 128)):
            for window in (None, 5, 40):
                values = [drawn(tokens, n, d).requires_grad_() for n in (heads, groups, groups)]
                grad = drawn(tokens, heads, d)
                ours = attention.attend(compiled, *values, blocks_of(places, window=window), d**-0.5)
                found = [ours, *torch.autograd.grad(ours, values, grad)]
                wide = [x.detach().double().requires_grad_() for x in values]
                truth = dense(*(x.transpose(0, 1)[None] for x in wide), visible(places, window))[0]
                for one, exact in zip(found, [truth, *torch.autograd.grad(truth, wide, grad.double())], strict=True):
                    torch.testing.assert_close(one.double(), exact, atol=2e-5, rtol=1e-4)
    for n in (1, 7, 8, 15, 16, 17, 4095, 4096, 4097, 9000):
        gate, up, grad = drawn(n).requires_grad_(), drawn(n).requires_grad_(), drawn(n)
        ours = Gate.apply(gate, up, compiled)
        truth = nn.functional.silu(gate) * up
        for one, exact in zip(
            (ours, *torch.autograd.grad(ours, (gate, up), grad)),
            (truth, *torch.autograd.grad(truth, (gate, up), grad)),
            strict=True,
        ):
            torch.testing.assert_close(one, exact, atol=1e-5, rtol=1e-5)
    for rows, d in ((1, 1), (3, 7), (5, 16), (2, 31), (9, 33), (40, 200)):
        x, weight, grad = drawn(rows, d).requires_grad_(), drawn(d).requires_grad_(), drawn(rows, d)
        ours = Norm.apply(x, weight, 1e-6, compiled, torch.float32)
        truth = weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        for one, exact in zip(
            (ours, *torch.autograd.grad(ours, (x, weight), grad)),
            (truth, *torch.autograd.grad(truth, (x, weight), grad)),
            strict=True,
        ):
            torch.testing.assert_close(one, exact, atol=2e-5, rtol=1e-4)
    if hasattr(compiled.handle, "prefdistill_product_float"):
        for rows, inner, outer in ((256, 16, (16,)), (257, 48, (80, 16)), (299, 1040, (32,)), (1030, 32, (48,))):
            x, weights = drawn(rows, inner).requires_grad_(), [drawn(n, inner).requires_grad_() for n in outer]
            grads = [drawn(rows, n) for n in outer]
            outs = linear(compiled, x, *weights)
            wide = [t.detach().double().requires_grad_() for t in (x, *weights)]
            truths = [wide[0] @ w.T for w in wide[1:]]
            for one, exact in zip(
                (*outs, *torch.autograd.grad(outs, (x, *weights), grads)),
                (*truths, *torch.autograd.grad(truths, wide, [g.double() for g in grads])),
                strict=True,
            ):
                torch.testing.assert_close(one.double(), exact, atol=2e-4, rtol=1e-4)


if __name__ == "__main__":
    for threads in (1, 3):
        torch.set_num_threads(threads)
        exercise(Library(ctypes.CDLL(sys.argv[1]), {torch.float32: "float"}, tiles=False))
    print("as in float64")

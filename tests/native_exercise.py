"""Runs a compiled library's functions over many shapes against float64: `python native_exercise.py LIBRARY [tiles]`."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, nn

from prefdistill.models.attention import blocks_of
from prefdistill.native import attention, outer
from prefdistill.native.elementwise import Gate, Norm, Rotary
from prefdistill.native.library import NAMES, Library
from prefdistill.native.linear import linear
from test_attention import dense, places_of, visible

SHAPES = {
    torch.float32: [
        [(1, (1,))],
        [(33, (5, 1))],  # a prompt's last row of keys alone, and a response's
        [(47, (49,)), (64, (64, 31)), (2, (3,))],
        [(130, (20, 60, 1)), (97, (33, 7))],
    ],
    torch.bfloat16: [[(1, (1,))], [(33, (5, 1))], [(130, (20, 40, 1)), (2, (3,))]],
}
HEADS = {
    torch.float32: [(6, 3, 32), (4, 4, 64), (5, 1, 96), (2, 1, 128)],
    torch.bfloat16: [(2, 1, 32), (2, 2, 96)],
}
DRAW = torch.Generator().manual_seed(0)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=DRAW).to(dtype)


def same(found: Sequence[Tensor], truth: Sequence[Tensor], atol: float, rtol: float) -> None:
    for one, exact in zip(found, truth, strict=True):
        if one.dtype == torch.bfloat16:  # rounded by 2^-8 at each of a few stops on the way
            atol, rtol = 2e-2 * max(1.0, float(exact.detach().abs().max())), 2e-2
        torch.testing.assert_close(one.double(), exact.double(), atol=atol, rtol=rtol)


def exercise_attention(compiled: Library, dtype: torch.dtype) -> None:
    for shapes, (heads, groups, d), window in product(SHAPES[dtype], HEADS[dtype], (None, 5, 40)):
        places = places_of(shapes)
        tokens = places[-1].end
        values = [drawn(tokens, n, d, dtype=dtype).requires_grad_() for n in (heads, groups, groups)]
        grad = drawn(tokens, heads, d, dtype=dtype)
        ours = attention.attend(compiled, *values, blocks_of(places, window=window), d**-0.5)
        wide = [x.detach().double().requires_grad_() for x in values]
        truth = dense(*(x.transpose(0, 1)[None] for x in wide), visible(places, window))[0]
        found = [ours, *torch.autograd.grad(ours, values, grad)]
        same(found, [truth, *torch.autograd.grad(truth, wide, grad.double())], 2e-5, 1e-4)


def exercise_gates(compiled: Library, dtype: torch.dtype) -> None:
    for n in (1, 7, 8, 15, 16, 17, 4095, 4096, 4097, 9000):
        gate, up = (drawn(n, dtype=dtype).requires_grad_() for _ in range(2))
        grad = drawn(n, dtype=dtype)
        ours = Gate.apply(gate, up, compiled)
        wide = [x.detach().double().requires_grad_() for x in (gate, up)]
        truth = nn.functional.silu(wide[0]) * wide[1]
        found = [ours, *torch.autograd.grad(ours, (gate, up), grad)]
        same(found, [truth, *torch.autograd.grad(truth, wide, grad.double())], 1e-5, 1e-5)


def exercise_norms(compiled: Library, dtype: torch.dtype) -> None:
    for rows, d in ((1, 1), (3, 7), (5, 16), (2, 31), (9, 33), (40, 200)):
        x, weight, grad = drawn(rows, d).requires_grad_(), drawn(d).requires_grad_(), drawn(rows, d, dtype=dtype)
        ours = Norm.apply(x, weight, 1e-6, compiled, dtype)
        wide = [t.detach().double().requires_grad_() for t in (x, weight)]
        truth = wide[1] * wide[0] / (wide[0].pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        found = [ours, *torch.autograd.grad(ours, (x, weight), grad)]
        same(found, [truth, *torch.autograd.grad(truth, wide, grad.double())], 2e-5, 1e-4)


def exercise_rotary(compiled: Library, dtype: torch.dtype) -> None:
    for tokens, heads, half in ((1, 1, 1), (3, 2, 7), (2, 3, 8), (5, 1, 16), (4, 2, 33)):
        x, grad = (
            drawn(tokens, heads, 2 * half, dtype=dtype).requires_grad_(),
            drawn(tokens, heads, 2 * half, dtype=dtype),
        )
        cos, sin = drawn(2, tokens, 2 * half)
        ours = Rotary.apply(x, cos, sin, compiled)
        wide = x.detach().double().requires_grad_()
        first, second = wide.chunk(2, dim=-1)
        truth = wide * cos.double()[:, None] + torch.cat([-second, first], -1) * sin.double()[:, None]
        found = [ours, *torch.autograd.grad(ours, x, grad)]
        same(found, [truth, *torch.autograd.grad(truth, wide, grad.double())], 1e-5, 1e-5)


def exercise_outer(compiled: Library) -> None:
    for tokens, m, n in ((1, 32, 32), (31, 64, 32), (513, 32, 96), (1100, 64, 64)):
        both = drawn(tokens, m + n, dtype=torch.bfloat16)  # rows of which each side is a part
        g, x = both[:, :m], both[:, m:]
        same([outer.outer(compiled, g, x)], [g.double().T @ x.double()], 1e-3, 1e-4)


def exercise_products(compiled: Library) -> None:
    for rows, inner, features in ((256, 16, (16,)), (257, 48, (80, 16)), (299, 1040, (32,)), (1030, 32, (48,))):
        x, weights = drawn(rows, inner).requires_grad_(), [drawn(n, inner).requires_grad_() for n in features]
        grads = [drawn(rows, n) for n in features]
        outs = linear(compiled, x, *weights)
        wide = [t.detach().double().requires_grad_() for t in (x, *weights)]
        truths = [wide[0] @ w.T for w in wide[1:]]
        found = [*outs, *torch.autograd.grad(outs, (x, *weights), grads)]
        same(found, [*truths, *torch.autograd.grad(truths, wide, [g.double() for g in grads])], 2e-4, 1e-4)


def exercise(handle: ctypes.CDLL, tiles: bool) -> None:
    """Raises AssertionError where values or gradients are not those of float64."""
    has_half = hasattr(handle, "prefdistill_forward_half")
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for dtype, name in NAMES.items():
            if dtype == torch.bfloat16 and not has_half:
                continue
            compiled = Library(handle, {dtype: name}, tiles=False)
            exercise_attention(compiled, dtype)
            exercise_gates(compiled, dtype)
            exercise_norms(compiled, dtype)
            exercise_rotary(compiled, dtype)
        if has_half and tiles:
            exercise_attention(Library(handle, NAMES, tiles=True), torch.bfloat16)
            exercise_outer(Library(handle, NAMES, tiles=True))
        if hasattr(handle, "prefdistill_product_float"):
            exercise_products(Library(handle, NAMES, tiles=False))
    print("as in float64", *(["in bfloat16"] if has_half else []), *(["by tiles"] if tiles else []))


if __name__ == "__main__":
    loaded = ctypes.CDLL(sys.argv[1])
    loaded.prefdistill_instructions()  # asks the kernel for AMX
    exercise(loaded, "tiles" in sys.argv[2:])

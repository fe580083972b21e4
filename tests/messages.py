"""Conversations of one message, to be put together with `+`."""

from __future__ import annotations


def system(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]

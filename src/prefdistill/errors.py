"""Errors a user can mend; the command line prints them without a traceback and exits with 2."""

from __future__ import annotations


class PrefdistillError(Exception):
    """Base of every error that names its cause and what to do about it."""


class DataError(PrefdistillError):
    """A file, row or column that cannot be used; the message names it and the remedy."""


class ConfigError(PrefdistillError):
    """An option or combination of options that cannot be used."""


class TrainingError(PrefdistillError):
    """A training whose loss or gradients are no longer numbers; its last good checkpoint is kept."""

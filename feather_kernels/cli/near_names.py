"""Errors for unknown names, which list the known ones and propose the nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from feather_kernels.cli.errors import InputError


def nearest(name: str, known: Iterable[str], count: int = 4) -> list[str]:
    """Up to ``count`` known names that resemble ``name``, whatever its case, the most alike first."""
    spelled = {candidate.lower(): candidate for candidate in known}
    return [spelled[near] for near in difflib.get_close_matches(name.lower(), spelled, n=count, cutoff=0.5)]


def unknown_name(
    argument: str, name: str, known: Iterable[str], otherwise: str = "", problem: str = "", exact: str | None = None
) -> InputError:
    """The error for a name that is not known.

    Args:
        argument: the option or the key that holds the name.
        name: as it was given.
        known: the names that exist.
        otherwise: what else the argument takes, e.g. "a .toml file".
        problem: why ``name`` is not that either.
        exact: what ``name`` stands for elsewhere, which is proposed instead of the nearest known name.
    """
    known = list(known)
    choices = ", ".join(known) + (f" or {otherwise}" if otherwise else "")
    hints = [problem, *(f"did you mean {near!r}?" for near in ([exact] if exact else nearest(name, known, count=1)))]
    hint = "; ".join(filter(None, hints))
    return InputError(f"{argument} must be one of {choices}, got {name!r}{f' ({hint})' if hint else ''}")

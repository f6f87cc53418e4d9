"""Numbers with their noun, in the singular or plural."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """E.g. ``1 epoch`` and ``1,200 epochs``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"

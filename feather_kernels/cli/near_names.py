"""Names that a user may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], count: int = 4) -> str:
    """Up to ``count`` known names that resemble ``name``, the most alike first, in one line; "" if none does."""
    return ", ".join(difflib.get_close_matches(name, list(known), n=count, cutoff=0.5))

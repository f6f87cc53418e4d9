"""The check of a sparsifier's state before anything of it is taken over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

KEYS = ("step", "thresholds", "grad_scales", "schedule", "layers")


def check_state(state: dict[str, Any], layers: Sequence[str], thresholds: int) -> None:
    """Raise ValueError unless ``state`` is that of a sparsifier with these layers and so many thresholds."""
    missing = sorted(set(KEYS) - set(state))
    if missing:
        raise ValueError(f"state must be that of a Sparsifier, but lacks {missing}")
    if state["layers"] != list(layers):
        saved = state["layers"] if isinstance(state["layers"], list) else [state["layers"]]
        pairs = zip([*saved, "nothing"], [*layers, "nothing"], strict=False)
        theirs, ours = next((a, b) for a, b in pairs if a != b)
        raise ValueError(f"state must belong to this model's layers: expected {ours}, got {theirs}")
    if type(state["step"]) is not int or state["step"] < 0:
        raise ValueError(f"state: step must be an integer of at least 0, got {state['step']!r}")
    for name in ("thresholds", "grad_scales"):
        vector = state[name]
        if not isinstance(vector, Tensor) or vector.shape != (thresholds,) or not vector.is_floating_point():
            got = f"{tuple(vector.shape)} {vector.dtype}" if isinstance(vector, Tensor) else repr(vector)
            raise ValueError(f"state: {name} must be a floating-point tensor of shape ({thresholds},), got {got}")

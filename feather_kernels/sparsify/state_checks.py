"""Checks of a saved state before a sparsifier loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from feather_kernels.sparsify.layer_names import same_layer
from feather_kernels.sparsify.schedules import Schedule, sparsity_at
from feather_kernels.user_warnings import warn_user

KEYS = ("step", "thresholds", "grad_scales", "schedule", "layers")


def check_state(state: dict[str, Any], layers: Sequence[str], thresholds: int) -> None:
    """Raise ValueError or TypeError unless a sparsifier with these layers can load the state.

    Args:
        state: the state.
        layers: names of the layers; components that wrappers add make no difference.
        thresholds: number of thresholds.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a Sparsifier's state_dict(), got {type(state).__name__}")
    missing = sorted(set(KEYS) - set(state))
    if missing:
        raise ValueError(f"state must be a Sparsifier's state_dict(), but lacks {missing}")
    saved = state["layers"] if isinstance(state["layers"], list) else [state["layers"]]
    pairs = zip([*saved, "nothing"], [*layers, "nothing"], strict=False)
    different = next(((a, b) for a, b in pairs if not same_layer(str(a), b)), None)
    if different is not None:
        theirs, ours = different
        raise ValueError(f"state must belong to this model's layers: expected {ours}, got {theirs}")
    if type(state["step"]) is not int or state["step"] < 0:
        raise ValueError(f"state: step must be an integer of at least 0, got {state['step']!r}")
    for name in ("thresholds", "grad_scales"):
        vector = state[name]
        if not isinstance(vector, Tensor) or vector.shape != (thresholds,) or not vector.is_floating_point():
            got = f"{tuple(vector.shape)} {vector.dtype}" if isinstance(vector, Tensor) else repr(vector)
            raise ValueError(f"state: {name} must be a floating-point tensor of shape ({thresholds},), got {got}")


def warn_of_schedule(state: dict[str, Any], schedule: Schedule) -> None:
    """Warn if the state was saved under another schedule."""
    if state["schedule"] != repr(schedule):
        step = state["step"]
        warn_user(
            f"the state was saved at step {step} under {state['schedule']}; training continues under {schedule!r}, "
            f"at sparsity {sparsity_at(schedule, step):.4f}. To continue as before, construct the Sparsifier with the "
            "options of the saved one, including total_steps",
        )

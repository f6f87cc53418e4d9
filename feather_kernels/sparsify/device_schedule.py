"""The schedule as tables on the device, so that a training step can be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from feather_kernels.ops.schema import compute_dtype
from feather_kernels.sparsify.policies import Policy
from feather_kernels.sparsify.schedules import Schedule, sparsity_at


class DeviceSchedule:
    """Step counter and, for every step up to the last that differs, ranks, fractions and gradient scale.

    The tables are made on the host: the same bits on every rank. Advancing reads nothing on the host.

    Args:
        policy, schedule: what is tabulated.
        last_step: the step from which on everything stays as it is.
        grad_scale: of the current sparsity.
        weight: one of the weights, for its device and compute dtype.
    """

    def __init__(
        self,
        policy: Policy,
        schedule: Schedule,
        last_step: int,
        grad_scale: Callable[[float], float],
        weight: Tensor,
    ) -> None:
        device, dtype = weight.device, compute_dtype(weight.dtype)
        sparsities = [sparsity_at(schedule, step) for step in range(last_step + 1)]
        positions = [policy.positions(sparsity) for sparsity in sparsities]
        with torch.inference_mode(False):  # later steps count in whatever mode they run
            self._ranks = torch.tensor([p.ranks for p in positions], dtype=torch.int64, device=device)
            self._fractions = torch.tensor([p.fractions for p in positions], dtype=dtype, device=device)
            self._grad_scales = torch.tensor([grad_scale(s) for s in sparsities], dtype=dtype, device=device)
            self.step = torch.zeros((), dtype=torch.int64, device=device)

    def follow(self, weight: Tensor) -> None:
        """Move to the weight's device, if it has moved."""
        if self.step.device != weight.device:
            if self.step.device.type == "meta":
                raise RuntimeError("capturable needs weights with data: make the model sparse after to_empty()")
            with torch.inference_mode(False):
                for name in ("_ranks", "_fractions", "_grad_scales", "step"):
                    setattr(self, name, getattr(self, name).to(weight.device))

    def advance(self, skipped: Tensor | None = None) -> None:
        """One optimizer step further; none where ``skipped``, one element such as GradScaler's found_inf, is not 0."""
        if skipped is None:
            self.step.add_(1)
        else:
            self.step.add_(skipped.to(self.step.device).reshape(()) == 0)

    def now(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ranks (G,), fractions (G,) and gradient scale (0-dim) of the current step."""
        row = self.step.clamp_max(len(self._ranks) - 1).reshape(1)
        return tuple(table.index_select(0, row)[0] for table in (self._ranks, self._fractions, self._grad_scales))  # type: ignore[return-value]

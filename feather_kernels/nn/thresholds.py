"""Where the thresholds live: beside the layers, not in their buffers.

A shared buffer would not survive a user's ``model.bfloat16()``, ``.to(device)`` or ``.to_empty()``: every module would
get a rounded or uninitialised T of its own. So the thresholds of one sparsifier are vectors in a ``Thresholds``
object; each layer holds a ``ThresholdBinding``, which follows the layer's weight to its device and is never cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from feather_kernels.dtypes import compute_dtype
from feather_kernels.user_code import warn_user

KEPT_BYTES = 1 << 30  # of P(w) of all weights together, kept for backward unless asked otherwise


class Replica(NamedTuple):
    """The thresholds on one device, in one compute dtype; writing to the vector reaches every layer bound to it."""

    thresholds: Tensor  # (weights,)
    grad_scales: Tensor  # (weights,)
    views: list[tuple[Tensor, Tensor]]  # their elements, 0-dim


class Thresholds:
    """T of every weight and the gradient scale, with a replica per device and compute dtype.

    Each prunable weight of each layer has an element of its own, under a global threshold too: it is also the address
    by which a call of the threshold op is known to come from there.

    Copies and pickles carry the values; a deep copy of a model has thresholds of its own, shared by its layers.

    ``recompute`` says whether backward computes P(w) again instead of keeping it: True and False insist; None keeps it
    where all P(w) together, ``total_bytes``, are at most ``KEPT_BYTES``, and always where P(w) is narrower than w
    (under autocast it takes the place of the cast copy that a dense layer keeps).
    """

    def __init__(
        self,
        powers: Sequence[float],
        grad_scales: Sequence[float],
        scales_change: bool = False,
        recompute: bool | None = None,
        total_bytes: int = 0,
    ) -> None:
        self.powers = list(powers)
        self.grad_scales = list(grad_scales)
        self.scales_change = scales_change
        self.recompute = total_bytes > KEPT_BYTES if recompute is None else recompute
        self.recompute_narrow = recompute is True
        self.followed = True  # by a hook of the model, which selects where weights change
        self._warned = False
        self._replicas: dict[tuple[torch.device, torch.dtype], Replica] = {}

    def replica(self, device: torch.device, dtype: torch.dtype) -> Replica:
        """The replica for weights of ``dtype`` on ``device``; a new one starts with the values held elsewhere.

        Without values to start from (nothing held yet, or only on the meta device) it starts at T = 0.
        """
        key = (device, compute_dtype(dtype))
        if key not in self._replicas:
            with torch.inference_mode(False):  # later steps write to them, in whatever mode they run
                thresholds = torch.zeros(len(self.powers), device=device, dtype=key[1])
                grad_scales = torch.tensor(self.grad_scales, device=device, dtype=key[1])
            for replica in self._replicas.values():
                if replica.thresholds.device.type != "meta":
                    thresholds.copy_(replica.thresholds)
                    grad_scales.copy_(replica.grad_scales)
                    break
            self._replicas[key] = _wrap(thresholds, grad_scales)
        return self._replicas[key]

    def assign(self, thresholds: Tensor, grad_scales: Tensor | None = None, *, unseen: bool = False) -> None:
        """Set T of every weight, and where given the gradient scales, in place, so that nothing recompiles.

        Both are (weights,), (1,) or 0-dim. With ``unseen`` no version counts the write: for values that are most
        likely those of before, so that a backward pass that has saved them still runs.
        """
        for replica in self._replicas.values():
            for written, values in ((replica.thresholds, thresholds), (replica.grad_scales, grad_scales)):
                if values is not None and written.device.type != "meta":
                    (written.data if unseen else written).copy_(values)

    def is_shared(self) -> bool:
        """Whether other processes read and write them too."""
        return any(replica.thresholds.is_shared() for replica in self._replicas.values() if replica.thresholds.is_cpu)

    def warn(self) -> None:
        """Say once that these thresholds, of a copy, follow nothing."""
        if torch.compiler.is_compiling() or self._warned:
            return
        self._warned = True
        warn_user(
            "the thresholds of this copy of sparse layers are still those that were copied: the hook that selects them "
            "has not run. Copy the whole model and call the copy itself, or call Sparsifier.refresh(copy)",
        )

    def keep_only(self, used: set[tuple[torch.device, torch.dtype]]) -> None:
        """Drop replicas that no layer is bound to any more, e.g. those on the CPU after ``model.cuda()``."""
        for key in set(self._replicas) - used:
            del self._replicas[key]

    def __getstate__(self) -> dict[str, Any]:
        vectors = [(replica.thresholds, replica.grad_scales) for replica in self._replicas.values()]
        return {**self.__dict__, "_replicas": vectors, "followed": False, "_warned": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # the vectors are wrapped anew: pickle does not keep views of them
        self._replicas = {(vectors[0].device, vectors[0].dtype): _wrap(*vectors) for vectors in state["_replicas"]}


def _wrap(thresholds: Tensor, grad_scales: Tensor) -> Replica:
    if thresholds.is_inference():  # copied in inference mode
        with torch.inference_mode(False):
            thresholds, grad_scales = thresholds.clone(), grad_scales.clone()
    return Replica(thresholds, grad_scales, list(zip(thresholds.unbind(), grad_scales.unbind(), strict=True)))


class ThresholdBinding:
    """One weight's part of ``Thresholds``: its T and gradient scale, on the device where the weight is.

    Attributes:
        value: T, 0-dim, in the compute dtype and on the device of the weight.
        grad_scale: 0-dim, or None where it is always 1, at which backward launches nothing.
        power: p of the thresholding operator.
        key: device and compute dtype of the replica that the weight is bound to.
    """

    value: Tensor
    grad_scale: Tensor | None

    def __init__(self, thresholds: Thresholds, index: int, weight: Tensor) -> None:
        self.thresholds = thresholds
        self.index = index
        self.power = thresholds.powers[index]
        self.follow(weight)

    def recomputes(self, weight: Tensor, dtype: torch.dtype | None) -> bool:
        """Whether backward computes P(w) in ``dtype`` again instead of keeping it."""
        thresholds = self.thresholds
        if thresholds.recompute and dtype is not None and dtype.itemsize < weight.element_size():
            return thresholds.recompute_narrow
        return thresholds.recompute

    def follow(self, weight: Tensor) -> None:
        """Bind to the replica for the weight's device and dtype; shared memory is shared along with the weight."""
        key = (weight.device, compute_dtype(weight.dtype))
        self.key = key
        replica = self.thresholds.replica(*key)
        if weight.device.type == "cpu" and weight.untyped_storage().is_shared():
            replica.thresholds.share_memory_()
            replica.grad_scales.share_memory_()
        self.value, scale = replica.views[self.index]
        always_one = self.thresholds.grad_scales[self.index] == 1 and not self.thresholds.scales_change
        self.grad_scale = None if always_one else scale

    def __getstate__(self) -> dict[str, Any]:
        """Without the views: a layer that is copied or unpickled calls ``follow`` with the weight that it then has."""
        return {k: v for k, v in self.__dict__.items() if k not in ("value", "grad_scale")}

"""The thresholds of the sparse layers, which live outside of the layers' buffers.

A shared buffer would not survive ``model.bfloat16()``, ``.to(device)`` or ``.to_empty()``: every module would get a
rounded or uninitialised threshold of its own. Instead a ``Thresholds`` object holds all thresholds of a sparsifier as
vectors, and each layer has a ``ThresholdBinding``, which follows the layer's weight to its device and is never cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from feather_kernels.dtypes import compute_dtype
from feather_kernels.nn.dtensor import computing_device, is_dtensor
from feather_kernels.user_warnings import warn_user

KEPT_BYTES = 1 << 30  # by default P(w) is kept for backward if all of it is not larger


class Replica(NamedTuple):
    """The thresholds on one device, in one compute dtype; all layers bound to them see writes.

    Attributes:
        thresholds: (uses,).
        grad_scales: (uses,).
        views: the elements of both, 0-dim.
    """

    thresholds: Tensor
    grad_scales: Tensor
    views: list[tuple[Tensor, Tensor]]


class Thresholds:
    """Thresholds and gradient scales of all sparse layers, with a replica per device and compute dtype.

    Every use of a weight by a layer has an element of its own, even under one global threshold, because the address of
    the element tells which layer called the threshold op. Copies and pickles carry the values. A deep copy of a model
    has its own thresholds, shared by its layers.

    Args:
        powers: the power p, one per use of a weight.
        grad_scales: the gradient scales at the beginning, one per use of a weight.
        scales_change: whether the gradient scales will be assigned again.
        recompute: whether backward recomputes P(w) instead of keeping it. None keeps it if ``total_bytes`` is at most
            1 GiB, and always if P(w) is narrower than w: under autocast a dense layer keeps a cast copy too.
        total_bytes: size of all P(w) together.

    Attributes:
        followed: whether a hook of the model selects the thresholds when weights change; False in copies of layers.

    Example:
        >>> weight = torch.randn(4, 4)
        >>> thresholds = fk.nn.Thresholds(powers=[3.0, 3.0], grad_scales=[1.0, 1.0])
        >>> replica = thresholds.replica(weight.device, weight.dtype)
        >>> thresholds.assign(torch.tensor([0.25, 0.5]))
        >>> replica.thresholds
        tensor([0.2500, 0.5000])
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
        self.followed = True
        self._warned = False
        self._replicas: dict[tuple[torch.device, torch.dtype], Replica] = {}

    def replica(self, device: torch.device, dtype: torch.dtype) -> Replica:
        """The replica for weights on a device, made if there is none.

        A new replica copies the values of another one, or holds T = 0 if no other has values (meta device).

        Args:
            device: device of the weights.
            dtype: dtype of the weights.
        """
        key = (device, compute_dtype(dtype))
        if key not in self._replicas:
            with torch.inference_mode(False):  # later steps write to them in any mode
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
        """Set the thresholds in place, so that nothing recompiles.

        Args:
            thresholds: (uses,), (1,) or 0-dim.
            grad_scales: the gradient scales, shaped likewise; None leaves them.
            unseen: write without increasing torch's version counter, so that a backward pass that has saved the
                thresholds still runs; for values that have most likely not changed.
        """
        for replica in self._replicas.values():
            for written, values in ((replica.thresholds, thresholds), (replica.grad_scales, grad_scales)):
                if values is not None and written.device.type != "meta":
                    (written.data if unseen else written).copy_(values)

    def is_shared(self) -> bool:
        """Whether other processes share the thresholds."""
        return any(replica.thresholds.is_shared() for replica in self._replicas.values() if replica.thresholds.is_cpu)

    def warn(self) -> None:
        """Warn once that the thresholds of this copy follow no schedule."""
        if torch.compiler.is_compiling() or self._warned:
            return
        self._warned = True
        warn_user(
            "the thresholds of this copy of sparse layers are still those that were copied, because the hook that "
            "selects them has not run: copy the whole model and call the copy itself, or call Sparsifier.refresh(copy)",
        )

    def keep_only(self, used: set[tuple[torch.device, torch.dtype]]) -> None:
        """Drop the replicas that no layer uses any more, such as those on the CPU after ``model.cuda()``.

        Args:
            used: device and compute dtype of the replicas to keep.
        """
        for key in set(self._replicas) - used:
            del self._replicas[key]

    def __getstate__(self) -> dict[str, Any]:
        vectors = [(replica.thresholds, replica.grad_scales) for replica in self._replicas.values()]
        return {**self.__dict__, "_replicas": vectors, "followed": False, "_warned": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # pickle does not keep views, so they are made again
        self._replicas = {(vectors[0].device, vectors[0].dtype): _wrap(*vectors) for vectors in state["_replicas"]}


def _wrap(thresholds: Tensor, grad_scales: Tensor) -> Replica:
    if thresholds.is_inference():  # copied in inference mode
        with torch.inference_mode(False):
            thresholds, grad_scales = thresholds.clone(), grad_scales.clone()
    return Replica(thresholds, grad_scales, list(zip(thresholds.unbind(), grad_scales.unbind(), strict=True)))


class ThresholdBinding:
    """The threshold and gradient scale of one weight in one layer, on the device of the weight.

    Args:
        thresholds: the thresholds of all layers.
        index: position of this one among them.
        weight: the weight.

    Attributes:
        value: T, 0-dim, in the weight's compute dtype and on its device.
        grad_scale: 0-dim; None if it is always 1, so that backward need not launch anything.
        power: p of the thresholding operator.
        key: device and compute dtype of the replica in use.
    """

    value: Tensor
    grad_scale: Tensor | None

    def __init__(self, thresholds: Thresholds, index: int, weight: Tensor) -> None:
        self.thresholds = thresholds
        self.index = index
        self.power = thresholds.powers[index]
        self.follow(weight)

    def recomputes(self, weight: Tensor, dtype: torch.dtype | None) -> bool:
        """Whether backward recomputes P(weight) instead of keeping it.

        Args:
            weight: the weight.
            dtype: dtype of P(weight); None means the weight's.
        """
        thresholds = self.thresholds
        if thresholds.recompute and dtype is not None and dtype.itemsize < weight.element_size():
            return thresholds.recompute_narrow
        return thresholds.recompute

    def follow(self, weight: Tensor) -> None:
        """Use the replica for the weight's device and dtype, and share its memory if the weight's is shared."""
        key = (computing_device(weight), compute_dtype(weight.dtype))
        self.key = key
        replica = self.thresholds.replica(*key)
        if weight.device.type == "cpu" and not is_dtensor(weight) and weight.untyped_storage().is_shared():
            replica.thresholds.share_memory_()
            replica.grad_scales.share_memory_()
        self.value, scale = replica.views[self.index]
        always_one = self.thresholds.grad_scales[self.index] == 1 and not self.thresholds.scales_change
        self.grad_scale = None if always_one else scale

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the views: the copied or unpickled layer calls ``follow`` with its own weight."""
        return {k: v for k, v in self.__dict__.items() if k not in ("value", "grad_scale")}

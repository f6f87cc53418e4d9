"""Where the thresholds live: beside the layers, not in their buffers.

A shared buffer would not survive a user's ``model.bfloat16()``, ``.to(device)`` or ``.to_empty()``: every module would
get a rounded or uninitialised T of its own. So the thresholds of one sparsifier are vectors in a ``Thresholds``
object; each layer holds a ``LayerThreshold``, which follows the layer's weight to its device and is never cast.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from feather_kernels.ops.schema import compute_dtype


class Replica(NamedTuple):
    """The thresholds on one device, in one compute dtype; writing to the vector reaches every layer bound to it."""

    vector: Tensor  # (layers,)
    views: list[Tensor]  # its elements, 0-dim
    grad_scale: Tensor | None  # 0-dim; None means 1, at which backward launches nothing


class Thresholds:
    """T of every layer and the gradient scale, with a replica per device and compute dtype.

    Each layer has an element of its own, under a global threshold too: it is also the address by which a call of the
    threshold op is known to come from that layer.

    Copies and pickles carry the values; a deep copy of a model has thresholds of its own, shared by its layers.
    """

    def __init__(self, layers: int, power: float, grad_scale: float) -> None:
        self.layers = layers
        self.power = power
        self.grad_scale = grad_scale
        self._replicas: dict[tuple[torch.device, torch.dtype], Replica] = {}

    def replica(self, device: torch.device, dtype: torch.dtype) -> Replica:
        """The replica for weights of ``dtype`` on ``device``; a new one starts with the values held elsewhere.

        Without values to start from (nothing held yet, or only on the meta device) it starts at T = 0.
        """
        key = (device, compute_dtype(dtype))
        if key not in self._replicas:
            vector = torch.zeros(self.layers, device=device, dtype=key[1])
            for replica in self._replicas.values():
                if replica.vector.device.type != "meta":
                    vector.copy_(replica.vector)
                    break
            self._replicas[key] = self._wrap(vector)
        return self._replicas[key]

    def assign(self, values: Tensor) -> None:
        """Set T of every layer in place, so that nothing recompiles; ``values`` is (layers,), (1,) or 0-dim."""
        for replica in self._replicas.values():
            if replica.vector.device.type != "meta":
                replica.vector.copy_(values)

    def keep_only(self, used: set[tuple[torch.device, torch.dtype]]) -> None:
        """Drop replicas that no layer is bound to any more, e.g. those on the CPU after ``model.cuda()``."""
        for key in set(self._replicas) - used:
            del self._replicas[key]

    def _wrap(self, vector: Tensor) -> Replica:
        scale = None if self.grad_scale == 1 else vector.new_full((), self.grad_scale)
        return Replica(vector, list(vector.unbind()), scale)

    def __getstate__(self) -> dict[str, Any]:
        vectors = {key: replica.vector for key, replica in self._replicas.items()}
        return {**self.__dict__, "_replicas": vectors}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # the vectors are wrapped anew: pickle does not keep views of them
        self._replicas = {
            (vector.device, compute_dtype(vector.dtype)): self._wrap(vector) for vector in state["_replicas"].values()
        }


class LayerThreshold:
    """One layer's part of ``Thresholds``: its T, on the device where the layer's weight is.

    Attributes:
        threshold: T, 0-dim, in the compute dtype and on the device of the weight.
        grad_scale: 0-dim, or None for 1.
        power: p of the thresholding operator.
        key: device and compute dtype of the replica that the layer is bound to.
    """

    threshold: Tensor
    grad_scale: Tensor | None

    def __init__(self, thresholds: Thresholds, index: int, weight: Tensor) -> None:
        self.thresholds = thresholds
        self.index = index
        self.power = thresholds.power
        self.follow(weight)

    def follow(self, weight: Tensor) -> None:
        """Bind to the replica for the weight's device and dtype; shared memory is shared along with the weight."""
        self.key = (weight.device, compute_dtype(weight.dtype))
        if weight.device.type == "cpu" and weight.is_shared():
            self.thresholds.replica(*self.key).vector.share_memory_()
        replica = self.thresholds.replica(*self.key)
        self.threshold, self.grad_scale = replica.views[self.index], replica.grad_scale

    def __getstate__(self) -> dict[str, Any]:
        """Without the views: a layer that is copied or unpickled calls ``follow`` with the weight that it then has."""
        return {k: v for k, v in self.__dict__.items() if k not in ("threshold", "grad_scale")}

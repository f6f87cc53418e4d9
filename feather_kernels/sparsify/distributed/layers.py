"""The layers of a model whose weights FSDP2 may shard, before it is made sparse or later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from feather_kernels.nn.dtensor import is_dtensor, local_part
from feather_kernels.sparsify.distributed.sharding import WORKS, Part, check_sharding, parts_of, reshard
from feather_kernels.sparsify.layer_swap import uses_of
from feather_kernels.sparsify.statistics import WHOLE_WEIGHTS, Statistics
from feather_kernels.torch_private import is_managed_by_fsdp

if TYPE_CHECKING:
    from torch import Tensor

    from feather_kernels.sparsify.model_changes import LayerPlaces
    from feather_kernels.sparsify.policies import Policy
    from feather_kernels.sparsify.prunable import PrunableWeight
    from feather_kernels.sparsify.schedule_position import SchedulePosition


class ShardedLayers:
    """What a sparsifier knows of the sharding of its weights.

    FSDP2 swaps the Parameters of a layer: outside of its forward they are DTensors, of which this process has a part
    and to which the optimizer writes; inside, and sometimes after it, whole tensors that are gathered from these.

    Args:
        weights: the prunable weights.
        places: where their layers stand in the model.
    """

    def __init__(self, weights: Sequence[PrunableWeight], places: LayerPlaces) -> None:
        self._weights = weights
        self._places = places
        self._uses = uses_of(weights)
        self.parts: Sequence[Part] | None = None  # None while all weights are whole
        self._checked = False
        self._parameters: list[Tensor] = []  # as they were when the parts were found

    def exist(self) -> bool:
        """Whether a weight is sharded, outside of its layer's forward at least."""
        return any(
            is_managed_by_fsdp(use.module) or is_dtensor(use.module._parameters.get(use.parameter_name))
            for use in self._uses
        )

    def check(self) -> None:
        """Raise RuntimeError if a weight is sharded, but not by FSDP2; once, for forwards ask too."""
        if not self._checked:
            for weight in self._weights:
                check_sharding(weight)
            self._checked = self.parts is not None

    def take_back(self) -> None:
        """Have all layers hold the Parameters that the optimizer writes to; to be called in all processes."""
        if not self.exist():
            return
        found = reshard(self._places.modules())
        gathered = [
            weight
            for weight, known in zip(self._weights, self._parameters, strict=False)
            if is_dtensor(known) and not is_dtensor(weight.parameter)
        ]
        if gathered:
            raise RuntimeError(
                f"the weight of {gathered[0].name} is still gathered, and its shards cannot be reached: an exception "
                "ended its forward, or the FSDP module that manages it lies outside of the model that was made sparse "
                "(make the outermost module sparse that fully_shard() is applied to)"
            )
        whole = [weight for weight in self._unsharded() if weight.parameter.dim() > 1]
        if whole and not found:
            raise RuntimeError(
                f"the weight of {whole[0].name} is managed by an FSDP module outside of the model that was made "
                f"sparse, or by FSDP1: make the module sparse that fully_shard() is applied to. {WORKS}"
            )

    def follow(self) -> None:
        """Find again which processes share each weight, after Parameters have been replaced.

        Raises:
            RuntimeError: a weight is sharded, but not by FSDP2.
        """
        self.parts = parts_of(self._weights)
        self._checked = self.parts is not None
        self._parameters = [] if self.parts is None else [weight.parameter for weight in self._weights]

    def statistics(
        self, parameters: Sequence[Tensor], policy: Policy | None, position: SchedulePosition
    ) -> tuple[Sequence[Tensor], Statistics]:
        """What this process has of the weights, and what can be asked of the whole ones."""
        if self.parts is None:
            return parameters, WHOLE_WEIGHTS
        if policy is not None and callable(policy.scope):
            raise RuntimeError(f"scope must be a name where weights are sharded, got {policy.scope!r}")
        from feather_kernels.sparsify.distributed.selection import ShardedWeights

        return list(map(local_part, parameters)), ShardedWeights(self.parts, position.counted_step)

    def parameters(self) -> list[Tensor]:
        """The Parameters that the optimizer writes to, without a change of what the layers hold at this moment."""
        if not self._unsharded():
            return [weight.parameter for weight in self._weights]
        if not self._parameters:
            raise RuntimeError(
                "report(local=True) needs to have seen the sharded weights: call step(), refresh() or report() on all "
                "ranks after fully_shard() first"
            )
        return self._parameters

    def _unsharded(self) -> list[PrunableWeight]:
        """Weights that FSDP manages and that are whole now."""
        return [
            weight
            for weight in self._weights
            if is_managed_by_fsdp(weight.uses[0].module) and not is_dtensor(weight.parameter)
        ]

"""Notices that a model has changed: layers that were replaced, fused, removed or added, and weights of other shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from feather_kernels.nn.base import SparseLayer
from feather_kernels.nn.conversion import prunable_names
from feather_kernels.sparsify.layer_choice import LayerChoice, SkippedLayer
from feather_kernels.sparsify.layer_names import canonical
from feather_kernels.sparsify.layer_swap import uses_of
from feather_kernels.sparsify.left_dense import adapter_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from feather_kernels.sparsify.prunable import PrunableWeight, WeightUse

ADDED = "added after the model was made sparse"


class LayerPlaces:
    """The paths of modules through which a model reaches its sparse layers.

    Args:
        model: the model.
        weights: its prunable weights.
    """

    def __init__(self, model: nn.Module, weights: Sequence[PrunableWeight]) -> None:
        self._uses = uses_of(weights)
        self._edges = _edges(model, {use.module for use in self._uses})
        self._known = WeakSet(model.modules())

    def modules(self) -> set[nn.Module]:
        """The layers, and the modules through which they are reached."""
        return {use.module for use in self._uses} | {parent for parent, _, _ in self._edges}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": list(self._known)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _known=WeakSet(state["_known"]))

    def added(self, model: nn.Module, choice: LayerChoice) -> list[SkippedLayer]:
        """The dense layers that were added to ``model`` after it was made sparse, and would have been pruned."""
        modules = dict(model.named_modules())
        added = []
        for path, module in modules.items():
            if module not in self._known and not isinstance(module, SparseLayer):
                weights = [module._parameters[name] for name in prunable_names(module)]
                numel = sum(weight.numel() for weight in weights if weight is not None and weight.requires_grad)
                names = canonical(path, modules), path
                left = choice.why_left(names, module, [weight for weight in weights if weight is not None])
                if numel and left is None and adapter_of(path, modules) is None:
                    added.append(SkippedLayer(names[0], ADDED, numel, 0))
        return added

    def check(self, model: nn.Module) -> None:
        """Raise RuntimeError if a sparse layer is no longer part of ``model``; a layer may move inside it."""
        if all(parent._modules.get(name) is child for parent, name, child in self._edges):
            return
        present = set(model.modules())
        gone = [use for use in self._uses if use.module not in present]
        if gone:
            raise RuntimeError(_describe(gone))
        self._edges = _edges(model, {use.module for use in self._uses})


def _edges(model: nn.Module, layers: set[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, child) of each step on the paths from ``model`` to the layers."""
    leads: dict[nn.Module, bool] = {}
    edges = []

    def visit(module: nn.Module) -> bool:
        if module not in leads:
            leads[module] = module in layers  # ends cycles
            for name, child in module._modules.items():
                if child is not None and visit(child):
                    leads[module] = True
                    edges.append((module, name, child))
        return leads[module]

    visit(model)
    return edges


def _describe(gone: Sequence[WeightUse]) -> str:
    names = ", ".join(f"{use.name} ({type(use.module).__name__.removeprefix('Feather')})" for use in gone)
    return (
        f"these sparse layers are no longer part of the model: {names}. Their replacements are not pruned. Change the "
        "model before you make it sparse; to fuse or reparameterise it, finalize() a copy first; detach() gives the "
        "dense layers back"
    )


def check_whole(name: str, weight: Tensor, shape: tuple[int, ...]) -> None:
    """Raise RuntimeError unless the layer's weight, all parts of it, has its original ``shape``."""
    if tuple(weight.shape) == shape and len(shape) > 1:
        return
    if len(weight.shape) < 2:
        raise RuntimeError(
            f"the weight of {name} has shape {tuple(weight.shape)}, a flat shard: FullyShardedDataParallel and ZeRO-3 "
            "leave it like that outside of forward, and no layer's weight can be told from it. Use "
            "DistributedDataParallel, or FSDP2 (torch.distributed.fsdp.fully_shard)"
        )
    raise RuntimeError(
        f"the weight of {name} had shape {shape} when the model was made sparse, now {tuple(weight.shape)}: make the "
        "model sparse after its layers have their final shapes"
    )

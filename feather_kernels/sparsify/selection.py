"""Which layers of a model are made sparse, and why the others are not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import Parameter, is_lazy
from torch.nn.utils.parametrize import is_parametrized

from feather_kernels.nn.layers import SparseLayer, sparse_class

Target = str | type[nn.Module]
FilterFn = Callable[[nn.Module, str], bool]
ROOT = "(root)"  # how the model itself is called where it is a layer

# layers whose parameters of two or more dimensions are not connections that the method prunes
_NOT_PRUNABLE = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


@dataclass(frozen=True)
class PrunableWeight:
    """One distinct weight and the layers that use it (several if it is tied)."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    @property
    def name(self) -> str:
        """Names of the layers, joined by ``=`` where the weight is tied."""
        return " = ".join(self.names)


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that holds a weight and stays dense."""

    name: str
    reason: str


def select_layers(
    model: nn.Module,
    targets: Sequence[Target] | None = None,
    ignore: Sequence[Target] | None = None,
    filter_fn: FilterFn | None = None,
    min_numel: int = 0,
) -> tuple[list[PrunableWeight], list[SkippedLayer]]:
    """Prunable weights of a model in the order of its modules, and the skipped layers with their reasons.

    Args:
        model: any module; it may itself be a layer.
        targets: layers to take (default all): names, names of modules that contain them, ``re:`` patterns for the
            whole name, or module classes.
        ignore: layers to leave, in the same form; it wins over ``targets``.
        filter_fn: ``filter_fn(module, name)``; layers for which it is false are left.
        min_numel: weights with fewer elements are left.

    Raises:
        ValueError: an entry of targets or ignore that matches no module; a lazy layer that is not yet initialised; a
            layer that is sparse already.
    """
    names = {module: name for name, module in model.named_modules()}
    _check_matches("targets", targets, names)
    _check_matches("ignore", ignore, names)
    if min_numel < 0:
        raise ValueError(f"min_numel must be at least 0, got {min_numel}")
    readers = _readers(model)
    reasons: dict[nn.Module, str | None] = {}
    for module, name in names.items():
        if isinstance(module, SparseLayer):
            raise ValueError(f"model must be dense, but layer {name!r} is sparse already (a second Sparsifier?)")
        if sparse_class(module) is not None:
            reason = _why_left_by_user(module, name, targets, ignore, filter_fn, min_numel)
            reasons[module] = reason or readers.get(module)
        elif _holds_weights(module, name):
            kind = "its weight has a parametrization" if is_parametrized(module) else "not supported"
            reasons[module] = readers.get(module) or f"{type(module).__name__}: {kind}"
    return _group_by_weight(model, names, reasons)


def _group_by_weight(
    model: nn.Module, names: dict[nn.Module, str], reasons: dict[nn.Module, str | None]
) -> tuple[list[PrunableWeight], list[SkippedLayer]]:
    """One entry per distinct weight; a weight that any other module reads densely is left to all of its layers."""
    readers: dict[Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                readers.setdefault(parameter, []).append(module)
    found: dict[Parameter, list[nn.Module]] = {}
    skipped = []
    for module, reason in reasons.items():
        if reason is None:
            weight = module.get_parameter("weight")
            dense = [other for other in readers[weight] if reasons.get(other, "unknown") is not None]
            if not dense:
                found.setdefault(weight, []).append(module)
                continue
            reason = f"its weight is tied to {names[dense[0]]!r} ({type(dense[0]).__name__}), which stays dense"
        skipped.append(SkippedLayer(names[module] or ROOT, reason))
    weights = [PrunableWeight(tuple(names[m] or ROOT for m in modules), tuple(modules)) for modules in found.values()]
    return weights, skipped


def matches(name: str, module: nn.Module, targets: Iterable[Target]) -> bool:
    """Whether an entry of ``targets`` names the module, a module around it, or its class."""
    return any(_match(target, name, module) for target in targets)


def _match(target: Target, name: str, module: nn.Module) -> bool:
    if not isinstance(target, str):
        return isinstance(module, target)
    if target.startswith("re:"):
        return re.fullmatch(target[3:], name) is not None
    return name == target or name.startswith(target + ".")


def _check_matches(argument: str, targets: Sequence[Target] | None, names: dict[nn.Module, str]) -> None:
    if isinstance(targets, str | type):
        raise TypeError(f"{argument} must be a sequence of names and classes, got {targets!r}")
    for target in targets or ():
        if not any(_match(target, name, module) for module, name in names.items()):
            raise ValueError(f"{argument} must match modules of the model, but {target!r} matches none")


def _why_left_by_user(
    module: nn.Module,
    name: str,
    targets: Sequence[Target] | None,
    ignore: Sequence[Target] | None,
    filter_fn: FilterFn | None,
    min_numel: int,
) -> str | None:
    if targets is not None and not matches(name, module, targets):
        return "not in targets"
    if ignore is not None and matches(name, module, ignore):
        return "in ignore"
    if filter_fn is not None and not filter_fn(module, name):
        return "rejected by filter_fn"
    numel = module.get_parameter("weight").numel()
    if numel < min_numel:
        return f"{numel} elements, fewer than min_numel = {min_numel}"
    return None


def _holds_weights(module: nn.Module, name: str) -> bool:
    """Whether a module without a sparse class has parameters that could be expected to be pruned."""
    own = list(module._parameters.values())
    if any(parameter is not None and is_lazy(parameter) for parameter in own):
        raise ValueError(f"layer {name!r} ({type(module).__name__}) is not initialised: run one forward pass first")
    if isinstance(module, _NOT_PRUNABLE):
        return False
    return is_parametrized(module) or any(parameter is not None and parameter.dim() >= 2 for parameter in own)


def _readers(model: nn.Module) -> dict[nn.Module, str]:
    """Layers whose weight an enclosing module reads itself, without calling the layer."""
    reasons: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for child in module.modules():
                reasons.setdefault(child, "TransformerEncoderLayer reads its weights itself in eval mode")
        elif isinstance(module, nn.MultiheadAttention):
            reasons.setdefault(module.out_proj, "MultiheadAttention reads the weight of out_proj itself")
    return reasons

"""Chooses the weights of a model that are pruned, and says why the other layers stay dense."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from feather_kernels.checks import check_number
from feather_kernels.nn.conversion import form_of
from feather_kernels.sparsify import left_dense
from feather_kernels.sparsify.layer_names import ROOT, Target, canonical, check_targets, matches
from feather_kernels.sparsify.prunable import (
    NOT_CONNECTIONS,
    PrunableWeight,
    WeightUse,
    layers_read_by_parents,
    prunable_parameters,
    weight_parameters,
)

if TYPE_CHECKING:
    from torch.nn.parameter import Parameter

FilterFn = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that has a weight and stays dense.

    Attributes:
        name: name of the layer.
        reason: why it stays dense.
        numel: number of elements in its Parameters of two or more dimensions.
        shared: how many of them belong to Parameters that an earlier entry has counted already.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> fk.Sparsifier(model, sparsity=0.5, total_steps=10, ignore=["2"]).skipped
        [SkippedLayer(name='2', reason='in ignore', numel=8, shared=0)]
    """

    name: str
    reason: str
    numel: int
    shared: int


@dataclass(frozen=True)
class LayerChoice:
    """The options of a Sparsifier that choose layers.

    An entry of ``targets``, ``ignore`` or ``read_directly`` is the name of a layer or of a module that contains it, a
    regular expression ``re:...`` for the whole name, or a module class. Names match with and without the components
    that wrappers such as DDP add.

    Some weights are chosen only if ``targets`` names their layer: adapters by exact name; by exact name or class also
    frozen weights, convolutions that standardise their weight, and layers of another kind such as embeddings.

    Args:
        targets: the layers to prune; None means all linear, convolution, attention and recurrent layers.
        ignore: layers that stay dense even if ``targets`` matches them.
        filter_fn: ``filter_fn(module, name)``; layers for which it returns False stay dense.
        min_numel: layers whose largest weight has fewer elements stay dense.
        read_directly: layers whose weight another module reads without calling the layer.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
        >>> choice = fk.sparsify.LayerChoice(targets=[nn.Linear])
        >>> weights, skipped, frozen = fk.sparsify.choose_weights(model, choice)
        >>> [weight.name for weight in weights], [(layer.name, layer.reason) for layer in skipped]
        (['2'], [('0', 'not in targets')])
    """

    targets: Sequence[Target] | None = None
    ignore: Sequence[Target] | None = None
    filter_fn: FilterFn | None = None
    min_numel: int = 0
    read_directly: Sequence[Target] | None = None

    def names_exactly(self, names: Collection[str], module: nn.Module | None = None) -> bool:
        """Whether ``targets`` has one of these names, or the class of the module.

        Args:
            names: the names of a layer.
            module: the layer; None compares names only.
        """
        return any(
            target in names if isinstance(target, str) else module is not None and isinstance(module, target)
            for target in self.targets or ()
        )

    def why_left(self, names: Sequence[str], module: nn.Module, weights: Iterable[Tensor]) -> str | None:
        """The reason why these options leave a layer dense, or None.

        Args:
            names: the names of the layer, the canonical one first.
            module: the layer.
            weights: its weights.
        """
        if self.targets is not None and not matches(names, module, self.targets):
            return "not in targets"
        if self.ignore is not None and matches(names, module, self.ignore):
            return "in ignore"
        if self.filter_fn is not None and not self.filter_fn(module, names[0]):
            return "rejected by filter_fn"
        numel = max((weight.numel() for weight in weights), default=0)
        return f"{numel} elements, fewer than min_numel = {self.min_numel}" if numel < self.min_numel else None

    def check(self, names: Mapping[nn.Module, Collection[str]]) -> None:
        """Check the options against the modules of a model.

        Args:
            names: the names of each module.

        Raises:
            TypeError: an option or an entry has the wrong type.
            ValueError: an entry matches no module, or ``min_numel`` is negative.
        """
        for argument in ("targets", "ignore", "read_directly"):
            check_targets(argument, getattr(self, argument), names)
        if self.filter_fn is not None and not callable(self.filter_fn):
            raise TypeError(f"filter_fn must be a function of a module and its name, got {self.filter_fn!r}")
        check_number("min_numel", self.min_numel)
        if self.min_numel < 0:
            raise ValueError(f"min_numel must be at least 0, got {self.min_numel}")


def choose_weights(
    model: nn.Module, choice: LayerChoice
) -> tuple[list[PrunableWeight], list[SkippedLayer], list[WeightUse]]:
    """Choose the weights of a model that are pruned.

    Args:
        model: the dense model.
        choice: the options.

    Returns:
        The chosen weights in the order of the modules, the layers that stay dense, and the weights that stay dense
        because they are frozen.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an entry of targets, ignore or read_directly matches no module; a lazy layer is not initialised
            yet; a layer is sparse already.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        >>> model[1].weight.requires_grad_(False).shape
        torch.Size([2, 4])
        >>> weights, skipped, frozen = fk.sparsify.choose_weights(model, fk.sparsify.LayerChoice())
        >>> [weight.name for weight in weights], [use.name for use in frozen]
        (['0'], ['1'])
        >>> skipped[0].reason
        'frozen (requires_grad=False): pruned only if targets names it'
    """
    modules = dict(model.named_modules())
    layers = {module: _Layer(canonical(path, modules), path, module) for path, module in modules.items()}
    choice.check({module: layer.names for module, layer in layers.items()})
    read = layers_read_by_parents(model)
    chosen: dict[tuple[nn.Module, str], WeightUse] = {}
    left: list[_Left] = []
    frozen: list[WeightUse] = []
    for module, layer in layers.items():
        weights = weight_parameters(module)
        reasons = _reasons(layer, weights, modules, choice)
        uses = {key: _use(layer, key, module in read, choice) for key in reasons}
        chosen.update({(module, key): uses[key] for key, reason in reasons.items() if reason is None})
        frozen += [uses[key] for key, reason in reasons.items() if reason == left_dense.FROZEN]
        distinct = set(reasons.values())
        if len(distinct) == 1 and None not in distinct:
            left.append((layer.name or ROOT, distinct.pop() or "", [weights[key] for key in reasons]))
        else:
            left += [(uses[key].name, reason, [weights[key]]) for key, reason in reasons.items() if reason]
    prunable, tied = _group_by_parameter(layers, chosen)
    return prunable, _skipped_layers(left + tied), frozen


@dataclass(frozen=True)
class _Layer:
    """A module with its canonical name and its path."""

    name: str
    path: str
    module: nn.Module

    @property
    def names(self) -> tuple[str, str]:
        return self.name, self.path


_Left = tuple[str, str, "list[Parameter]"]  # name, reason, weights


def _reasons(
    layer: _Layer, weights: Mapping[str, Parameter], modules: Mapping[str, nn.Module], choice: LayerChoice
) -> dict[str, str | None]:
    """Why each weight of a layer stays dense, by its name; None where it is chosen.

    Weights that the report need not mention have no entry.
    """
    module = layer.module
    by_name, named = choice.names_exactly(layer.names), choice.names_exactly(layer.names, module)
    candidates, reason = prunable_parameters(layer.name, module, named)
    if by_name and not weights and not module._modules:
        kind = type(module).__name__
        raise ValueError(f"targets names {layer.name!r}, but {kind} has no weight of two or more dimensions")
    if not candidates and isinstance(module, NOT_CONNECTIONS) and not is_parametrized(module) and not named:
        return {}
    reason = reason or choice.why_left(layer.names, module, (weights[key] for key in candidates))
    reasons: dict[str, str | None] = {}
    for key, weight in weights.items():
        adapter = None if by_name else left_dense.adapter_of(f"{layer.path}.{key}".lstrip("."), modules)
        if adapter:
            reasons[key] = left_dense.adapter_reason(adapter)
        elif reason:
            reasons[key] = reason
        elif key in candidates:
            reasons[key] = None if named else left_dense.default_reason(module, weight)
    return reasons


def _use(layer: _Layer, key: str, read: bool, choice: LayerChoice) -> WeightUse:
    module, form = layer.module, form_of(type(layer.module))
    wrapped = "forward" in module.__dict__  # by a library that keeps the dense forward and calls it
    if form == "forward" and (wrapped or read or matches(layer.names, module, choice.read_directly or ())):
        form = "attribute"
    return WeightUse(layer.name, layer.path, module, key, form, left_dense.note_on(module))


def _group_by_parameter(
    layers: Mapping[nn.Module, _Layer], chosen: Mapping[tuple[nn.Module, str], WeightUse]
) -> tuple[list[PrunableWeight], list[_Left]]:
    """Group the uses by Parameter; if one layer of a tied Parameter stays dense, all of them do."""
    holders: dict[Parameter, list[tuple[nn.Module, str]]] = {}
    for module in layers:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(parameter, []).append((module, key))
    weights: list[PrunableWeight] = []
    left: list[_Left] = []
    for parameter, holding in holders.items():
        dense = [module for module, key in holding if (module, key) not in chosen]
        uses = tuple(chosen[holder] for holder in holding if holder in chosen)
        if uses and dense:
            name, kind = layers[dense[0]].name, type(dense[0]).__name__
            left += [
                (use.name, f"its weight is tied to {name!r} ({kind}), which stays dense", [parameter]) for use in uses
            ]
        elif uses:
            weights.append(PrunableWeight(uses))
    return weights, left


def _skipped_layers(left: Iterable[_Left]) -> list[SkippedLayer]:
    """Count the elements of what stays dense; an element that layers share is counted in the first of them."""
    seen: set[Parameter] = set()
    skipped = []
    for name, reason, parameters in left:
        shared = sum(parameter.numel() for parameter in parameters if parameter in seen)
        skipped.append(SkippedLayer(name, reason, sum(parameter.numel() for parameter in parameters), shared))
        seen.update(parameters)
    return skipped

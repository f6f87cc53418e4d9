"""Which weights of a model are made sparse, in which form, and why the others are not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import Parameter, is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from feather_kernels.nn.base import SparseLayer
from feather_kernels.nn.conversion import CALLED, form_of, prunable_names
from feather_kernels.nn.thresholds import ThresholdBinding

Target = str | type[nn.Module]
FilterFn = Callable[[nn.Module, str], bool]
ROOT = "(root)"  # how the model itself is called where it is a layer

# modules that read the weights of these children themselves, by the name of a class in their ancestry
READERS: dict[str, tuple[str, ...]] = {
    "MultiheadAttention": ("out_proj",),
    "TransformerEncoderLayer": ("linear1", "linear2"),  # in the fast path of eval mode
    "ShiftedWindowAttention": ("qkv", "proj"),  # torchvision's Swin Transformer
}
# parameters of two or more dimensions that are no connections; their layers are not worth a line in the report
_NOT_PRUNABLE = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, ParametrizationList)


@dataclass(frozen=True)
class Use:
    """A parameter in one layer.

    ``form`` says how the layer's class is extended (``nn.conversion``).
    """

    layer_name: str
    module: nn.Module
    parameter_name: str
    form: str

    @property
    def name(self) -> str:
        """The layer's name; with the parameter's where that is not ``weight``."""
        if self.parameter_name == "weight":
            return self.layer_name or ROOT
        return f"{self.layer_name}.{self.parameter_name}".lstrip(".")

    @property
    def latent(self) -> Tensor:
        """The Parameter, as the layer holds it now; raises RuntimeError if something took it away."""
        parameter = self.module._parameters.get(self.parameter_name)
        if parameter is None:
            raise RuntimeError(f"{self.name} has lost its Parameter (parametrized or pruned after it was made sparse?)")
        return parameter

    @property
    def binding(self) -> ThresholdBinding:
        """Its threshold and gradient scale, once the layer is sparse."""
        return cast(SparseLayer, self.module).feather.thresholds[self.parameter_name]


@dataclass(frozen=True)
class PrunableWeight:
    """One distinct Parameter and its uses (several if it is tied)."""

    uses: tuple[Use, ...]

    @property
    def parameter(self) -> Tensor:
        """The Parameter, as the layers hold it now; raises RuntimeError if they hold different ones."""
        first, *others = (use.latent for use in self.uses)
        if any(other is not first for other in others):
            raise RuntimeError(f"the weight of {self.name} is no longer tied (to_empty? assign=True?): tie it again")
        return first

    @property
    def name(self) -> str:
        """Names of the uses, joined by ``=`` where the weight is tied."""
        return " = ".join(use.name for use in self.uses)


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that holds a weight and stays dense."""

    name: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """What a user says about the layers to take.

    ``targets`` (default all linear, convolution, attention and recurrent layers) and ``ignore``, which wins, hold names
    of layers or of modules that contain them, ``re:`` patterns for the whole name, or module classes. A layer of
    another kind, e.g. an embedding, is taken where ``targets`` has its exact name or its class. Layers for which
    ``filter_fn(module, name)`` is false, or whose weights have fewer than ``min_numel`` elements, are left.
    ``read_directly`` names layers whose weight another module reads without calling them.
    """

    targets: Sequence[Target] | None = None
    ignore: Sequence[Target] | None = None
    filter_fn: FilterFn | None = None
    min_numel: int = 0
    read_directly: Sequence[Target] | None = None

    def names_exactly(self, name: str, module: nn.Module) -> bool:
        """Whether ``targets`` asks for this very layer, whatever its kind."""
        return any(
            target == name if isinstance(target, str) else isinstance(module, target) for target in self.targets or ()
        )

    def why_left(self, name: str, module: nn.Module, weights: Iterable[Tensor]) -> str | None:
        """Reason of the user's to leave a layer, or None."""
        if self.targets is not None and not matches(name, module, self.targets):
            return "not in targets"
        if self.ignore is not None and matches(name, module, self.ignore):
            return "in ignore"
        if self.filter_fn is not None and not self.filter_fn(module, name):
            return "rejected by filter_fn"
        numel = max((weight.numel() for weight in weights), default=0)
        return f"{numel} elements, fewer than min_numel = {self.min_numel}" if numel < self.min_numel else None


def select_weights(model: nn.Module, choice: Choice) -> tuple[list[PrunableWeight], list[SkippedLayer]]:
    """Prunable weights of a model in the order of its modules, and the skipped layers with their reasons.

    Raises:
        ValueError: an entry of targets, ignore or read_directly that matches no module; a lazy layer that is not yet
            initialised; a layer that is sparse already.
    """
    names = {module: name for name, module in model.named_modules()}
    for argument in ("targets", "ignore", "read_directly"):
        _check_matches(argument, getattr(choice, argument), names)
    if choice.min_numel < 0:
        raise ValueError(f"min_numel must be at least 0, got {choice.min_numel}")
    read = _read_by_parents(model)
    taken: dict[tuple[nn.Module, str], Use] = {}
    skipped = []
    for module, name in names.items():
        parameters, reason = _candidate(module, name, choice)
        reason = reason or choice.why_left(name, module, (module._parameters[p] for p in parameters))
        if parameters and reason is None:
            form = form_of(type(module))
            wrapped = "forward" in module.__dict__  # by a library that keeps, and calls, the dense forward
            if form == "call" and (wrapped or module in read or matches(name, module, choice.read_directly or ())):
                form = "read"
            taken.update({(module, p): Use(name, module, p, form) for p in parameters})
        elif parameters or (reason and _holds_weights(module)):
            skipped.append(SkippedLayer(name or ROOT, reason or ""))
    return _group_by_parameter(model, names, taken, skipped)


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
        if isinstance(target, str) and target.startswith("re:"):
            try:
                re.compile(target[3:])
            except re.error as error:
                raise ValueError(
                    f"{argument} must hold regular expressions after re:, got {target!r}: {error}"
                ) from error
        if not any(_match(target, name, module) for module, name in names.items()):
            raise ValueError(f"{argument} must match modules of the model, but {target!r} matches none")


def _candidate(module: nn.Module, name: str, choice: Choice) -> tuple[tuple[str, ...], str | None]:
    """Names of the parameters that could be pruned, and the reason why none can, if there is one."""
    if isinstance(module, SparseLayer):
        raise ValueError(f"model must be dense, but layer {name!r} is sparse already (a second Sparsifier?)")
    own = {key: value for key, value in module._parameters.items() if value is not None}
    if any(map(is_lazy, own.values())):
        raise ValueError(f"layer {name!r} ({type(module).__name__}) is not initialised: run one forward pass first")
    if is_parametrized(module):
        return (), f"{type(module).__name__}: one of its parameters has a parametrization"
    parameters = prunable_names(module)
    if not parameters and isinstance(module, tuple(CALLED)):
        return (), f"{type(module).__name__}: its weight is not a Parameter (weight_norm, spectral_norm, prune)"
    if not parameters and choice.names_exactly(name, module):
        parameters = tuple(key for key, value in own.items() if value.dim() >= 2)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and (module.sparse or module.max_norm is not None):
            return (), f"{type(module).__name__} with sparse gradients or max_norm"
    return parameters, None if parameters else f"{type(module).__name__}: taken only if targets names it"


def _holds_weights(module: nn.Module) -> bool:
    """Whether a module that is not taken has parameters that could be expected to be pruned."""
    own = (parameter for parameter in module._parameters.values() if parameter is not None)
    return is_parametrized(module) or (
        not isinstance(module, _NOT_PRUNABLE) and any(parameter.dim() >= 2 for parameter in own)
    )


def _read_by_parents(model: nn.Module) -> set[nn.Module]:
    """Layers whose weight the module that holds them reads itself."""
    read: set[nn.Module] = set()
    for module in model.modules():
        for ancestor in type(module).__mro__:
            children = (getattr(module, child, None) for child in READERS.get(ancestor.__name__, ()))
            read.update(child for child in children if isinstance(child, nn.Module))
    return read


def _group_by_parameter(
    model: nn.Module,
    names: dict[nn.Module, str],
    taken: dict[tuple[nn.Module, str], Use],
    skipped: list[SkippedLayer],
) -> tuple[list[PrunableWeight], list[SkippedLayer]]:
    """One entry per distinct Parameter; one that another module reads densely is left to all of its layers."""
    holders: dict[Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(parameter, []).append((module, key))
    weights = []
    for holding in holders.values():
        dense = [module for module, key in holding if (module, key) not in taken]
        uses = tuple(taken[holder] for holder in holding if holder in taken)
        if uses and dense:
            reason = f"its weight is tied to {names[dense[0]]!r} ({type(dense[0]).__name__}), which stays dense"
            skipped += [SkippedLayer(use.name, reason) for use in uses]
        elif uses:
            weights.append(PrunableWeight(uses))
    return weights, skipped

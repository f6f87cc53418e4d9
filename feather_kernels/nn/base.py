"""What every sparse layer shares: its state, P(weight), and moving along with the module.

A layer becomes sparse by a swap of its class. The module object, its Parameters, state_dict keys, hooks and
``isinstance`` relations stay as they were; the weight stays the dense, latent one that the optimizer updates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, NoReturn, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from feather_kernels import autograd

if TYPE_CHECKING:
    from feather_kernels.nn.thresholds import ThresholdBinding


class WeightVersion(NamedTuple):
    """Which values a weight holds, as far as torch tells: the object, its address, and its count of in-place writes.

    It holds the weight itself: ``torch.utils.swap_tensors`` refuses a tensor that has weak references.
    """

    weight: Tensor
    address: int
    version: int | None  # None for inference tensors, which have none

    @classmethod
    def of(cls, weight: Tensor) -> WeightVersion:
        """The weight's at this moment."""
        return cls(weight, weight.data_ptr(), None if weight.is_inference() else weight._version)

    def still_describes(self, weight: Tensor) -> bool:
        """Whether the weight is the same object with the same values; False where torch does not tell."""
        return (
            self.version is not None
            and self.weight is weight
            and self.address == weight.data_ptr()
            and self.version == weight._version
        )

    def still_holds(self) -> bool:
        """Whether the weight that was described has the same values."""
        return self.still_describes(self.weight)

    def describes_memory_of(self, alias: Tensor) -> bool:
        """Whether ``alias`` is another view of the weight, and the weight has the same values."""
        return self.still_holds() and self.address == alias.data_ptr()


class LayerState:
    """State that a sparse layer keeps in addition to its module's attributes.

    Attributes:
        dense_class: the class to give back.
        thresholds: by the name of the parameter.
        rebuild: ``rebuild(dense_class, form, names)`` makes an empty sparse layer for copies and pickles to fill.
        copied: for a layer that is a copy, its weights as they were copied, by name.
        replaced: names whose Parameter was set anew since the layer was made or copied.
        lock: for forwards that change the module while they run.
        reads: in the forward that this thread is running, P of the parameters read so far, by name, grad mode and
            dtype; None outside of one.
    """

    def __init__(
        self,
        dense_class: type[nn.Module],
        thresholds: dict[str, ThresholdBinding],
        rebuild: Callable[..., SparseLayer],
        replaced: set[str] | None = None,
    ) -> None:
        self.dense_class = dense_class
        self.thresholds = thresholds
        self.rebuild = rebuild
        self.copied: dict[str, WeightVersion] = {}
        self.replaced = replaced or set()
        self.lock = threading.RLock()
        self._running = threading.local()

    @property
    def reads(self) -> dict[tuple[Any, ...], Tensor] | None:  # noqa: D102  (an attribute of the class docstring)
        return getattr(self._running, "reads", None)

    @reads.setter
    def reads(self, reads: dict[tuple[Any, ...], Tensor] | None) -> None:
        self._running.reads = reads

    def __getstate__(self) -> dict[str, Any]:
        followed = any(binding.thresholds.followed for binding in self.thresholds.values())
        replaced = set() if followed else self.replaced  # a hook selects the thresholds of a replaced weight
        return {
            "dense_class": self.dense_class,
            "thresholds": self.thresholds,
            "rebuild": self.rebuild,
            "replaced": replaced,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


Layer = TypeVar("Layer", bound="SparseLayer")
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def dense_without_state(
    forward: Callable[Concatenate[Layer, Parameters], Result],
) -> Callable[Concatenate[Layer, Parameters], Result]:
    """``forward`` of a sparse class, or the dense one, for bound methods that are kept until after ``finalize()``."""

    @wraps(forward)
    def run(self: Layer, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        chosen: Callable[Concatenate[Layer, Parameters], Result]
        chosen = forward if "feather" in self.__dict__ else type(self).forward
        return chosen(self, *args, **kwargs)

    return run


class SparseLayer(nn.Module):
    """Mixin of every sparse layer.

    Attributes:
        feather: the state; an attribute of the instance, neither parameter, buffer nor submodule.
        lean_form: whether backward can compute P(weight) again, so that nothing is kept.
    """

    feather: LayerState
    lean_form = False
    form = ""  # how the dense class is extended: see ``conversion.sparse_class``

    def __init_subclass__(cls, **_: Any) -> None:
        """Nothing: that of the dense class, which may want arguments, is for subclasses that a user writes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        raise TypeError(f"{type(self).__name__} cannot be built: Sparsifier makes it from the dense layer")

    def sparse_weight(self, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        """P of the named parameter, differentiable, in ``dtype`` (default the parameter's)."""
        return autograd.threshold(*self.operands(name, dtype))

    def operands(self, name: str, dtype: torch.dtype | None) -> autograd.SparseWeight:
        """What P of the named parameter is computed from.

        Raises:
            RuntimeError: the layer has lost its Parameter; or it is a copy without a hook and got another one.
        """
        binding = self.feather.thresholds[name]
        if not binding.thresholds.followed:
            if name in self.feather.replaced:
                raise RuntimeError(
                    f"the {name} of this copy of a sparse {self.feather.dense_class.__name__} was replaced (fused? "
                    "reparameterised?), and the threshold that was copied is not that of the new values: finalize a "
                    "copy of the model first, then fuse that"
                )
            binding.thresholds.warn()
        return autograd.SparseWeight(self.latent(name), binding.value, binding.grad_scale, binding.power, dtype)

    def latent(self, name: str = "weight") -> Tensor:
        """The named parameter itself, also where the attribute of that name gives P of it.

        Raises:
            RuntimeError: the layer has lost it, because something else computes the weight now.
        """
        try:
            return cast("Tensor", self._parameters[name])
        except KeyError:
            raise RuntimeError(
                f"a sparse {self.feather.dense_class.__name__} has no Parameter {name!r}, from which P({name}) is "
                "computed: a parametrization, weight norm or torch's pruning took it away. Remove that, or finalize() "
                "or detach() the model before it"
            ) from None

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As the dense layer's; assignments to the attribute come here too."""
        super().register_parameter(name, param)
        if name in self.feather.thresholds:
            self.feather.replaced.add(name)

    def extra_repr(self) -> str:
        """The dense layer's, and whether backward computes P(weight) again or keeps it."""
        own = super().extra_repr()
        if "feather" not in self.__dict__:
            return own
        name, threshold = next(iter(self.feather.thresholds.items()))
        weight = self._parameters.get(name)
        lean = self.lean_form and weight is not None and threshold.recomputes(weight, None)
        return ", ".join(filter(None, [own, f"power={threshold.power:g}, recompute={lean}"]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._follow()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow()  # torch.load may have put the weight on another device
        self.feather.copied = {name: WeightVersion.of(self.latent(name)) for name in self.feather.thresholds}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        replaced = set(self.feather.replaced)
        super()._load_from_state_dict(*args, **kwargs)
        self.feather.replaced = replaced
        self._follow()  # assign=True puts other tensors in the weight's place

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise RuntimeError("sparse layers do not run under DataParallel: use DistributedDataParallel")

    def __prepare_scriptable__(self) -> NoReturn:
        """What ``torch.jit.script`` asks each module for."""
        raise RuntimeError(
            f"torch.jit.script cannot compile a live sparse {self.feather.dense_class.__name__}: finalize a copy of "
            "the model first, and script that"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the dense class: the sparse classes of subclasses exist only at run time."""
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return self.feather.rebuild, (self.feather.dense_class, type(self).form, tuple(self.feather.thresholds)), state

    def _follow(self) -> None:
        for name, threshold in self.feather.thresholds.items():
            threshold.follow(self.latent(name))

"""Names of modules without what wrappers add to them, and the entries of options that match a module."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import nn

Target = str | type[nn.Module]
ROOT = "(root)"  # how the model itself is called where it is a layer

# children under which torch.compile, FSDP and activation checkpointing keep the module that they wrap
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# classes that keep it under "module"
WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "AveragedModel")


def canonical(path: str, modules: Mapping[str, nn.Module]) -> str:
    """A path without the components that wrappers add; ``modules`` are the model's, by path.

    ``module`` is one of them under the classes of ``WRAPPERS``, and around the whole model where the module above it
    has no Parameters and no other child.
    """
    kept: list[str] = []
    for child, parent in steps(path, modules):
        if not _is_wrapped(child, parent, outermost=not kept):
            kept.append(child)
    return ".".join(kept)


def steps(path: str, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Components of a path from the root, each with the module that it belongs to."""
    around = ""
    for child in path.split(".") if path else ():
        yield child, modules[around]
        around = f"{around}.{child}".lstrip(".")


def _is_wrapped(child: str, parent: nn.Module, outermost: bool) -> bool:
    if child in WRAPPED:
        return True
    if child != "module" or isinstance(parent, nn.ModuleDict):
        return False
    if any(ancestor.__name__ in WRAPPERS for ancestor in type(parent).__mro__):
        return True
    return outermost and list(parent._modules) == [child] and not parent._parameters


def same_layer(saved: str, own: str) -> bool:
    """Whether two names in states are those of one layer: earlier states have the components that wrappers add."""
    return _without_wrapped(saved) == _without_wrapped(own)


def _without_wrapped(name: str) -> str:
    dropped = {*WRAPPED, "module"}  # no model is at hand to tell a wrapper's module from another's
    parts = ((part for part in word.split(".") if part not in dropped) for word in name.split(" "))
    return " ".join(".".join(kept) or ROOT for kept in parts)


def matches(names: Collection[str], module: nn.Module, targets: Iterable[Target]) -> bool:
    """Whether an entry of ``targets`` is one of the module's names or its class, a module around it, or a pattern."""
    return any(_match(target, names, module) for target in targets)


def _match(target: Target, names: Collection[str], module: nn.Module) -> bool:
    if not isinstance(target, str):
        return isinstance(module, target)
    if target.startswith("re:"):
        return any(re.fullmatch(target[3:], name) for name in names)
    return any(name == target or name.startswith(target + ".") for name in names)


def check_entry(argument: str, target: object) -> None:
    """Raise unless ``target`` is a name, a valid pattern or a class."""
    if isinstance(target, str):
        try:
            re.compile(target[3:] if target.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"{argument} must hold regular expressions after re:, got {target!r}: {error}") from error
    elif not isinstance(target, type):
        got = f"a {type(target).__name__} itself" if isinstance(target, nn.Module) else repr(target)
        raise TypeError(f"{argument} must hold names, re: patterns and classes of modules, got {got}")


def check_targets(
    argument: str, targets: Collection[Target] | None, names: Mapping[nn.Module, Collection[str]]
) -> None:
    """Raise unless ``targets`` is None or a sequence of entries that each match a module."""
    if targets is None:
        return
    if isinstance(targets, str | nn.Module) or not isinstance(targets, Collection):
        got = f"a {type(targets).__name__} itself" if isinstance(targets, nn.Module) else repr(targets)
        raise TypeError(f"{argument} must be a sequence of names and classes, got {got}")
    for target in targets:
        check_entry(argument, target)
        if not any(_match(target, names[module], module) for module in names):
            raise ValueError(f"{argument} must match modules of the model, but {target!r} matches none")

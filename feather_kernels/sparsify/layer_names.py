"""Names of modules without the components that wrappers add, and how entries of options match them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import nn

Target = str | type[nn.Module]
ROOT = "(root)"  # name of the model itself if it is a layer

# names under which torch.compile, FSDP and activation checkpointing hold the module that they wrap
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# classes that hold it as "module"
WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "AveragedModel")


def canonical(path: str, modules: Mapping[str, nn.Module]) -> str:
    """A path without the components that wrappers add.

    The component ``module`` is dropped inside a class of ``WRAPPERS``; and at the beginning of the path if the module
    around it has no Parameters and no other child.

    Args:
        path: the path of a module or Parameter.
        modules: all modules of the model, by path.
    """
    kept: list[str] = []
    for child, parent in steps(path, modules):
        if not _is_wrapped(child, parent, outermost=not kept):
            kept.append(child)
    return ".".join(kept)


def steps(path: str, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The components of a path from the root, each with the module around it."""
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
    """Whether a name in a saved state is that of a layer, whatever components wrappers have added to either."""
    return _without_wrapped(saved) == _without_wrapped(own)


def _without_wrapped(name: str) -> str:
    dropped = {*WRAPPED, "module"}  # there is no model that would tell a wrapper's "module" from another
    parts = ((part for part in word.split(".") if part not in dropped) for word in name.split(" "))
    return " ".join(".".join(kept) or ROOT for kept in parts)


def matches(names: Collection[str], module: nn.Module, targets: Iterable[Target]) -> bool:
    """Whether an entry of ``targets`` matches a module: its name, that of a module around it, a pattern, or its class.

    Args:
        names: the names of the module.
        module: the module.
        targets: the entries.
    """
    return any(_match(target, names, module) for target in targets)


def _match(target: Target, names: Collection[str], module: nn.Module) -> bool:
    if not isinstance(target, str):
        return isinstance(module, target)
    if target.startswith("re:"):
        return any(re.fullmatch(target[3:], name) for name in names)
    return any(name == target or name.startswith(target + ".") for name in names)


def check_entry(argument: str, target: object) -> None:
    """Raise ValueError or TypeError unless ``target`` is a name, a valid ``re:`` pattern or a class."""
    if isinstance(target, str):
        try:
            re.compile(target[3:] if target.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"{argument} must have a regular expression after re:, got {target!r}: {error}") from error
    elif not isinstance(target, type):
        got = f"a {type(target).__name__} itself" if isinstance(target, nn.Module) else repr(target)
        raise TypeError(f"{argument} must contain names, re: patterns and classes of modules, got {got}")


def check_targets(
    argument: str, targets: Collection[Target] | None, names: Mapping[nn.Module, Collection[str]]
) -> None:
    """Raise ValueError or TypeError unless ``targets`` is None or a sequence of entries that each match a module."""
    if targets is None:
        return
    if isinstance(targets, str | nn.Module) or not isinstance(targets, Collection):
        got = f"a {type(targets).__name__} itself" if isinstance(targets, nn.Module) else repr(targets)
        raise TypeError(f"{argument} must be a sequence of names and classes, got {got}")
    for target in targets:
        check_entry(argument, target)
        if not any(_match(target, names[module], module) for module in names):
            raise ValueError(f"{argument} must match modules of the model, but {target!r} matches none")

"""Recipes: options of a training run as a TOML file, by the name of one in the package or by its path."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from feather_kernels.cli.errors import InputError
from feather_kernels.cli.near_names import nearest, unknown_name
from feather_kernels.cli.train.config import check_type
from feather_kernels.cli.train.data import SOURCES

FOLDER = Path(__file__).parent / "recipes"
# what a recipe may set: names of TrainConfig; the others belong to the machine and to the one run
KEYS = (
    *("data", "model", "method", "power", "grad_scale", "sparsity", "epochs", "batch_size"),
    *("lr", "momentum", "weight_decay", "clip", "seed", "dtype"),
)


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def with_recipe(given: dict[str, Any]) -> dict[str, Any]:
    """The given options over those of the recipe that they name under ``recipe``; without it, as they are.

    Raises:
        InputError: there is no such recipe, or its file is not one.
    """
    options = dict(given)
    recipe = options.pop("recipe", None)
    return options if recipe is None else {**read_recipe(recipe), **options}


def read_recipe(recipe: str) -> dict[str, Any]:
    """Options of a recipe: the name of one in the package, or the path of a .toml file.

    Raises:
        InputError: there is none of that name, no such file, or the file is no recipe.
    """
    path = FOLDER / f"{recipe}.toml" if recipe in recipe_names() else Path(recipe)
    if not path.is_file():
        what = "no such file" if path.suffix == ".toml" else "neither a known name nor a file"
        raise unknown_name("--recipe", recipe, recipe_names(), otherwise="a .toml file", problem=what)
    content = read_toml(path, "--recipe")
    check_keys(str(path), content, KEYS)
    return check_options(str(path), content, path.parent)


def read_toml(path: Path, argument: str) -> dict[str, Any]:
    """A TOML file; raises InputError, which names the argument and the file, unless it is one."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise InputError(f'{argument} needs tomli: pip install "feather_kernels[train]"') from error
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{argument} must be a TOML file, got {str(path)!r}: {error}") from error


def check_keys(where: str, content: Collection[str], known: Collection[str]) -> None:
    """Raise InputError naming the first key that is not known, where it stands and the nearest one that is."""
    for key in content:
        if key not in known:
            near = nearest(key, known, count=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise InputError(f"{where}: unknown key {key!r} ({hint})")


def check_options(where: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The options with their types checked; a path of data is relative to ``folder``."""
    for name, value in options.items():
        check_type(f"{where}: {name}", name, value)
    data = options.get("data")
    return options if data is None or data in SOURCES else {**options, "data": str(folder / data)}

"""Recipes: TOML files with options of a training run, found by name in the package or by path."""

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
# the names of TrainConfig that a recipe may set; the others belong to the machine or to the single run
KEYS = (
    *("data", "model", "method", "power", "grad_scale", "sparsity", "epochs", "batch_size"),
    *("lr", "momentum", "weight_decay", "clip", "seed", "dtype"),
)


def recipe_names() -> list[str]:
    """The names of the recipes in the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def with_recipe(given: dict[str, Any]) -> dict[str, Any]:
    """Add the options of the recipe that ``given`` names under ``recipe``, if any; the given ones override them.

    Raises:
        InputError: there is no such recipe, or it is invalid.
    """
    options = dict(given)
    recipe = options.pop("recipe", None)
    return options if recipe is None else {**read_recipe(recipe), **options}


def read_recipe(recipe: str) -> dict[str, Any]:
    """Read the options of a recipe.

    Args:
        recipe: a name in the package, or the path of a .toml file.

    Raises:
        InputError: there is no such name or file, or the file is not a recipe.
    """
    path = FOLDER / f"{recipe}.toml" if recipe in recipe_names() else Path(recipe)
    if not path.is_file():
        problem = "no such file" if path.suffix == ".toml" else "neither a known name nor a file"
        raise unknown_name("--recipe", recipe, recipe_names(), otherwise="a .toml file", problem=problem)
    content = read_toml(path, "--recipe")
    check_keys(str(path), content, KEYS)
    return check_options(str(path), content, path.parent)


def read_toml(path: Path, argument: str) -> dict[str, Any]:
    """Read a TOML file; raises InputError, which names the argument and the file, if it is not one."""
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
    """Raise InputError if a key is unknown; it names the key, where it stands, and the nearest known one."""
    for key in content:
        if key not in known:
            near = nearest(key, known, count=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise InputError(f"{where}: unknown key {key!r} ({hint})")


def check_options(where: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Check the types of the options, and take a path to data as relative to ``folder``."""
    for name, value in options.items():
        check_type(f"{where}: {name}", name, value)
    data = options.get("data")
    return options if data is None or data in SOURCES else {**options, "data": str(folder / data)}

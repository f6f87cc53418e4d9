"""The cells of a grid, from a TOML file or from options."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feather_kernels.cli.errors import InputError
from feather_kernels.cli.train import config
from feather_kernels.cli.train.methods import METHODS
from feather_kernels.cli.train.recipe_file import KEYS, check_keys, check_options, read_recipe, read_toml, recipe_names

if TYPE_CHECKING:
    from feather_kernels.cli.train.config import TrainConfig

AXES = {"methods": "method", "sparsities": "sparsity", "seeds": "seed"}  # lists of a block -> the option of each cell
COMMON_KEYS = tuple(key for key in KEYS if key not in AXES.values())
BLOCK_KEYS = ("label", *AXES, *COMMON_KEYS)
FILE_KEYS = ("recipe", "options", "cells")
OF_THE_SESSION = ("threads", "runs", "name")  # options that do not identify a cell


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        label: names its row in the table: the method, and how it differs from other rows.
        config: its options.
    """

    label: str
    config: TrainConfig

    @property
    def name(self) -> str:
        """The name of its folder, e.g. ``feather-0.95-seed0``."""
        return cell_name(self.label, self.config.sparsity, self.config.seed)

    def identity(self) -> dict[str, Any]:
        """Its label and the options that its numbers depend on."""
        left_out = *OF_THE_SESSION, "data_dir"
        options = {name: value for name, value in asdict(self.config).items() if name not in left_out}
        return {"label": self.label, **options}

    def portable_identity(self) -> dict[str, Any]:
        """``identity`` in a form that is the same on every machine: the data by name, the device by type."""
        device = self.config.device.partition(":")[0]
        return {**self.identity(), "data": self.config.data_name, "device": device}

    @property
    def fingerprint(self) -> str:
        """A hash of ``portable_identity`` in twelve hexadecimal digits; it changes with any option."""
        values = {
            name: float(value) if isinstance(value, int) else value  # 1 and 1.0 are the same option
            for name, value in self.portable_identity().items()
        }
        return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class Block:
    """All combinations of some methods, sparsities and seeds.

    Attributes:
        methods, sparsities, seeds: not empty. A method that prunes nothing ignores the sparsities.
        options: of every cell; they override those of the recipe.
        label: of its cells; None makes one from the method and the options.
    """

    methods: list[str]
    sparsities: list[float]
    seeds: list[int]
    options: dict[str, Any]
    label: str | None = None

    def cells(self, prefix: str, base: dict[str, Any], given: dict[str, Any]) -> Iterator[Cell]:
        """Its cells: ``given`` overrides the options of the block, and these override ``base``.

        Errors about one of ``AXES`` name it as the user has written it, after ``prefix``.
        """
        for method in self.methods:
            prunes = method not in METHODS or METHODS[method].prunes
            if prunes and not self.sparsities:
                raise InputError(f"{prefix}sparsities must name at least one for method {method!r}, got none")
            for sparsity in self.sparsities if prunes else [0.0]:
                for seed in self.seeds:
                    axes = {"method": method, "sparsity": float(sparsity), "seed": seed}
                    with _axes_named(prefix):
                        cell = config.resolve({**base, **self.options, **given, **axes})
                    yield Cell(self.label or ", ".join([method, *self._differences()]), cell)

    def _differences(self) -> list[str]:
        return [
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self.options.items()
        ]


def cell_name(label: str, sparsity: float, seed: int) -> str:
    """The name of a cell's folder; no two cells of a grid share it."""
    words = re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-")
    return f"{words}-{sparsity:g}-seed{seed}"


def read_grid(path: Path, given: dict[str, Any]) -> list[Cell]:
    """The cells of a grid file.

    The file may have a ``recipe`` (a name or a path) and a table ``options``, which overrides it. Each block
    ``[[cells]]`` has lists ``methods``, ``sparsities`` and ``seeds`` (default [0]), and may have a ``label`` and other
    options.

    Args:
        path: of the file.
        given: options of the command line, ``recipe`` among them; they override those of the file.

    Raises:
        InputError: the file is not a grid, or a cell cannot run.
    """
    content = read_toml(path, "the grid")
    where = str(path)
    check_keys(where, content, FILE_KEYS)
    given = dict(given)
    recipe = given.pop("recipe", None) or _recipe_of(where, content, path.parent)
    options = _table(where, "options", content.get("options", {}))
    check_keys(f"{where}: options", options, COMMON_KEYS)
    base = {**({} if recipe is None else read_recipe(recipe)), **check_options(where, options, path.parent)}
    blocks = content.get("cells")
    if not isinstance(blocks, list) or not blocks:
        raise InputError(f"{where}: must have at least one block [[cells]], got {blocks!r}")
    cells: list[Cell] = []
    for number, entry in enumerate(blocks, 1):
        block = f"{where}: [[cells]] {number}"
        cells += _read_block(block, _table(where, "cells", entry), path.parent).cells(f"{block}: ", base, given)
    return _ordered(where, cells)


def make_grid(methods: list[str], sparsities: list[float], seeds: list[int], given: dict[str, Any]) -> list[Cell]:
    """The cells of all combinations, with the given options, which may include ``recipe``.

    Raises:
        InputError: a cell cannot run.
    """
    given = dict(given)
    recipe = given.pop("recipe", None)
    base = {} if recipe is None else read_recipe(recipe)
    return _ordered("the grid", list(Block(methods, sparsities, seeds, {}).cells("--", base, given)))


@contextmanager
def _axes_named(prefix: str) -> Iterator[None]:
    """A context whose errors name the list of the grid, e.g. ``--methods``, where they start with ``--method``."""
    try:
        yield
    except InputError as error:
        option, _, rest = str(error).partition(" ")
        for axis, name in AXES.items():
            if option == f"--{name}":
                raise InputError(f"{prefix}{axis} {rest}") from error
        raise


def _ordered(where: str, cells: list[Cell]) -> list[Cell]:
    """Put the first seed of every row before the second of any, so that an unfinished grid compares like with like."""
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{where}: cells must differ in label, sparsity or seed, got {name} twice")
    seeds: dict[tuple[str, float], list[int]] = {}
    for cell in cells:
        seeds.setdefault((cell.label, cell.config.sparsity), []).append(cell.config.seed)
    return sorted(cells, key=lambda cell: seeds[cell.label, cell.config.sparsity].index(cell.config.seed))


def _recipe_of(where: str, content: dict[str, Any], folder: Path) -> str | None:
    recipe = content.get("recipe")
    if recipe is None or recipe in recipe_names():
        return recipe
    if not isinstance(recipe, str):
        raise InputError(f"{where}: recipe must be one of {', '.join(recipe_names())} or a .toml file, got {recipe!r}")
    return str(folder / recipe) if recipe.endswith(".toml") else recipe


def _read_block(where: str, entry: dict[str, Any], folder: Path) -> Block:
    check_keys(where, entry, BLOCK_KEYS)
    label = entry.get("label")
    if label is not None and (not isinstance(label, str) or not label.strip()):
        raise InputError(f"{where}: label must be a text, got {label!r}")
    axes = {"seeds": [0], "sparsities": [], **{key: entry[key] for key in AXES if key in entry}}
    for key, option in AXES.items():
        values = axes.get(key)
        if not isinstance(values, list) or not (values or key == "sparsities"):
            raise InputError(f"{where}: {key} must be a list, got {values!r}")
        for value in values:
            config.check_type(f"{where}: {key}", option, value)
    options = {key: value for key, value in entry.items() if key in COMMON_KEYS}
    return Block(axes["methods"], axes["sparsities"], axes["seeds"], check_options(where, options, folder), label)


def _table(where: str, key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: {key} must be a table, got {value!r}")
    return value

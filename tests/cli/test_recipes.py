"""Recipes as TOML files, and the networks that they name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from feather_kernels.cli.errors import InputError
from feather_kernels.cli.train import config, data, recipe_file
from feather_kernels.cli.train.models import make_model
from feather_kernels.cli.train.recipe_file import read_recipe, recipe_names
from feather_kernels.sparsify import LayerChoice, choose_weights
from tests.support.train_runs import make_npz, train

PAPER = ["cifar100-densenet40-24", "cifar100-mobilenetv1", "cifar100-resnet20"]
np = pytest.importorskip("numpy")


@pytest.fixture(scope="module", name="cifar_like")
def make_cifar_like(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 training images of 32 pixels in colour."""
    return make_npz(tmp_path_factory.mktemp("data") / "small.npz", (32, 32, 3))


# ------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize(
    ("name", "layers", "numel"), [("mobilenetv1", 28, 3_287_488), ("densenet40-24", 40, 703_920)], ids=str
)
def test_the_networks_have_the_prunable_weights_of_the_paper(name: str, layers: int, numel: int) -> None:
    weights, skipped, _ = choose_weights(make_model(name, channels=3, classes=100, seed=0), LayerChoice())
    assert len(weights) == layers
    assert not skipped
    assert sum(weight.parameter.numel() for weight in weights) == numel


def test_densenet_keeps_its_input_and_halves_the_image_twice() -> None:
    model = make_model("densenet40-24", channels=3, classes=100, seed=0).eval()
    x = torch.randn(1, 48, 32, 32)
    assert torch.equal(model.blocks[0](x)[:, :48], x)
    assert model.blocks(x).shape == (1, 264, 8, 8)


def test_mobilenet_leaves_two_pixels_of_32() -> None:
    model = make_model("mobilenetv1", channels=3, classes=100, seed=0).eval()
    assert model.blocks(torch.randn(1, 32, 32, 32)).shape == (1, 1024, 2, 2)
    assert [block.depthwise.groups for block in model.blocks[:3]] == [32, 64, 128]


def test_a_network_of_torchvision_has_the_classes_of_the_data_and_is_a_function_of_the_seed() -> None:
    pytest.importorskip("torchvision")
    first, same, other = (make_model("torchvision:squeezenet1_1", 3, 7, seed) for seed in (0, 0, 1))
    assert first(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    assert torch.equal(first.features[0].weight, same.features[0].weight)
    assert not torch.equal(first.features[0].weight, other.features[0].weight)


def test_networks_of_torchvision_train(tmp_path: Path, cifar_like: str) -> None:
    """With dropout, the same run twice is the same."""
    pytest.importorskip("torchvision")
    for name in ("one", "two"):
        options = ["--data", cifar_like, "--model", "torchvision:squeezenet1_1", "--epochs", "1", "--name", name]
        assert train(tmp_path, *options) == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        ("torchvision:alexnet", (32, 32, 3), "--model torchvision:alexnet does not take images of 32x32"),
        ("torchvision:vit_b_16", (32, 32, 3), "--model torchvision:vit_b_16 does not take images of 32x32"),
        ("torchvision:squeezenet1_1", (32, 32), "takes images with 3 channels, got 1"),
    ],
)
def test_images_that_a_network_does_not_take_are_one_line(tmp_path, capsys, model, shape, words) -> None:
    pytest.importorskip("torchvision")
    path = make_npz(tmp_path / "small.npz", shape)
    assert train(tmp_path / "runs", "--data", path, "--model", model) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------ recipes


def test_the_recipes_of_the_paper_have_its_settings() -> None:
    assert [name for name in recipe_names() if name.startswith("cifar100-")] == PAPER
    for name in PAPER:
        assert read_recipe(name) == {
            "data": "cifar100",
            "model": name.removeprefix("cifar100-"),
            "epochs": 160,
            "batch_size": 128,
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "clip": 3.0,
        }


@pytest.mark.parametrize("name", PAPER)
def test_recipes_of_the_paper_run_and_options_win(tmp_path: Path, cifar_like: str, name: str) -> None:
    options = ["--recipe", name, "--data", cifar_like, "--epochs", "1", "--batch-size", "20", "--name", "run"]
    assert train(tmp_path, *options) == 0
    content = json.loads((tmp_path / "run/config.json").read_text())["options"]
    assert content["model"] == name.removeprefix("cifar100-")
    assert (content["epochs"], content["batch_size"], content["data"]) == (1, 20, cifar_like)


def test_a_recipe_file_is_read_and_its_data_lie_beside_it(tmp_path: Path) -> None:
    make_npz(tmp_path / "small.npz", (8, 8))
    path = tmp_path / "mine.toml"
    path.write_text('data = "small.npz"\nsparsity = 0.5\nmethod = "soft"\nlr = 1\ngrad_scale = "auto"\n')
    options = config.resolve(recipe_file.with_recipe({"recipe": str(path), "sparsity": 0.75}))
    assert (options.data, options.method, options.sparsity) == (str(tmp_path / "small.npz"), "soft", 0.75)
    assert (options.lr, options.grad_scale) == (1, "auto")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rate = 0.1", "unknown key 'learning_rate'"),
        ("batchsize = 12", "unknown key 'batchsize' (did you mean 'batch_size'?)"),
        ("epochs = 1.5", "epochs must be int, got 1.5"),
        ("epochs = true", "epochs must be int, got True"),
        ("model = 20", "model must be str, got 20"),
        ("lr = ", "must be a TOML file"),
        ("lr = 0.1\nlr = 0.2", "must be a TOML file"),
        ("data = 'absent.npz'", "no such file"),
        ("sparsity = 95", "--sparsity must be in [0, 1), got 95"),
        ("name = 'x'", "unknown key 'name'"),
    ],
)
def test_bad_recipes_are_one_line_that_names_the_file(tmp_path, capsys, text: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert train(tmp_path / "runs", "--recipe", str(path)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    if not words.startswith("--sparsity") and words != "no such file":  # errors of the value, wherever it comes from
        assert str(path) in error
    assert not (tmp_path / "runs").exists()


def test_every_recipe_of_the_package_is_installed() -> None:
    project = recipe_file.read_toml(Path(__file__).parents[2] / "pyproject.toml", "the test")
    assert "cli/train/recipes/*.toml" in project["tool"]["setuptools"]["package-data"]["feather_kernels"]
    assert {path.suffix for path in recipe_file.FOLDER.iterdir()} == {".toml"}


# ------------------------------------------------------------------------------------------------ npz


@pytest.mark.parametrize(
    ("shape", "batch_size"), [((32, 32, 3), 128), ((32, 32), 64), ((8, 8, 3), 64), ((28, 28, 1), 64)], ids=str
)
def test_npz_images_like_cifar_get_its_batch_size(tmp_path: Path, shape: tuple[int, ...], batch_size: int) -> None:
    path = make_npz(tmp_path / "small.npz", shape)
    assert config.resolve({"data": path}).batch_size == batch_size
    compressed = tmp_path / "compressed.npz"
    with np.load(path) as arrays:
        np.savez_compressed(compressed, **arrays)
    assert data.source_of(str(compressed)).batch_size == batch_size


def test_an_npz_whose_header_cannot_be_read_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    path = make_npz(tmp_path / "bad.npz", (8, 8), x_train=None)
    assert config.resolve({"data": path}).batch_size == 64
    with pytest.raises(InputError, match="missing x_train"):
        data.load(path, "")

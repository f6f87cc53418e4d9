"""Unknown names: every option that takes one lists the names that exist and proposes the nearest."""

from __future__ import annotations

import pytest

from feather_kernels import cli
from feather_kernels.cli.near_names import nearest, unknown_name
from feather_kernels.cli.train import data, methods, models
from feather_kernels.cli.train.recipe_file import recipe_names
from tests.support.train_runs import train

METHODS = ", ".join(methods.METHODS)
MODELS = f"{', '.join(models.MODELS)} or torchvision:NAME"
DATA = f"{', '.join(data.SOURCES)} or an .npz file"
RECIPES = f"{', '.join(recipe_names())} or a .toml file"


@pytest.mark.parametrize(
    ("option", "name", "choices", "hint"),
    [
        ("--method", "gpm", METHODS, "(did you mean 'gmp'?)"),
        ("--method", "Hard", METHODS, "(did you mean 'hard'?)"),
        ("--model", "mobilenet", MODELS, "(did you mean 'mobilenetv1'?)"),
        ("--model", "resnet-20", MODELS, "(did you mean 'resnet20'?)"),
        ("--model", "resnet50", MODELS, "(did you mean 'torchvision:resnet50'?)"),
        ("--model", "VGG11", MODELS, "(did you mean 'torchvision:vgg11'?)"),
        ("--data", "CIFAR-100", DATA, "(neither a known name nor a file; did you mean 'cifar100'?)"),
        ("--data", "digit.npz", DATA, "(no such file; did you mean 'digits'?)"),
        (
            "--recipe",
            "cifar100-resnet2",
            RECIPES,
            "(neither a known name nor a file; did you mean 'cifar100-resnet20'?)",
        ),
        ("--recipe", "cifar-mobilenet", RECIPES, "did you mean 'cifar100-mobilenetv1'?)"),
        ("--recipe", "absent.toml", RECIPES, "(no such file)"),
        ("--dtype", "bf16", "float32, bfloat16", "(did you mean 'bfloat16'?)"),
        ("--dtype", "int8", "float32, bfloat16", ""),
        ("--model", "torchvision:resnet51", "torchvision's", "such as resnet50"),
        ("--model", "torchvision:qqqq", "torchvision's", "classifiers: alexnet, "),
    ],
)
def test_train_proposes_the_nearest_name(tmp_path, capsys, option, name, choices, hint) -> None:
    if "torchvision:" in name + hint:
        pytest.importorskip("torchvision")
    assert train(tmp_path / "runs", option, name) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"feather-kernels: error: {option} ")
    assert f"must be one of {choices}" in error
    assert f"got {name.removeprefix('torchvision:')!r}" in error
    assert hint in error
    assert ("did you mean" in error) == ("did you mean" in hint)
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recipe = 'cifar100-resnet'\n[[cells]]\nmethods = ['dense']", [RECIPES, "did you mean 'cifar100-resnet20'?"]),
        ("[[cells]]\nmethods = ['fether']\nsparsities = [0.9]", [METHODS, "did you mean 'feather'?"]),
        ("[options]\nmodel = 'densenet'\n[[cells]]\nmethods = ['dense']", [MODELS, "did you mean 'densenet40-24'?"]),
    ],
)
def test_a_grid_file_proposes_the_nearest_name(tmp_path, capsys, text, words) -> None:
    (tmp_path / "grid.toml").write_text(text)
    assert cli.main(["compare", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["warmup", "--dtype", "float46"],
            ["--dtype must be one of float32, bfloat16, float16, float64", "'float64'?"],
        ),
        (["selftest", "--device", "cpu", "--require", "ccp"], ["--require must be one of triton, cuda, cpp", "'cpp'?"]),
    ],
)
def test_other_commands_propose_the_nearest_name(capsys, arguments, words) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []
    assert error.count("\n") == 1


def test_the_most_alike_name_comes_first_and_unlike_ones_are_left_out() -> None:
    known = ["resnet20", "resnet20-16", "mobilenetv1", "cnn"]
    assert nearest("resnet2016", known) == ["resnet20-16", "resnet20"]
    assert nearest("RESNET20", known, count=1) == ["resnet20"]
    assert nearest("vgg", known) == []
    assert str(unknown_name("--model", "vgg", ["cnn"])) == "--model must be one of cnn, got 'vgg'"

"""``feather-kernels train``: the data that it takes, and the options, files and folders that it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from feather_kernels.backends.registry import registry
from feather_kernels.cli.train import batches, data
from feather_kernels.cli.train.models import make_model
from feather_kernels.sparsify import Sparsifier
from tests.support.train_runs import (
    FILES,
    IMAGES,
    make_npz,
    train,
)

np = pytest.importorskip("numpy")
safetensors_torch = pytest.importorskip("safetensors.torch")


# ------------------------------------------------------------------------------------------------ npz data


@pytest.mark.parametrize(
    ("shape", "label_shape", "augmented"),
    [((9, 7), (), False), ((32, 32), (1,), False), ((8, 8, 3), (1,), False), ((32, 32, 3), (1,), True)],
    ids=str,
)
def test_npz_data_train(tmp_path, monkeypatch, shape, label_shape, augmented):
    steps = []
    plain = batches.augment
    monkeypatch.setattr(batches, "augment", lambda images, seed, step: steps.append(step) or plain(images, seed, step))
    path = make_npz(tmp_path / "bright.npz", shape, label_shape)
    assert train(tmp_path / "runs", "--data", path, "--epochs", "2", "--batch-size", "10", "--sparsity", "0.5") == 0
    assert steps == (list(range(8)) if augmented else [])
    folder = tmp_path / "runs/bright-cnn-0.5"
    facts = json.loads((folder / "config.json").read_text())["data"]
    assert facts["image_shape"] == [*shape, 1][:3]
    assert (facts["train_images"], facts["test_images"], facts["classes"]) == (40, 20, 4)
    state = safetensors_torch.load_file(folder / "model.safetensors")
    make_model("cnn", facts["image_shape"][2], 4, seed=0).load_state_dict(state, strict=True)


@pytest.mark.parametrize("name", ["FashionMNIST", "CIFAR10", "CIFAR100"])
def test_torchvision_data(monkeypatch, tmp_path, name):
    datasets = pytest.importorskip("torchvision.datasets")
    shape = (28, 28) if name == "FashionMNIST" else (32, 32, 3)

    class Fake:
        def __init__(self, root, train, download):
            assert (root, download) == (str(tmp_path), True)
            images = np.full((3 if train else 2, *shape), 9, dtype=np.uint8)
            self.data = torch.from_numpy(images) if name == "FashionMNIST" else images
            self.targets = list(range(len(images)))

    monkeypatch.setattr(datasets, name, Fake)
    loaded = data.load({"FashionMNIST": "fashion-mnist"}.get(name, name.lower()), str(tmp_path))
    assert loaded.image_shape == (*shape, 1)[:3]
    assert loaded.y_train.tolist() == [0, 1, 2]
    assert loaded.y_test.tolist() == [0, 1]


def test_a_failed_download_is_one_line(monkeypatch, tmp_path, capsys):
    datasets = pytest.importorskip("torchvision.datasets")

    def fail(*arguments, **options):
        raise RuntimeError("Dataset not found\nor corrupted.")

    monkeypatch.setattr(datasets, "CIFAR10", fail)
    check_refused(capsys, tmp_path / "runs", ["--data", "cifar10"], "--data", "CIFAR10", "not found or corrupted")


# ------------------------------------------------------------------------------------------------ bad input


def check_refused(capsys, runs: Path, options: list[str], *words: str) -> None:
    """Exit code 2, one line on stderr with the words, nothing on stdout, no folder."""
    capsys.readouterr()
    assert train(runs, *options) == 2
    output = capsys.readouterr()
    assert output.err.startswith("feather-kernels: error: ")
    assert output.err.count("\n") == 1
    assert [word for word in words if word not in output.err] == []
    assert output.out == ""
    assert not runs.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sparsity", "95"], ["--sparsity must be in [0, 1), got 95", "not a percentage"]),
        (["--sparsity", "1"], ["--sparsity must be in [0, 1), got 1"]),
        (["--sparsity", "-0.1"], ["--sparsity", "-0.1"]),
        (["--sparsity", "nan"], ["--sparsity", "nan"]),
        (["--sparsity", "high"], ["--sparsity", "high"]),
        (["--epochs", "0"], ["--epochs must be at least 1, got 0"]),
        (["--epochs", "-3"], ["--epochs", "-3"]),
        (["--batch-size", "0"], ["--batch-size must be at least 1, got 0"]),
        (["--lr", "0"], ["--lr must be positive", "got 0"]),
        (["--lr", "inf"], ["--lr", "inf"]),
        (["--weight-decay", "-1"], ["--weight-decay", "-1"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--threads", "0"], ["--threads", "got 0"]),
        (["--dtype", "float16"], ["--dtype must be one of float32, bfloat16, got 'float16'"]),
        (["--device", "tpu"], ["--device must be cpu, cuda or cuda:N, got 'tpu'"]),
        (["--device", "meta"], ["--device", "'meta'"]),
        (["--device", "cuda:99"], ["--device", "cuda:99"]),
        (
            ["--model", "vgg"],
            ["--model must be one of cnn, resnet20, resnet20-16, mobilenetv1, densenet40-24 or torchvision:", "'vgg'"],
        ),
        (["--data", "mnist"], ["--data must be one of digits, fashion-mnist, cifar10, cifar100", "'mnist'"]),
        (["--data", "absent.npz"], ["--data", "'absent.npz'", "no such file"]),
        (["--name", "a/b"], ["--name", "'a/b'"]),
        (["--name", ".."], ["--name", "'..'"]),
        (["--name", ""], ["--name", "''"]),
        (["--epoch", "3"], ["--epoch 3"]),
    ],
    ids=lambda value: "=".join(value) if value and value[0].startswith("--") and len(value) == 2 else "",
)
def test_bad_options_are_refused(capsys, tmp_path, options, words):
    check_refused(capsys, tmp_path / "runs", options, *words)


LABELS = np.arange(40) % 4


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"y_test": None}, ["missing y_test"]),
        ({"x_train": None, "y_train": None}, ["missing x_train, y_train"]),
        (
            {"x_train": IMAGES.astype(np.float32)},
            ["x_train must be uint8, got float32 (scale to 0 to 255 and convert to uint8)"],
        ),
        ({"x_train": IMAGES[:, 0]}, ["x_train must have shape", "(40, 8)"]),
        (
            {"x_train": np.zeros((40, 3, 8, 8), np.uint8)},
            ["x_train", "at most 4 channels", "(40, 3, 8, 8) (move the channels last)"],
        ),
        ({"x_test": IMAGES[:0]}, ["x_test", "at least one image", "(0, 8, 8)"]),
        ({"x_test": IMAGES[:20, :7]}, ["x_test must have the image shape of x_train (8, 8, 1), got (7, 8, 1)"]),
        ({"y_train": LABELS[:39]}, ["x_train and y_train must have the same length, got 40 and 39"]),
        ({"y_train": LABELS.astype(np.float64)}, ["y_train must be integers, got float64"]),
        ({"y_train": np.eye(4, dtype=np.int64)[LABELS]}, ["y_train must have shape (N,) or (N, 1)", "(40, 4)"]),
        ({"y_train": LABELS - 1}, ["y_train must have labels in [0, ", "got -1"]),
        ({"y_test": LABELS[:20] + 1}, ["y_test must have labels in [0, 4) as y_train has, got 4"]),
        ({"y_train": np.full(40, 2**63, dtype=np.uint64)}, ["y_train must have labels in [0, ", str(2**63)]),
        ({"x_train": np.array([None] * 40)}, ["--data", "numpy"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_npz_files_are_refused(capsys, tmp_path, replaced, words):
    path = make_npz(tmp_path / "bad.npz", (8, 8), **replaced)
    check_refused(capsys, tmp_path / "runs", ["--data", path], "--data", path, *words)


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (LABELS + 1, "\nnote: y_train has no image of 1 of 5 classes: 0 (labels count from 0)\n"),
        (
            LABELS * 4,
            "\nnote: y_train has no image of 9 of 13 classes: 1, 2, 3, 5, 6 and 4 more (labels count from 0)\n",
        ),
        (LABELS, ""),
    ],
)
def test_classes_without_images_are_noted(capsys, tmp_path, labels, note):
    path = make_npz(tmp_path / "own.npz", (8, 8), y_train=labels, y_test=labels[:20])
    assert train(tmp_path / "runs", "--data", path, "--epochs", "1") == 0
    output = capsys.readouterr().out
    assert note in output
    assert ("note:" in output) == bool(note)


def test_files_that_are_no_npz_are_refused(capsys, tmp_path):
    text, array, cut = tmp_path / "text.npz", tmp_path / "array.npz", tmp_path / "cut.npz"
    text.write_text("x_train")
    np.save(tmp_path / "array.npy", IMAGES)
    (tmp_path / "array.npy").rename(array)
    whole = Path(make_npz(tmp_path / "whole.npz", (8, 8))).read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    for path in (text, array, cut):
        check_refused(capsys, tmp_path / "runs", ["--data", str(path)], "--data must be an .npz file", str(path))
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(whole[:1000] + bytes(500) + whole[1500:])
    check_refused(capsys, tmp_path / "runs", ["--data", str(damaged)], "--data must be an .npz file", str(damaged))


def test_a_single_image_of_4_pixels_cannot_be_normalised(capsys, tmp_path):
    path = make_npz(tmp_path / "small.npz", (4, 4))
    check_refused(
        capsys, tmp_path / "runs", ["--data", path, "--batch-size", "1"], "--batch-size", "got 1", "batch norm"
    )


def test_a_used_name_is_refused_and_an_empty_folder_is_not(capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    assert train(tmp_path, "--name", "mine") == 2
    assert "--name must be a new run, got 'mine'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]
    (tmp_path / "empty").mkdir()
    assert train(tmp_path, "--name", "empty", "--epochs", "1") == 0
    assert {path.name for path in (tmp_path / "empty").iterdir()} == FILES


def test_runs_must_be_a_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for runs in (tmp_path / "file", tmp_path / "file/runs"):
        assert train(runs) == 2
        error = capsys.readouterr().err
        assert f"--runs must be a folder that can be written to, got {str(runs)!r}" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("package", ["numpy", "rich", "matplotlib", "safetensors", "sklearn"])
def test_a_missing_package_names_the_extra(capsys, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    check_refused(capsys, tmp_path / "runs", [], package, 'pip install "feather_kernels[train]"')


def test_an_unknown_backend_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FEATHER_KERNELS_BACKEND", "abacus")
    registry.reset()
    check_refused(capsys, tmp_path / "runs", [], "FEATHER_KERNELS_BACKEND", "'abacus'", "reference")
    registry.reset()


@pytest.mark.parametrize("options", [[], ["--resume", "no-such-run"]], ids=str)
def test_processes_that_cannot_find_each_other_are_refused(capsys, tmp_path, monkeypatch, options):
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    wanted = "WORLD_SIZE=2 needs LOCAL_RANK, MASTER_ADDR, MASTER_PORT", "torchrun"
    check_refused(capsys, tmp_path / "runs", options, *wanted)


def test_one_process_of_torchrun_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert train(tmp_path / "runs") == 0


def test_bugs_keep_their_traceback(tmp_path, monkeypatch):
    def fail(self):
        raise ValueError("a bug")

    monkeypatch.setattr(Sparsifier, "step", fail)
    with pytest.raises(ValueError, match="a bug"):
        train(tmp_path)

"""``feather-kernels train``: models, batches, data, files, bad input, determinism, interruption and resumption."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from feather_kernels import cli
from feather_kernels.sparsify import Sparsifier, select_layers

np = pytest.importorskip("numpy")
safetensors_torch = pytest.importorskip("safetensors.torch")
for module in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(module)

from feather_kernels.recipes import batches, data  # noqa: E402
from feather_kernels.recipes.models import MODELS, make_model  # noqa: E402

COLUMNS = [
    *("epoch", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
    *("sparsity_target", "sparsity", "threshold", "lr", "seconds"),
]
FILES = {"checkpoint.pt", "config.json", "metrics.csv", "model.safetensors", "report.md", "report.png"}
EPOCHS, STEPS = 3, 12  # of the short run: 1,437 digits in batches of at most 128
SHORT = ["--epochs", str(EPOCHS), "--batch-size", "128", "--seed", "3", "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True, scope="module")
def process_settings():
    """The command sets threads and cuDNN of its process, which here is that of all tests."""
    threads, deterministic = torch.get_num_threads(), torch.backends.cudnn.deterministic
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = deterministic


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> Path:
    """An uninterrupted run of 3 epochs on the digits."""
    runs = tmp_path_factory.mktemp("runs")
    assert train(runs, "--name", "short") == 0
    return runs / "short"


def train(runs: Path, *options: str) -> int:
    """Exit code of a run in this process; later options win over those of the short run."""
    return cli.main(["train", "--runs", str(runs), *SHORT, *options])


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same_run(folder: Path, reference: Path) -> None:
    """Every file is there and nothing else; the same model bytes; the same metrics but for the seconds."""
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    rows, expected = read_rows(folder), read_rows(reference)
    assert [{**row, "seconds": ""} for row in rows] == [{**row, "seconds": ""} for row in expected]


# ------------------------------------------------------------------------------------------------ models, batches


@pytest.mark.parametrize(("name", "numel"), [("resnet20", 1_092_960), ("resnet20-16", 276_656)])
def test_resnet20_has_the_prunable_weights_of_the_paper(name, numel):
    weights, skipped = select_layers(make_model(name, channels=3, classes=100, seed=0))
    assert len(weights) == 22
    assert not skipped
    assert sum(weight.modules[0].weight.numel() for weight in weights) == numel


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 5, 3), (4, 1, 1)], ids=str)
def test_models_take_any_image(name, shape):
    model = make_model(name, channels=shape[0], classes=7, seed=0)
    assert model(torch.zeros(2, *shape)).shape == (2, 7)


def test_a_model_is_a_function_of_its_seed_and_leaves_torchs_generator_alone():
    state = torch.get_rng_state()
    first, same, other = (make_model("cnn", 1, 10, seed).conv1.weight for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("images", "batch_size"), [(1437, 256), (10, 3), (129, 128), (5, 100), (4, 1)])
def test_batches_hold_every_image_once_and_have_even_sizes(images, batch_size):
    found = batches.epoch_batches(images, batch_size, seed=0, epoch=0)
    sizes = [len(batch) for batch in found]
    assert sorted(torch.cat(found).tolist()) == list(range(images))
    assert len(found) == batches.steps_per_epoch(images, batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return torch.cat(batches.epoch_batches(100, 10, seed, epoch)).tolist()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_augmentation_crops_the_padded_image_and_flips():
    images = torch.randint(1, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = batches.augment(images, seed=0, step=5)
    offsets = range(9)
    seen = set()
    for image, crop in zip(images, result, strict=True):
        padded = torch.zeros(40, 40, 3, dtype=torch.uint8)
        padded[4:36, 4:36] = image
        crops = {(y, x, f): padded[y : y + 32, x : x + 32] for y in offsets for x in offsets for f in (False, True)}
        found = [key for key, value in crops.items() if torch.equal(value.flip(1) if key[2] else value, crop)]
        assert len(found) == 1
        seen.add(found[0])
    assert {flip for _, _, flip in seen} == {False, True}
    assert len({y for y, _, _ in seen}) == len({x for _, x, _ in seen}) == 9
    assert torch.equal(result, batches.augment(images, seed=0, step=5))
    assert not torch.equal(result, batches.augment(images, seed=0, step=6))


def test_normalisation_is_by_channel_and_channels_last():
    images = torch.randint(256, (50, 6, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[..., 2] = 7  # a constant channel must not divide by zero
    normalised = batches.Normalisation(images)(images)
    assert normalised.shape == (50, 3, 6, 5)
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    values = images.double().flatten(0, 2)
    expected = (values - values.mean(0)) / values.std(0, correction=0).where(values.std(0) > 0, 1)
    torch.testing.assert_close(normalised.permute(0, 2, 3, 1).flatten(0, 2).double(), expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ one run


def test_run_writes_its_files(short_run):
    assert {path.name for path in short_run.iterdir()} == FILES
    assert (short_run / "report.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "| classifier | 10x128 | 1280 |" in (short_run / "report.md").read_text()


def test_metrics_have_a_row_per_epoch(short_run):
    rows = read_rows(short_run)
    assert list(rows[0]) == COLUMNS
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [int(row["step"]) for row in rows] == [STEPS, 2 * STEPS, 3 * STEPS]
    total = EPOCHS * STEPS
    for row in rows:
        step = int(row["step"])
        target = 0.95 * (1 - max(0, 1 - step / (total // 2)) ** 3)
        assert float(row["sparsity_target"]) == pytest.approx(target)
        assert float(row["sparsity"]) == pytest.approx(target, abs=2e-5)  # 93,728 weights
        assert float(row["lr"]) == pytest.approx(0.05 * (1 + math.cos(math.pi * (step - 1) / total)))
        assert float(row["threshold"]) > 0
        assert float(row["seconds"]) > 0
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[-1]["test_accuracy"]) > 0.8


def test_config_has_every_resolved_option(short_run):
    content = json.loads((short_run / "config.json").read_text())
    options = {name: content["options"][name] for name in ("data", "model", "sparsity", "epochs", "batch_size", "seed")}
    assert options == {"data": "digits", "model": "cnn", "sparsity": 0.95, "epochs": 3, "batch_size": 128, "seed": 3}
    assert content["options"]["lr"] == 0.1
    assert content["options"]["weight_decay"] == 5e-4
    assert content["versions"]["torch"] == torch.__version__


def test_model_file_is_a_plain_model_with_the_zeros_promised(short_run):
    state = safetensors_torch.load_file(short_run / "model.safetensors")
    make_model("cnn", 1, 10, seed=99).load_state_dict(state, strict=True)
    names = [f"{name}.weight" for name in ("conv1", "conv2", "conv3", "classifier")]
    zeros = sum(int((state[name] == 0).sum()) for name in names)
    latent = torch.load(short_run / "checkpoint.pt", weights_only=True)["model"]
    magnitudes = torch.cat([latent[name].abs().flatten() for name in names]).sort().values
    rank = math.floor((len(magnitudes) - 1) * 0.95)
    ties = int((magnitudes[rank + 1 :] == magnitudes[rank]).sum())
    assert zeros == rank + 1 + ties


def test_accuracy_is_that_of_the_saved_model_before_and_after_finalize(tmp_path, capsys):
    assert train(tmp_path, "--name", "one", "--epochs", "1") == 0
    line = re.search(r"before finalize (\S+) \((\d+) of (\d+) images\), after (.*)", capsys.readouterr().out)
    assert line is not None
    assert line[4] == f"{line[1]} ({line[2]} of {line[3]} images)"
    assert int(line[2]) / int(line[3]) == float(read_rows(tmp_path / "one")[-1]["test_accuracy"])

    model = make_model("cnn", 1, 10, seed=99).eval()
    model.load_state_dict(safetensors_torch.load_file(tmp_path / "one" / "model.safetensors"))
    digits = data.load("digits", "")
    with torch.no_grad():
        logits = model(batches.Normalisation(digits.x_train)(digits.x_test))
    assert int((logits.argmax(1) == digits.y_test).sum()) == int(line[2])


def test_two_runs_of_one_seed_are_the_same_and_of_two_seeds_are_not(short_run, tmp_path):
    assert train(tmp_path, "--name", "again") == 0
    assert_same_run(tmp_path / "again", short_run)
    assert train(tmp_path, "--name", "other", "--seed", "4") == 0
    assert (tmp_path / "other/model.safetensors").read_bytes() != (short_run / "model.safetensors").read_bytes()


def test_without_a_name_runs_are_numbered(tmp_path, capsys):
    for _ in range(2):
        assert train(tmp_path, "--epochs", "1", "--sparsity", "0.5") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-cnn-0.5", "digits-cnn-0.5-2"]


def test_sparsity_0_trains_dense(tmp_path):
    assert train(tmp_path, "--name", "dense", "--sparsity", "0") == 0
    rows = read_rows(tmp_path / "dense")
    assert {(row["sparsity_target"], row["sparsity"], row["threshold"]) for row in rows} == {("0.0", "0.0", "0.0")}
    assert float(rows[-1]["test_accuracy"]) > 0.8
    latent = torch.load(tmp_path / "dense/checkpoint.pt", weights_only=True)["model"]
    state = safetensors_torch.load_file(tmp_path / "dense/model.safetensors")
    assert all(torch.equal(state[name], latent[name]) for name in latent)


def test_bfloat16_is_another_run_that_trains(short_run, tmp_path):
    assert train(tmp_path, "--name", "bf16", "--dtype", "bfloat16") == 0
    rows = read_rows(tmp_path / "bf16")
    assert [row["train_loss"] for row in rows] != [row["train_loss"] for row in read_rows(short_run)]
    assert float(rows[-1]["test_accuracy"]) > 0.8
    assert safetensors_torch.load_file(tmp_path / "bf16/model.safetensors")["conv1.weight"].dtype == torch.float32


def test_a_terminal_gets_bars(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert train(tmp_path, "--epochs", "2") == 0
    output = capsys.readouterr().out
    assert "━" in output
    for text in ("training", "images/s", "epoch 2/2", "sparsity 0.95"):
        assert text in output


def test_elsewhere_there_is_one_plain_line_per_epoch(tmp_path, capsys):
    assert train(tmp_path, "--epochs", "2") == 0
    output = capsys.readouterr().out
    assert len(re.findall(r"^epoch \d/2  train loss", output, re.MULTILINE)) == 2
    assert "━" not in output
    assert "\x1b" not in output


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_defaults_reach_95_percent(tmp_path, seed):
    assert cli.main(["train", "--runs", str(tmp_path), "--seed", str(seed), "--threads", "1", "--device", "cpu"]) == 0
    rows = read_rows(tmp_path / "digits-cnn-0.95")
    assert float(rows[-1]["test_accuracy"]) >= 0.95


# ------------------------------------------------------------------------------------------------ npz data


def make_npz(path: Path, shape: tuple[int, ...], label_shape: tuple[int, ...] = (), **replaced) -> str:
    """40 training and 20 test images whose brightness is their class; ``replaced`` arrays win, None leaves one out."""
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 40), ("test", 20)):
        labels = np.arange(count) % 4
        noise = random.integers(0, 60, (count, *shape))
        arrays[f"x_{part}"] = (noise + 60 * labels.reshape(-1, *[1] * len(shape))).astype(np.uint8)
        arrays[f"y_{part}"] = labels.reshape(count, *label_shape)
    arrays.update(replaced)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


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
        (["--model", "vgg"], ["--model must be one of cnn, resnet20, resnet20-16, got 'vgg'"]),
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


IMAGES = np.zeros((40, 8, 8), dtype=np.uint8)
LABELS = np.arange(40) % 4


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"y_test": None}, ["missing y_test"]),
        ({"x_train": None, "y_train": None}, ["missing x_train, y_train"]),
        ({"x_train": IMAGES.astype(np.float32)}, ["x_train must be uint8, got float32"]),
        ({"x_train": IMAGES[:, 0]}, ["x_train must have shape", "(40, 8)"]),
        ({"x_train": np.zeros((40, 3, 8, 8), np.uint8)}, ["x_train", "at most 4 channels", "(40, 3, 8, 8)"]),
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
    check_refused(capsys, tmp_path / "runs", [], "FEATHER_KERNELS_BACKEND", "'abacus'", "reference")


def test_bugs_keep_their_traceback(tmp_path, monkeypatch):
    def fail(self):
        raise ValueError("a bug")

    monkeypatch.setattr(Sparsifier, "step", fail)
    with pytest.raises(ValueError, match="a bug"):
        train(tmp_path)


# ------------------------------------------------------------------------------------------------ stop and resume


def resume(folder: Path, *options: str) -> int:
    return cli.main(["train", "--resume", str(folder), *options])


def do_at_step(monkeypatch, number: int, action) -> None:
    """Call ``action()`` inside the given optimizer step of this process, counted from 1."""
    calls = []
    plain = Sparsifier.step

    def step(self):
        calls.append(1)
        if len(calls) == number:
            action()
        plain(self)

    monkeypatch.setattr(Sparsifier, "step", step)


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (signal.SIGINT, 1),
        (signal.SIGINT, STEPS + 3),
        (signal.SIGTERM, 2 * STEPS),  # the epoch's evaluation is then left to the resumed run
        (signal.SIGINT, EPOCHS * STEPS),
    ],
)
def test_a_signal_ends_the_step_and_the_resumed_run_is_the_same(short_run, tmp_path, monkeypatch, capsys, number, step):
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    with monkeypatch.context() as patch:
        do_at_step(patch, step, lambda: signal.raise_signal(number))
        assert train(tmp_path, "--name", "stopped") == 130
    folder = tmp_path / "stopped"
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers
    output = capsys.readouterr().out
    assert f"interrupted at step {step} of {EPOCHS * STEPS}" in output
    assert f"feather-kernels train --resume {folder}\n" in output
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == step
    assert checkpoint["sums"]["images"] > 0
    assert len(read_rows(folder)) == len(checkpoint["rows"]) == (step - 1) // STEPS
    assert resume(folder) == 0
    assert f"resumed at step {step}" in capsys.readouterr().out
    assert_same_run(folder, short_run)


def test_a_run_can_be_stopped_twice(short_run, tmp_path, monkeypatch):
    for step, run in ((STEPS + 1, lambda: train(tmp_path, "--name", "twice")), (5, lambda: resume(tmp_path / "twice"))):
        with monkeypatch.context() as patch:
            do_at_step(patch, step, lambda: signal.raise_signal(signal.SIGINT))
            assert run() == 130
    assert torch.load(tmp_path / "twice/checkpoint.pt", weights_only=True)["step"] == 18
    assert resume(tmp_path / "twice") == 0
    assert_same_run(tmp_path / "twice", short_run)


KILLED_RUN = """
import os, signal, sys
from feather_kernels import cli
from feather_kernels.sparsify import Sparsifier

where, count = sys.argv[1], int(sys.argv[2])
replace, step = os.replace, Sparsifier.step

def die_at(reached):
    global count
    count -= reached
    if reached and count == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def dying_replace(source, target):
    die_at(os.path.basename(target) == where)
    replace(source, target)

def dying_step(self):
    die_at(where == "step")
    step(self)

os.replace, Sparsifier.step = dying_replace, dying_step
cli.main(sys.argv[3:])
"""


@pytest.mark.parametrize(
    ("where", "count", "epochs_kept"),
    [("step", STEPS + 3, 1), ("checkpoint.pt", 3, 1), ("report.png", 1, 3)],
)
def test_a_killed_run_is_resumed_bit_for_bit(short_run, tmp_path, where, count, epochs_kept):
    """SIGKILL inside a step, or between the writing of a file and its renaming."""
    command = ["train", "--runs", str(tmp_path), "--name", "killed", *SHORT]
    killed = subprocess.run([sys.executable, "-c", KILLED_RUN, where, str(count), *command], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    folder = tmp_path / "killed"
    assert len(torch.load(folder / "checkpoint.pt", weights_only=True)["rows"]) == epochs_kept
    assert resume(folder) == 0
    assert_same_run(folder, short_run)


def test_a_finished_run_says_so(short_run, capsys):
    before = {path.name: path.read_bytes() for path in short_run.iterdir()}
    assert resume(short_run, "--threads", "1") == 0
    assert f"{short_run} is finished" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in short_run.iterdir()} == before


def check_resume_refused(capsys, folder: Path, options: list[str], *words: str) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*")} if folder.is_dir() else {}
    capsys.readouterr()
    assert resume(folder, *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert [word for word in words if word not in error] == []
    assert ({path: path.read_bytes() for path in folder.rglob("*")} if folder.is_dir() else {}) == before


def test_resume_takes_no_other_options(short_run, capsys):
    check_resume_refused(capsys, short_run, ["--epochs", "5", "--data-dir", "x"], "--resume", "--epochs", "--data-dir")


@pytest.fixture
def stopped_run(short_run, tmp_path) -> Path:
    """A copy of the short run that lacks its results, so that it can be resumed."""
    folder = tmp_path / "stopped"
    shutil.copytree(short_run, folder)
    (folder / "report.png").unlink()
    return folder


def test_resume_needs_a_run_folder(stopped_run, tmp_path, capsys):
    check_resume_refused(capsys, tmp_path / "absent", [], "--resume", "absent", "no such folder")
    (stopped_run / "config.json").rename(tmp_path / "config.json")
    check_resume_refused(capsys, stopped_run, [], "--resume", str(stopped_run), "no config.json")
    (tmp_path / "config.json").rename(stopped_run / "config.json")
    (stopped_run / "checkpoint.pt").unlink()
    check_resume_refused(capsys, stopped_run, [], "--resume", str(stopped_run), "no checkpoint.pt")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\xfe", b"{}", b'{"options": {"data": "digits"}}', b'{"options": 3}'], ids=str
)
def test_resume_refuses_a_damaged_config(stopped_run, capsys, content):
    (stopped_run / "config.json").write_bytes(content)
    check_resume_refused(capsys, stopped_run, [], "--resume", "config.json")


@pytest.mark.parametrize(("option", "value"), [("epochs", "3"), ("sparsity", 95), ("model", "vgg"), ("lr", None)])
def test_resume_refuses_a_config_with_a_bad_option(stopped_run, capsys, option, value):
    content = json.loads((stopped_run / "config.json").read_text())
    content["options"][option] = value
    (stopped_run / "config.json").write_text(json.dumps(content))
    check_resume_refused(capsys, stopped_run, [], "config.json", option, str(value))


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "list", "keys", "model"])
def test_resume_refuses_a_damaged_checkpoint(stopped_run, capsys, damage):
    path = stopped_run / "checkpoint.pt"
    content = path.read_bytes()
    state = torch.load(path, weights_only=True)
    if damage in ("empty", "cut", "text"):
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"hello world"}[damage])
    elif damage == "list":
        torch.save([1], path)
    elif damage == "keys":
        torch.save({"model": state["model"]}, path)
    else:
        torch.save({**state, "model": make_model("resnet20-16", 1, 10, 0).state_dict()}, path)
    check_resume_refused(capsys, stopped_run, [], "--resume", "checkpoint.pt", str(stopped_run))


def test_resume_refuses_other_data(tmp_path, monkeypatch, capsys):
    path = make_npz(tmp_path / "bright.npz", (8, 8))
    with monkeypatch.context() as patch:
        do_at_step(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
        assert train(tmp_path, "--name", "stopped", "--data", path) == 130
    make_npz(tmp_path / "bright.npz", (8, 8), x_test=IMAGES[:20])
    check_resume_refused(capsys, tmp_path / "stopped", [], "--resume", "data", "crc32")
    (tmp_path / "bright.npz").unlink()
    check_resume_refused(capsys, tmp_path / "stopped", [], "--data", path, "no such file")

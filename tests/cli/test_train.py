"""``feather-kernels train``: models, batches, and what one run writes and prints."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys

import pytest
import torch

from feather_kernels import cli
from feather_kernels.cli.train import batches, data, load_model
from feather_kernels.cli.train.models import MODELS, make_model
from feather_kernels.sparsify import LayerChoice, choose_weights
from tests.support.train_runs import (
    EPOCHS,
    FILES,
    STEPS,
    read_rows,
    train,
)

safetensors_torch = pytest.importorskip("safetensors.torch")

COLUMNS = [
    *("epoch", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
    *("sparsity_target", "sparsity", "threshold", "lr", "seconds"),
]


# ------------------------------------------------------------------------------------------------ models, batches


@pytest.mark.parametrize(("name", "numel"), [("resnet20", 1_092_960), ("resnet20-16", 276_656)])
def test_resnet20_has_the_prunable_weights_of_the_paper(name, numel):
    weights, skipped, _ = choose_weights(make_model(name, channels=3, classes=100, seed=0), LayerChoice())
    assert len(weights) == 22
    assert not skipped
    assert sum(weight.parameter.numel() for weight in weights) == numel


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


def test_the_results_give_no_advice_about_options_that_train_does_not_have(tmp_path, capsys, recwarn):
    assert train(tmp_path, "--name", "few", "--epochs", "1", "--sparsity", "0.9995") == 0
    output = capsys.readouterr().out
    for text in (output, (tmp_path / "few/report.md").read_text()):
        assert "empty, with no weight left\n" in text
        for option in ("min_density", "recompute"):
            assert option not in text
    assert [str(warning.message) for warning in recwarn if "no weight left" in str(warning.message)] == []


def test_load_model_rebuilds_the_network_that_was_evaluated(short_run):
    digits, model = data.load("digits", ""), load_model(short_run)
    assert not model.training
    answers = model(batches.Normalisation(digits.x_train)(digits.x_test)).argmax(1)
    accuracy = (answers == digits.y_test).double().mean().item()
    assert accuracy == pytest.approx(float(read_rows(short_run)[-1]["test_accuracy"]), abs=1 / len(digits.y_test))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_load_model_refuses_a_run_that_is_not_finished(short_run, tmp_path, missing):
    shutil.copytree(short_run, tmp_path / "copy")
    (tmp_path / "copy" / missing).unlink()
    with pytest.raises(ValueError, match=f"folder must be that of a finished run, got '.*copy': no {missing}"):
        load_model(tmp_path / "copy")


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

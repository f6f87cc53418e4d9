"""The scripts in examples/ run on generated images."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

Image = pytest.importorskip("PIL.Image")
resnet = pytest.importorskip("torchvision.models.resnet")

REPOSITORY = Path(__file__).parents[2]
IMAGENET = REPOSITORY / "examples/imagenet_resnet50.py"
SHORT = (
    *("--epochs", "2", "--warmup-epochs", "1", "--batch-size", "4", "--image-size", "32"),
    *("--workers", "0", "--device", "cpu"),
)
VAL_IMAGES = 3  # per class: two processes have no equal shares, and may count none twice


def make_images(folder: Path) -> Path:
    """Two classes of 64x64 JPEGs, dark and bright: 8 to train on, 2 steps of 4, and 6 to evaluate."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 4), ("val", VAL_IMAGES)):
        for label, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(label * 128, label * 128 + 128, (64, 64, 3), generator=generator)
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / part / name / f"{number}.JPEG")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


@pytest.fixture
def imagenet(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with a ResNet of one block a stage instead of three to six."""
    spec = importlib.util.spec_from_file_location("imagenet_resnet50", IMAGENET)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "resnet50", lambda num_classes: resnet.ResNet(resnet.Bottleneck, [1] * 4, num_classes))
    return module


def prunable_zeros(state: dict[str, Tensor]) -> tuple[int, int]:
    """Zeros among the weights of layers, and how many weights there are."""
    weights = [weight for weight in state.values() if weight.dim() > 1]
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


def assert_sparse(state: dict[str, Tensor], sparsity: float) -> None:
    zeros, weights = prunable_zeros(state)
    assert 0 <= zeros - (math.floor((weights - 1) * sparsity) + 1) <= 8  # ties


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(state[name], value)]
    assert different == []


def fails_with(imagenet: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr with which the script ends."""
    with pytest.raises(SystemExit) as ended:
        imagenet.main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1, printed
    return printed


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_imagenet_trains_to_the_sparsity_asked_for_and_writes_a_plain_model(imagenet, images, tmp_path, capsys, dtype):
    output = tmp_path / "run"
    imagenet.main([str(images), "--output", str(output), *SHORT, "--sparsity", "0.8", "--dtype", dtype])
    assert {path.name for path in output.iterdir()} == {"checkpoint.pt", "model.pt"}
    state = torch.load(output / "model.pt", weights_only=True)
    assert_sparse(state, 0.8)
    imagenet.resnet50(num_classes=2).load_state_dict(state)  # the keys of the dense model
    first, second, final = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 1/2: loss ")
    assert second.startswith("epoch 2/2: loss ")
    assert "sparsity 0.8000" in second
    assert final.startswith("final: top-1 ")
    assert final.endswith(" %, sparsity 0.8000")


def test_imagenet_warms_up_and_follows_a_cosine_to_zero_at_a_rate_by_the_batch(imagenet, images, tmp_path):
    trainer = imagenet.Trainer(imagenet.parse([str(images), *SHORT, "--epochs", "4"]))
    rates = []
    trainer.optimizer.register_step_pre_hook(lambda *_: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    for _ in range(4):
        trainer.train_epoch()
    peak = 0.1 * 4 / 256
    cosine = [peak * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert rates == pytest.approx([peak / 2, peak, *cosine])
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert trainer.sparsifier.step_count == 8


def test_imagenet_counts_no_step_that_the_scaler_of_float16_skips(imagenet, images):
    trainer = imagenet.Trainer(imagenet.parse([str(images), *SHORT, "--epochs", "6", "--dtype", "float16"]))
    taken = []  # the scaler does not call the optimizer in steps that it skips
    trainer.optimizer.register_step_post_hook(lambda *_: taken.append(1))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    for _ in range(2):
        trainer.train_epoch()
    assert trainer.sparsifier.step_count == trainer.scheduler.last_epoch == len(taken) < 4
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    before = len(taken)
    trainer.train_epoch()
    assert trainer.sparsifier.step_count == trainer.scheduler.last_epoch == len(taken) == before + 2


def test_imagenet_continues_an_interrupted_run_bit_for_bit(imagenet, images, tmp_path, monkeypatch, capsys):
    run = [str(images), *SHORT, "--workers", "1", "--epochs", "3", "--output"]
    imagenet.main([*run, str(tmp_path / "whole")])
    train_epoch = imagenet.Trainer.train_epoch

    def interrupted(trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt
        return train_epoch(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(imagenet.Trainer, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            imagenet.main([*run, str(tmp_path / "parts")])
    capsys.readouterr()
    error = fails_with(imagenet, capsys, *run, tmp_path / "parts")
    assert "which holds a run (--resume?)" in error
    error = fails_with(imagenet, capsys, *run, tmp_path / "parts", "--resume", "--momentum", "0.5")
    assert "--resume must continue with the same --momentum: 0.9, got 0.5" in error
    imagenet.main([*run, str(tmp_path / "parts"), "--resume"])
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["epoch 2/3", "epoch 3/3", "final"]
    whole, parts = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "parts"))
    assert_same(parts, whole)
    error = fails_with(imagenet, capsys, *run, tmp_path / "nothing", "--resume")
    assert f"--resume needs {tmp_path}/nothing/checkpoint.pt, which is missing" in error


def test_imagenet_trains_compiled(imagenet, images, tmp_path):
    output = tmp_path / "run"
    imagenet.main([str(images), "--output", str(output), *SHORT, "--compile", "aot_eager"])
    assert_sparse(torch.load(output / "model.pt", weights_only=True), 0.9)


@pytest.mark.parametrize("workers", [0, 1])
def test_imagenet_names_the_image_that_cannot_be_decoded(imagenet, images, tmp_path, capsys, workers):
    path = images / "train/dog/2.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    error = fails_with(imagenet, capsys, images, *SHORT, "--workers", workers, "--output", tmp_path / "run")
    assert error.startswith(f"error: image cannot be decoded: {path}: ")


def test_imagenet_names_class_folders_that_are_missing_or_empty(imagenet, images, tmp_path, capsys):
    run = *SHORT, "--output", tmp_path / "run"
    for path in (images / "val/cat").iterdir():
        path.unlink()
    assert f"images must lie in {images}/val/CLASS: " in (error := fails_with(imagenet, capsys, images, *run))
    assert "classes cat." in error
    (images / "val/cat").rmdir()
    assert f"{images}/val/cat is missing" in fails_with(imagenet, capsys, images, *run)
    (images / "train").rename(images / "training")
    assert f"images must lie in {images}/train/CLASS: " in fails_with(imagenet, capsys, images, *run)
    assert not (tmp_path / "run").exists()


DRIVER = """
import os, sys
import torch
import imagenet_resnet50 as imagenet

train_epoch, run = imagenet.Trainer.train_epoch, imagenet.run

def train_epoch_or_die(trainer):
    if imagenet.RANK == 0 and trainer.epoch == int(os.environ.get("DIE_AFTER", -1)):
        os._exit(3)
    return train_epoch(trainer)

def run_and_save(options):
    torch.save(run(options).state_dict(), options.output / f"rank{imagenet.RANK}.pt")

imagenet.Trainer.train_epoch, imagenet.run = train_epoch_or_die, run_and_save
if __name__ == "__main__":
    imagenet.main()
"""  # the script, which also saves what each process has in the end, and may die


def in_two_processes(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", driver]
    paths = f"{REPOSITORY}{os.pathsep}{IMAGENET.parent}"
    return subprocess.run(
        [str(argument) for argument in (*launch, *arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def epochs_of(output: str) -> list[str]:
    return [line.split(":")[0] for line in output.splitlines()]


@pytest.mark.slow
def test_imagenet_trains_the_same_weights_in_two_processes_also_when_it_is_resumed(images, tmp_path):
    run = images, *SHORT, "--batch-size", "2", "--output"
    whole = in_two_processes(tmp_path, *run, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert epochs_of(whole.stdout) == ["epoch 1/2", "epoch 2/2", "final"]
    first, second, written = (
        torch.load(tmp_path / "whole" / name, weights_only=True) for name in ("rank0.pt", "rank1.pt", "model.pt")
    )
    assert_sparse(written, 0.9)
    assert_same(second, first)
    assert_same(written, first)

    died = in_two_processes(tmp_path, *run, tmp_path / "parts", DIE_AFTER="1")
    assert died.returncode != 0
    assert epochs_of(died.stdout) == ["epoch 1/2"]
    resumed = in_two_processes(tmp_path, *run, tmp_path / "parts", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert epochs_of(resumed.stdout) == ["epoch 2/2", "final"]
    for name in ("rank0.pt", "rank1.pt", "model.pt"):
        assert_same(torch.load(tmp_path / "parts" / name, weights_only=True), first)


@pytest.mark.slow
def test_imagenet_ends_all_processes_at_an_image_that_cannot_be_decoded(images, tmp_path):
    path = images / "train/dog/2.JPEG"
    path.write_bytes(b"")
    done = in_two_processes(tmp_path, images, *SHORT, "--batch-size", "2", "--output", tmp_path / "run")
    assert done.returncode != 0
    assert f"error: image cannot be decoded: {path}: " in done.stderr

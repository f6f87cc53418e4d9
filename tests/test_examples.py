"""The scripts in examples/, run on made-up images."""

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

REPOSITORY = Path(__file__).parent.parent
IMAGENET = REPOSITORY / "examples/imagenet_resnet50.py"
SHORT = (
    *("--epochs", "2", "--warmup-epochs", "1", "--batch-size", "4", "--image-size", "32"),
    *("--workers", "0", "--device", "cpu", "--lr", "0.5"),
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
    assert zeros == math.floor((weights - 1) * sparsity) + 1


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
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
    peak = 0.5 * 4 / 256
    cosine = [peak * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert rates == pytest.approx([peak / 2, peak, *cosine])
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert trainer.sparsifier.step_count == 8


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


def test_imagenet_trains_the_same_weights_in_two_processes(images, tmp_path):
    driver = tmp_path / "driver.py"  # the script itself, which also saves what each process has in the end
    driver.write_text(
        f"import sys; sys.path.insert(0, {str(IMAGENET.parent)!r})\n"
        "import torch, imagenet_resnet50 as imagenet\n"
        "run = imagenet.run\n"
        "def run_and_save(options):\n"
        f"    torch.save(run(options).state_dict(), f'{tmp_path}/rank{{imagenet.RANK}}.pt')\n"
        "imagenet.run = run_and_save\n"
        "if __name__ == '__main__':\n"
        "    imagenet.main()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(driver)]
    done = subprocess.run(
        [*launch, str(images), "--output", str(tmp_path / "run"), *SHORT, "--batch-size", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["epoch 1/2", "epoch 2/2", "final"]
    first, second, written = (
        torch.load(tmp_path / name, weights_only=True) for name in ("rank0.pt", "rank1.pt", "run/model.pt")
    )
    assert_sparse(written, 0.9)
    assert_same(second, first)
    assert_same(written, first)

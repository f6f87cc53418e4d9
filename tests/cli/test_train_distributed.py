"""``feather-kernels train`` under torchrun: the zeros of one process, signals, errors, uneven batches."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from feather_kernels import cli
from feather_kernels.cli.errors import InputError
from feather_kernels.cli.train import config, data, training
from feather_kernels.cli.train.ranks import Ranks
from tests.distributed.processes import Processes
from tests.support.train_runs import FILES, SHORT, STEPS, read_rows, train

safetensors_torch = pytest.importorskip("safetensors.torch")

ROOT = Path(__file__).parents[2]
ZEROS = "89,041 of 93,728 prunable weights are zero"  # floor(0.95 * 93,727) + 1 + one tie or none


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    started = Processes()
    yield started
    started.stop()


# ------------------------------------------------------------------------------------------------ under torchrun

DRIVER = """
import os, signal, sys, threading
from pathlib import Path
from feather_kernels import cli
from feather_kernels.cli.train import ranks
from feather_kernels.sparsify import Sparsifier

what, count = sys.argv[1], int(sys.argv[2])
plain, note, noted = Sparsifier.step, ranks._SharedInterruption._note, []

def step(self):
    global count
    count -= 1
    if count == 0 and os.environ["RANK"] == "1":
        if what == "fail":
            raise ValueError("a bug of one rank")
        os.kill(os.getpid(), signal.SIGINT)  # as a terminal does
        os.kill(os.getppid(), signal.SIGINT)  # torchrun, which passes it on
        while len(noted) < 2:
            threading.Event().wait(0.01)
    plain(self)

def counted_note(self, number, frame):
    noted.append(number)
    note(self, number, frame)

Sparsifier.step, ranks._SharedInterruption._note = step, counted_note
exit_code = cli.main(sys.argv[3:])
Path(__file__).with_name(f"exit-code-{os.environ['RANK']}").write_text(str(exit_code))
sys.exit(exit_code)
"""  # the command, which rank 1 interrupts or fails in an optimizer step


def torchrun(folder: Path, *options: str, driver: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """``feather-kernels train`` in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "feather_kernels"]
    if driver:
        (folder / "driver.py").write_text(DRIVER)
        program = [str(folder / "driver.py"), *driver]
    return subprocess.run(
        [*launch, *program, "train", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """An uninterrupted run of two processes; tests leave it as it is."""
    runs = tmp_path_factory.mktemp("runs")
    return runs / "whole", torchrun(runs, "--runs", str(runs), "--name", "whole", *SHORT, "--epochs", "2")


def test_two_processes_end_with_the_zeros_of_one(whole_run, tmp_path, capsys):
    folder, done = whole_run
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    assert train(tmp_path, "--name", "one", "--epochs", "2") == 0
    alone = capsys.readouterr().out
    assert ZEROS in alone
    for pattern in ("epoch [0-9]+/", ".* prunable weights are zero.*"):  # printed by the first process only
        found, expected = (re.findall(f"^{pattern}", text, re.MULTILINE) for text in (done.stdout, alone))
        assert found == expected
    assert done.stdout.count(", 2 processes\n") == 1

    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["whole"]
    state = safetensors_torch.load_file(folder / "model.safetensors")
    assert sum(int((state[name] == 0).sum()) for name in state if state[name].dim() > 1) == 89_041
    for row, expected in zip(read_rows(folder), read_rows(tmp_path / "one"), strict=True):
        for name in ("epoch", "step", "sparsity_target", "sparsity", "lr"):
            assert row[name] == expected[name]
        for name in ("train_loss", "test_loss", "threshold"):  # batch norm sees half a batch
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=0.05)


def test_ctrl_c_ends_all_ranks_with_one_checkpoint_from_which_any_number_continues(whole_run, tmp_path, capsys):
    step = STEPS + 3
    options = "--runs", str(tmp_path / "runs"), "--name", "stopped", *SHORT, "--epochs", "2"
    stopped = torchrun(tmp_path, *options, driver=("stop", str(step)))
    folder = tmp_path / "runs/stopped"
    assert stopped.returncode != 0
    assert [(tmp_path / f"exit-code-{rank}").read_text() for rank in (0, 1)] == ["130", "130"]
    assert "feather_kernels" not in stopped.stderr, stopped.stderr  # the only traceback is torchrun's
    assert stopped.stdout.count(f"interrupted at step {step} of {2 * STEPS}") == 1, stopped.stderr
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "config.json", "metrics.csv"}
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == step
    assert checkpoint["sums"]["images"] == sum(len(batch) for batch in first_batches(3))  # of both ranks

    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert ZEROS in capsys.readouterr().out
    for path in folder.iterdir():
        path.unlink()
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    resumed = torchrun(tmp_path, "--resume", str(folder))
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed at step {step}" in resumed.stdout
    # the sum of two gradients does not depend on how DDP groups them
    assert (folder / "model.safetensors").read_bytes() == (whole_run[0] / "model.safetensors").read_bytes()


def first_batches(count: int) -> list[Tensor]:
    from feather_kernels.cli.train.batches import epoch_batches

    return epoch_batches(1437, 128, seed=3, epoch=1)[:count]


def test_an_error_of_one_rank_ends_all_with_its_message(tmp_path):
    options = "--runs", str(tmp_path / "runs"), "--name", "failed", *SHORT, "--epochs", "2"
    failed = torchrun(tmp_path, *options, driver=("fail", "3"))
    assert failed.returncode != 0
    errors = re.findall(r"^(?:\[rank\d\]: )?(\w+Error: .*)", failed.stderr, re.MULTILINE)
    assert errors == ["ValueError: a bug of one rank"]  # and none of a rank that waits for it
    assert "epoch 1" not in failed.stdout


def test_a_mistake_of_all_ranks_is_told_once(tmp_path):
    refused = torchrun(tmp_path, "--runs", str(tmp_path / "runs"), *SHORT, "--batch-size", "1")
    assert refused.returncode != 0
    (line,) = re.findall(r"^feather-kernels: error: .*", refused.stderr, re.MULTILINE)
    assert "--batch-size must give each of the 2 ranks an image in every step, got 1 for 1437 images" in line
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------ the steps of one rank


def small_data(test_images: int = 2) -> data.Dataset:
    """40 coloured images of CIFAR's size, which are cropped at random, and fewer test images than ranks."""
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> Tensor:
        return torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)

    return data.Dataset(images(40), torch.arange(40) % 4, images(test_images), torch.arange(test_images) % 4)


def make_training(ranks: Ranks, **options: Any) -> training.Training:
    resolved = config.resolve({"epochs": 1, "batch_size": 12, "sparsity": 0.8, "device": "cpu", **options})
    return training.Training(resolved, small_data(), lambda: None, ranks)


def plain_net(*_: object) -> nn.Module:
    """Without batch norm, whose statistics are those of a rank's share."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))


def train_a_share() -> tuple[list[Tensor], dict[str, Any], Tensor]:
    """One epoch: batches of 10 images over the ranks, and then a test batch of 2."""
    import torch.distributed as dist

    distributed = dist.is_initialized()
    with mock.patch.object(training, "make_model", plain_net):
        trained = make_training(Ranks(dist.get_rank(), dist.get_world_size()) if distributed else Ranks())
    row = trained.run_epoch()
    weights = [parameter.detach().clone() for parameter in trained.model.parameters()]
    return weights, row, trained.sparsifier.threshold


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_steps_of_all_ranks_are_those_of_one_process(processes, world):
    """Also with shares of 3 and 4 images, and where ranks have no test image."""
    weights, row, threshold = train_a_share()
    for own_weights, own_row, own_threshold in processes.run(train_a_share, world=world):
        torch.testing.assert_close(own_weights, weights, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own_threshold, threshold, rtol=1e-4, atol=0)
        for name in training.COLUMNS[:-1]:
            assert own_row[name] == pytest.approx(row[name], rel=1e-4), name


def evaluate_other_statistics() -> tuple[float, dict[str, Any]]:
    import torch.distributed as dist

    trained = make_training(Ranks(dist.get_rank(), dist.get_world_size()))
    for buffer in trained.model.buffers():
        buffer += dist.get_rank()
    return trained.evaluate().mean_loss, dict(trained.model.named_buffers())


def test_all_ranks_evaluate_with_the_statistics_of_the_first(processes):
    loss = make_training(Ranks()).evaluate().mean_loss
    for own_loss, buffers in processes.run(evaluate_other_statistics):
        assert own_loss == pytest.approx(loss)
        for name, buffer in make_training(Ranks()).model.named_buffers():
            assert buffers[name].equal(buffer)


def load_other_data() -> str:
    import torch.distributed as dist

    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    with pytest.raises(InputError) as raised:
        ranks.check_same("--data my.npz", small_data(test_images=2 + ranks.rank).facts()["test_images"])
    return str(raised.value)


def test_ranks_with_other_data_are_refused(processes):
    for message in processes.run(load_other_data):
        assert message == "--data my.npz must be the same on all ranks, got 2 on rank 0 and 3 on rank 1"


@pytest.mark.parametrize("size", [11, 64])
def test_a_batch_with_fewer_images_than_ranks_is_refused(size):
    with pytest.raises(InputError, match=f"--batch-size must give each of the {size} ranks an image .*, got 12 for 40"):
        make_training(Ranks(0, size))


def test_each_rank_takes_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Ranks(3, 4, 1).device("cuda") == torch.device("cuda:1")
    assert Ranks(3, 4, 1).device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match=r"--device must be cpu or cuda under torchrun, .*got cuda:1"):
        Ranks(1, 2, 1).device("cuda:1")
    with pytest.raises(InputError, match="needs a GPU for each rank of a machine, got 2 GPUs for local rank 2"):
        Ranks(2, 4, 2).device("cuda")

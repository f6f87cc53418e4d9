"""``feather-kernels train``: the same run again, from its seed, after a signal, a kill or a divergence; --resume."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from feather_kernels import cli
from feather_kernels.cli.train.models import make_model
from feather_kernels.sparsify import Sparsifier
from tests.support.train_runs import (
    EPOCHS,
    FILES,
    IMAGES,
    SHORT,
    STEPS,
    make_npz,
    read_rows,
    train,
)


def assert_same_run(folder: Path, reference: Path) -> None:
    """Every file is there and nothing else; the same model bytes; the same metrics but for the seconds."""
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    rows, expected = read_rows(folder), read_rows(reference)
    assert [{**row, "seconds": ""} for row in rows] == [{**row, "seconds": ""} for row in expected]


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


def test_two_runs_of_one_seed_are_the_same_and_of_two_seeds_are_not(short_run, tmp_path):
    assert train(tmp_path, "--name", "again") == 0
    assert_same_run(tmp_path / "again", short_run)
    assert train(tmp_path, "--name", "other", "--seed", "4") == 0
    assert (tmp_path / "other/model.safetensors").read_bytes() != (short_run / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------ stop and resume


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


# ------------------------------------------------------------------------------------------------ divergence


def test_a_run_that_diverges_at_once_stops_with_one_line(tmp_path, capsys):
    assert train(tmp_path, "--name", "steep", "--lr", "1e30") == 2
    error = capsys.readouterr().err
    assert error.startswith("feather-kernels: error: training loss must be finite, got nan in epoch 1 with --lr 1e+30")
    assert error.count("\n") == 1
    folder = tmp_path / "steep"
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "config.json", "metrics.csv"}
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 0
    assert read_rows(folder) == []


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_run_that_diverges_later_keeps_the_epochs_before(short_run, tmp_path, monkeypatch, capsys, loss):
    with monkeypatch.context() as patch:

        def diverge():
            patch.setattr(torch.nn.functional, "cross_entropy", lambda logits, labels: logits.sum() * 0 + loss)

        do_at_step(patch, STEPS + 3, diverge)
        assert train(tmp_path, "--name", "steep") == 2
    assert f"training loss must be finite, got {loss} in epoch 2 with --lr 0.1" in capsys.readouterr().err
    folder = tmp_path / "steep"
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == STEPS
    assert [row["epoch"] for row in read_rows(folder)] == ["1"]
    assert resume(folder) == 0
    assert_same_run(folder, short_run)


# ------------------------------------------------------------------------------------------------ refusals


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

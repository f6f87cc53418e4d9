"""``feather-kernels doctor`` and the command line around it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

import feather_kernels
from feather_kernels import cli
from feather_kernels.ops import dispatch


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("FEATHER_KERNELS_BACKEND", raising=False)
    dispatch.reset()
    yield
    dispatch.reset()


def doctor(capsys) -> str:
    assert cli.main(["doctor"]) == 0
    return capsys.readouterr().out


def section(output: str, device: str) -> str:
    """The paragraph of one device."""
    return next(part for part in output.split("\n\n") if part.startswith(f"{device}: "))


def test_doctor_prints_versions(capsys):
    output = doctor(capsys)
    versions = dict(line.split(None, 1) for line in output.split("\n\n")[0].splitlines())
    assert versions["feather_kernels"] == feather_kernels.__version__
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == torch.__version__
    assert "triton" in versions
    assert "\x1b" not in output


def test_doctor_prints_every_device_with_its_backends(capsys):
    output = doctor(capsys)
    for device in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        lines = section(output, device).splitlines()
        assert "  reference: available" in lines
        chosen = lines[-1].removeprefix("  chosen: ")
        assert f"  {chosen}: available" in lines
    assert section(output, "cpu").startswith(f"cpu: {torch.get_num_threads()} threads")


def test_doctor_says_why_a_backend_cannot_run(capsys, monkeypatch):
    monkeypatch.setitem(dispatch.BACKENDS, "abacus", "abacus_of_nowhere")
    monkeypatch.setitem(dispatch.ORDER, "cpu", ("abacus", "reference"))
    lines = section(doctor(capsys), "cpu").splitlines()
    assert lines[1].startswith("  abacus: is not installed: No module named")
    assert lines[2:] == ["  reference: available", "  chosen: reference"]

    monkeypatch.setenv("FEATHER_KERNELS_BACKEND", "abacus")
    dispatch.reset()
    output = doctor(capsys)
    assert "FEATHER_KERNELS_BACKEND = 'abacus'" in output
    assert section(output, "cpu").splitlines()[-1].startswith("  chosen: none: backend 'abacus' cannot run on cpu")


def test_doctor_prints_the_variable(capsys, monkeypatch):
    assert "FEATHER_KERNELS_BACKEND is not set" in doctor(capsys)
    monkeypatch.setenv("FEATHER_KERNELS_BACKEND", "reference")
    dispatch.reset()
    assert "FEATHER_KERNELS_BACKEND = 'reference'" in doctor(capsys)


def test_an_unknown_backend_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("FEATHER_KERNELS_BACKEND", "slide-rule")
    dispatch.reset()
    assert cli.main(["doctor"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert f"FEATHER_KERNELS_BACKEND must be one of auto, {', '.join(dispatch.BACKENDS)}" in output.err
    assert "got 'slide-rule'" in output.err


def test_the_module_without_arguments_is_the_doctor():
    run = subprocess.run([sys.executable, "-m", "feather_kernels"], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"feather_kernels {feather_kernels.__version__}\n")
    assert "chosen: " in run.stdout


def test_the_command_line_imports_nothing_of_the_extra():
    code = """
import sys
import torch
before = set(sys.modules)
import feather_kernels.cli
assert feather_kernels.cli.main(["doctor"]) == 0
extra = {"rich", "matplotlib", "safetensors", "sklearn", "torchvision"}
print(sorted((set(sys.modules) - before) & extra))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["--version"])
    assert exit_code.value.code == 0
    assert capsys.readouterr().out == f"feather_kernels {feather_kernels.__version__}\n"


@pytest.mark.parametrize(("arguments", "words"), [([], ["COMMAND"]), (["prune"], ["'prune'", "train", "doctor"])])
def test_a_wrong_command_is_one_line(capsys, arguments, words):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert [word for word in words if word not in error] == []


@pytest.mark.parametrize("dtypes", [[], ["--dtype", "float32", "float64"]])
def test_warmup_that_cannot_run_gives_the_reason(capsys, monkeypatch, dtypes):
    """On a CPU: Triton's own reason, and none of its modules is imported where it is not installed."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setitem(dispatch.BACKENDS, "triton", "abacus_of_nowhere")
    assert cli.main(["warmup", *dtypes]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "backend 'triton' cannot run on cpu" in output.err
    assert "is not installed" in output.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_warmup_of_a_device_that_is_not_there(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["warmup", "--device", "cuda:0"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "backend 'triton' cannot run on cuda:0. Probed: triton: " in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--dtype", "int8"], ["--dtype must be of float32", "'int8'"]), (["--device", "gpu"], ["--device", "got gpu"])],
)
def test_warmup_arguments_that_are_wrong(capsys, arguments, words):
    assert cli.main(["warmup", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert [word for word in words if word not in error] == []

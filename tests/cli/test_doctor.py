"""``feather-kernels doctor`` and the command line around it."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import feather_kernels
from feather_kernels import cli
from feather_kernels.backends import cuda
from feather_kernels.backends.registry import registry
from feather_kernels.cli import nvidia_driver


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("FEATHER_KERNELS_BACKEND", raising=False)
    registry.reset()
    yield
    registry.reset()


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


@pytest.mark.parametrize(("count", "words"), [(1, "1 thread"), (2, "2 threads")])
def test_doctor_counts_the_threads(capsys, monkeypatch, count, words):
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    assert section(doctor(capsys), "cpu").splitlines()[0] == f"cpu: {words}"


@pytest.mark.parametrize("cuda_version", [None, "13.0"])
def test_doctor_lists_the_gpu_backends_without_a_gpu(capsys, monkeypatch, cuda_version):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", cuda_version)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(nvidia_driver, "LIBRARY", "libcuda-of-nowhere.so")
    monkeypatch.setattr(
        registry, "availability", lambda device: {"triton": f"no {device}", "cuda": "old", "reference": None}
    )
    reason = "no NVIDIA driver" if cuda_version else "torch is built for CPUs only"
    assert section(doctor(capsys), "cuda").splitlines() == [
        f"cuda: no CUDA device found ({reason})",
        "  triton: no cuda:0",
        "  cuda: old",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_every_gpu_backend_has_a_reason_without_a_gpu(capsys):
    found = dict(line.strip().split(": ", 1) for line in section(doctor(capsys), "cuda").splitlines()[1:])
    assert list(found) == ["triton", "cuda"]
    assert all(reason and reason != "available" for reason in found.values())


@pytest.mark.parametrize("visible", [None, "7"])
def test_a_driver_without_a_visible_gpu_is_told(monkeypatch, visible):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvidia_driver, "installed", lambda: nvidia_driver.Driver((13, 0), ""))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    end = "; CUDA_VISIBLE_DEVICES is '7'" if visible else ""
    assert nvidia_driver.no_device() == f"no CUDA device found (torch sees no GPU{end})"


@pytest.fixture
def cuda_module(monkeypatch):
    """A stand-in for a CUDA module that was built by CUDA 13; without it none is there."""

    def put(present: bool) -> None:
        info = {"compiler": "nvcc 13.0.88", "architectures": "sm_75 sm_80 compute_80"}
        monkeypatch.setattr(cuda, "MODULE", "feather_kernels._no_such_module")
        monkeypatch.setattr(cuda, "_cuda", SimpleNamespace(build_info=lambda: info) if present else None)

    return put


def facts(output: str) -> list[str]:
    """The lines on the driver and the CUDA module."""
    _, _, rest = output.partition("NVIDIA driver   ")
    return [line.strip() for line in rest.partition("\n\n")[0].splitlines()]


def test_doctor_says_which_driver_the_module_needs(capsys, monkeypatch, cuda_module):
    cuda_module(True)
    monkeypatch.setattr(nvidia_driver, "LIBRARY", "libcuda-of-nowhere.so")
    assert facts(doctor(capsys)) == [
        "none found",
        "CUDA module     machine code for sm_75, sm_80, and PTX of compute_80 for newer GPUs",
        "needs an NVIDIA driver for CUDA 13, R580 or newer",
    ]
    cuda_module(False)
    driver, module = facts(doctor(capsys))
    assert driver == "none found"
    assert module.startswith("CUDA module     is not installed: feather_kernels._no_such_module was not built")


@pytest.mark.parametrize(("version", "served"), [(12080, False), (13000, True), (13010, True)])
def test_doctor_says_which_driver_is_there(capsys, monkeypatch, tmp_path, cuda_module, version, served):
    class Library:
        def __init__(self, name: str) -> None:
            assert name == nvidia_driver.LIBRARY

        def cuDriverGetVersion(self, pointer) -> int:  # noqa: N802
            pointer._obj.value = version
            return 0

    cuda_module(True)
    own_ctypes = SimpleNamespace(CDLL=Library, c_int=ctypes.c_int, byref=ctypes.byref)
    monkeypatch.setattr(nvidia_driver, "ctypes", own_ctypes)
    release = tmp_path / "version"
    release.write_text("NVRM version: NVIDIA UNIX Kernel Module for x86_64  575.57.08  Release Build\nGCC 12.2.0\n")
    monkeypatch.setattr(nvidia_driver, "RELEASE", release)
    end = "" if served else ": older than the CUDA module needs"
    words = f"for CUDA {version // 1000}.{version % 1000 // 10}{end}"
    assert facts(doctor(capsys))[0] == f"575.57.08, {words}"
    release.unlink()
    assert facts(doctor(capsys))[0] == words
    cuda_module(False)
    assert facts(doctor(capsys))[0] == words.removesuffix(end)


def test_doctor_says_why_a_backend_cannot_run(capsys, monkeypatch):
    monkeypatch.setitem(registry.modules, "abacus", "abacus_of_nowhere")
    monkeypatch.setitem(registry.order, "cpu", ("abacus", "reference"))
    lines = section(doctor(capsys), "cpu").splitlines()
    assert lines[1].startswith("  abacus: is not installed: No module named")
    assert lines[2:] == ["  reference: available", "  chosen: reference"]

    monkeypatch.setenv("FEATHER_KERNELS_BACKEND", "abacus")
    registry.reset()
    output = doctor(capsys)
    assert "FEATHER_KERNELS_BACKEND = 'abacus'" in output
    assert section(output, "cpu").splitlines()[-1].startswith("  chosen: none: backend 'abacus' cannot run on cpu")


def test_doctor_prints_the_variable(capsys, monkeypatch):
    assert "FEATHER_KERNELS_BACKEND is not set" in doctor(capsys)
    monkeypatch.setenv("FEATHER_KERNELS_BACKEND", "reference")
    registry.reset()
    assert "FEATHER_KERNELS_BACKEND = 'reference'" in doctor(capsys)


def test_an_unknown_backend_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("FEATHER_KERNELS_BACKEND", "slide-rule")
    registry.reset()
    assert cli.main(["doctor"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert f"FEATHER_KERNELS_BACKEND must be one of auto, {', '.join(registry.modules)}" in output.err
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


def test_without_arguments_it_is_the_doctor(capsys, monkeypatch):
    output = doctor(capsys)
    assert cli.main([]) == 0
    assert capsys.readouterr().out == output
    monkeypatch.setattr(sys, "argv", ["feather-kernels"])
    assert cli.main() == 0
    assert capsys.readouterr().out == output


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(unbuffered):
    command = [sys.executable, "-m", "feather_kernels", "doctor"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    reading, writing = os.pipe()
    os.close(reading)
    try:
        run = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        os.close(writing)
    assert run.stderr == ""
    assert run.returncode == 141


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--epoch", "1"], "--epoch 1; did you mean --epochs? (see feather-kernels train --help)"),
        (["train", "--sparsty=0.9"], "--sparsty=0.9; did you mean --sparsity? (see feather-kernels train --help)"),
        (["compare", "--method", "soft"], "--method; did you mean --methods? (see feather-kernels compare --help)"),
        (["doctor", "--qqqq"], "--qqqq (see feather-kernels doctor --help)"),
        (["doctor", "cpu"], "cpu (see feather-kernels doctor --help)"),
    ],
)
def test_an_unknown_option_points_to_the_help_of_its_command(capsys, arguments, words):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"feather-kernels: error: unrecognized arguments: {words}\n"


@pytest.mark.parametrize(("arguments", "words"), [(["prune"], ["'prune'", "train", "doctor"])])
def test_a_wrong_command_is_one_line(capsys, arguments, words):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert [word for word in words if word not in error] == []


@pytest.mark.parametrize("dtypes", [[], ["--dtype", "float32", "float64"]])
def test_warmup_that_cannot_run_gives_the_reason(capsys, monkeypatch, dtypes):
    """Triton's own reason, and none of its modules is imported where it is not installed."""
    monkeypatch.setitem(registry.modules, "triton", "abacus_of_nowhere")
    assert cli.main(["warmup", "--device", "cpu", *dtypes]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "backend 'triton' cannot run on cpu" in output.err
    assert "is not installed" in output.err


def test_warmup_without_a_gpu_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cli.main(["warmup"]) == 1
    assert capsys.readouterr().err == f"feather-kernels: {nvidia_driver.no_device()}; nothing to compile\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_warmup_of_a_device_that_is_not_there(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["warmup", "--device", "cuda:0"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "backend 'triton' cannot run on cuda:0. Probed: triton: " in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "int8"], ["--dtype must be one of float32", "'int8'"]),
        (["--device", "gpu"], ["--device", "got gpu"]),
    ],
)
def test_warmup_arguments_that_are_wrong(capsys, arguments, words):
    assert cli.main(["warmup", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert [word for word in words if word not in error] == []

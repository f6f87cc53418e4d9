"""The module that nvcc builds for every architecture: its machine code, and how it loads without a GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import feather_kernels as fk
from feather_kernels._version import __version__
from feather_kernels.backends import compiled_module, cuda
from feather_kernels.backends.registry import registry
from tests.simulated_gpu import shipped_build
from tests.simulated_gpu.shipped_build import configure, run

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("75", "80", "90", "100", "120")
VECTORISED = ("threshold_kernel", "scale_kernel")
READING = ("histogram_kernel", "bracket_kernel", "smallest_above_kernel", "count_kernel")
NO_GPU = not torch.cuda.is_available()
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def build() -> Path:
    """Folder with the module and the build's log."""
    return shipped_build.shipped()


@pytest.fixture(scope="module")
def module_path(build: Path) -> Path:
    (path,) = build.glob("_cuda.*.so")
    return path


def kernels(log: str) -> Iterator[tuple[str, str, int, int]]:
    """(kernel, architecture, registers, bytes of spills and stack) of each entry in ptxas's report."""
    entry = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    for name, architecture, stack, stores, loads, registers in entry.findall(log):
        yield name, architecture, int(registers), int(stack) + int(stores) + int(loads)


def test_registers_and_spills(build: Path) -> None:
    found = list(kernels((build / "ptxas.log").read_text()))
    names = {name for name, *_ in found}
    assert len(names) > 50
    assert {(name, architecture) for name, architecture, *_ in found} == {
        (name, architecture) for name in names for architecture in ARCHITECTURES
    }
    assert not [kernel for kernel in found if kernel[2] > 64]
    assert not [kernel for kernel in found if kernel[3] > 0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accesses_of_16_bytes(module_path: Path, architecture: str) -> None:
    sass = run(disassembler(), "-sass", "-arch", f"sm_{architecture}", module_path).stdout
    functions = {body.split("\n", 1)[0].strip(): body for body in sass.split("Function : ")[1:]}
    assert len(functions) > 50
    for name, body in functions.items():
        assert not re.search(r"\b(LDL|STL)\b", body), f"{name} uses local memory"
        copies = any(f"{len(kernel)}{kernel}I" in name for kernel in VECTORISED)
        if copies or any(f"{len(kernel)}{kernel}I" in name for kernel in READING):
            assert re.search(r"\bLDG\.E\.128", body), f"{name} loads no 16 bytes"
        if copies:
            assert re.search(r"\bSTG\.E\.128", body), f"{name} stores no 16 bytes"
    for kernel in (*VECTORISED, *READING):
        assert any(f"{len(kernel)}{kernel}I" in name for name in functions), f"no {kernel}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_atomic_updates_are_relaxed_and_return_nothing(module_path: Path, architecture: str) -> None:
    """A fence costs as much as what it waits for, and a value that comes back as much as a load."""
    atomics = 0
    for path in shipped_build.ptx(int(architecture)):
        text = path.read_text()
        assert not shipped_build.ORDERING.search(text), path
        atomics += len(re.findall(r"\b(?:atom|red)\.global\.", text))
    assert atomics > 100
    sass = run(disassembler(), "-sass", "-arch", f"sm_{architecture}", module_path).stdout
    assert len(re.findall(r"\bREDG?\.E\.", sass)) >= 50
    assert not re.search(r"\b(MEMBAR|ERRBAR|FENCE|CCTL|ATOMG?)\b", sass)


def test_machine_code_for_each_architecture_and_ptx_that_newer_gpus_take(module_path: Path) -> None:
    elf = run(disassembler(), "-lelf", module_path).stdout
    assert set(re.findall(r"sm_(\d+)\.cubin", elf)) == set(ARCHITECTURES)
    ptx = run(disassembler(), "-lptx", module_path).stdout
    assert set(re.findall(r"sm_(\d+)\.ptx", ptx)) == {"80"}


def disassembler() -> Path:
    """The cuobjdump of the toolkit or of triton."""
    on_path = shutil.which("cuobjdump")
    if on_path is not None:
        return Path(on_path)
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("no cuobjdump")
    return Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("feather_kernels._cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
info = module.build_info()
print(info["version"], info["source_hash"], info["compiler"], info["architectures"], sep="|")
module.threshold(0, 2, 0, 2, 0, 0, 3.0, 0)  # nothing to do: no launch
loaded = open("/proc/self/maps").read()
print("driver" if "libcuda.so" in loaded else "", "runtime" if "libcudart" in loaded else "")
"""


def test_loads_and_reports_itself_without_a_driver(module_path: Path) -> None:
    done = run(sys.executable, "-c", LOAD, module_path)
    assert done.returncode == 0, done.stderr
    report, libraries = done.stdout.splitlines()
    version, sources, compiler, architectures = report.split("|")
    assert (version, sources) == (__version__, compiled_module.source_hash(ROOT, "cuda"))
    assert re.fullmatch(r"nvcc \d+\.\d+.*", compiler)
    assert architectures.split() == [*(f"sm_{number}" for number in ARCHITECTURES), "compute_80"]
    assert not libraries.strip(), "the runtime is linked in, and the driver not touched"


@pytest.fixture
def module(module_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The built module in its place in the backend."""
    from tests.simulated_gpu.cuda_module_on_cpu import load

    loaded = load(str(module_path))
    monkeypatch.setattr(cuda, "_cuda", loaded)
    return loaded


@pytest.mark.skipif(not NO_GPU, reason="a GPU is there")
def test_a_failed_launch_names_the_op(module: SimpleNamespace) -> None:
    with pytest.raises(RuntimeError, match=r"^threshold: CUDA error cudaError\w+: "):
        module.threshold(16, 2, 16, 2, 4, 16, 3.0, 0)


def test_arguments_are_checked(module: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="threshold has no kernel for the dtype codes 7 2"):
        module.threshold(16, 7, 16, 2, 4, 16, 3.0, 0)
    with pytest.raises(ValueError, match="scale_pruned_grad has no kernel for the dtype codes 3 2 2"):
        module.scale_pruned_grad(16, 3, 16, 2, 16, 2, 4, 16, 16, 0)
    with pytest.raises(ValueError, match=r"power must be 1, 2, 3 or inf, got 0\.5"):
        module.threshold(16, 2, 16, 2, 4, 16, 0.5, 0)
    with pytest.raises(ValueError, match=r"bits must be in \[1, 16\]"):
        module.magnitude_histogram([], 0, 0, 0, 17, 0, 0)


def test_probe_says_why(module: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.probe(torch.device("cpu")) == "runs CUDA tensors only, not cpu"
    if NO_GPU:
        assert "torch finds no CUDA device" in str(cuda.probe(CUDA))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "AMD" in str(cuda.probe(CUDA))


def test_a_launch_that_fails_says_what_the_module_is_for(
    module: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "probe_by_launch", lambda threshold, device, describe: describe(RuntimeError("no image")))
    expected = (
        r"no image; the module has machine code for sm_75, sm_80, sm_90, sm_100, sm_120, and PTX of compute_80 for "
        r"newer GPUs; it needs an NVIDIA driver for CUDA (1[1-3]), R(450|525|580) or newer"
    )
    assert re.fullmatch(expected, str(cuda.probe(CUDA)))


def test_probe_names_a_missing_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "MODULE", "feather_kernels._no_such_module")
    assert str(cuda.probe(CUDA)).startswith("is not installed: feather_kernels._no_such_module was not built")


def test_a_module_of_other_sources_is_refused() -> None:
    stranger = SimpleNamespace(build_info=lambda: {"version": __version__, "source_hash": "0" * 64})
    assert "was built from other sources (000000000000)" in str(compiled_module.mismatch(stranger, "cuda"))


def test_named_backend_raises_where_it_cannot_run() -> None:
    w, t = torch.ones(3), torch.tensor(0.5)
    with fk.use_backend("cuda"), pytest.raises(fk.BackendUnavailableError, match="cuda: runs CUDA tensors only"):
        torch.ops.feather_kernels.threshold(w, t, 3.0)
    if NO_GPU:
        with fk.use_backend("cuda"), pytest.raises(fk.BackendUnavailableError, match="backend 'cuda' cannot run"):
            registry.backend_for(CUDA)


def test_fake_cuda_tensors_need_no_gpu() -> None:
    with FakeTensorMode(), fk.use_backend("cuda"):
        w = torch.empty(8, 3, device="cuda", dtype=torch.float32)
        t = torch.empty((), device="cuda")
        y = torch.ops.feather_kernels.threshold(w, t, 3.0, out_dtype=torch.bfloat16)
        counts = torch.ops.feather_kernels.count_pruned([w], [t])
    assert (y.device.type, y.dtype, y.shape) == ("cuda", torch.bfloat16, (8, 3))
    assert (counts.device.type, counts.dtype) == ("cuda", torch.int64)


KNOWN = {  # to an nvcc, by what it prints for --list-gpu-arch
    "11.8": (["35", "50", "75", "80", "86", "89", "90"], ["sm_75", "sm_80", "sm_90", "compute_80"]),
    "12.8": (
        ["50", "75", "80", "90", "100", "101", "120"],
        ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_80"],
    ),
    "14.0": (["80", "90", "100", "110", "120", "130"], ["sm_80", "sm_90", "sm_100", "sm_120", "compute_80"]),
}


def nvcc_that_knows(folder: Path, release: str, numbers: list[str]) -> str:
    """The real nvcc, with other words on its release and on what it compiles for."""
    fake = folder / "nvcc"
    listed = "\\n".join(f"compute_{number}" for number in numbers)
    known = f"--list-gpu-arch) printf '{listed}\\n';; --version) echo 'release {release},';;"
    fake.write_text(f'#!/bin/sh\ncase "$1" in {known} *) exec "{shipped_build.nvcc()}" "$@";; esac\n')
    fake.chmod(0o755)
    return str(fake)


@pytest.mark.parametrize("release", KNOWN)
def test_what_is_built_is_what_nvcc_knows(tmp_path: Path, release: str) -> None:
    numbers, expected = KNOWN[release]
    done = configure(tmp_path / "build", FEATHER_NVCC=nvcc_that_knows(tmp_path, release, numbers))
    assert done.returncode == 0, done.stderr
    assert f"feather_kernels._cuda is compiled for {' '.join(expected)}\n" in done.stdout
    rules = (tmp_path / "build" / "build.ninja").read_text()
    codes = set(re.findall(r"arch=compute_\d+,code=\[?((?:sm|compute)_\d+)", rules))
    assert codes == set(expected)


def test_named_architectures_are_built_as_they_are(tmp_path: Path) -> None:
    done = configure(tmp_path / "build", FEATHER_NVCC=shipped_build.nvcc(), FEATHER_CUDA_ARCHITECTURES="86-real;90")
    assert done.returncode == 0, done.stderr
    assert "feather_kernels._cuda is compiled for sm_86 sm_90 compute_90\n" in done.stdout


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 1", "does not say where it is"),
        ('case "$1" in --dryrun) echo "#$ TOP=/usr";; *) echo "release 11.7,";; esac', "needs CUDA 11.8 or later"),
        (
            'case "$1" in --dryrun) echo "#$ TOP=/usr";; --version) echo "release 14.0,";; *) echo compute_90;; esac',
            "needs an nvcc that knows compute_80, but",
        ),
    ],
)
def test_a_wrong_toolkit_is_one_clear_sentence(tmp_path: Path, script: str, words: str) -> None:
    fake = tmp_path / "nvcc"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    done = configure(tmp_path / "build", FEATHER_NVCC=str(fake))
    assert done.returncode != 0
    assert words in " ".join(done.stderr.split())
    assert done.stderr.count("CMake Error") == 1

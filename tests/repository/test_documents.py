"""Every Python snippet in the documents runs as it stands; links and paths lead somewhere."""

from __future__ import annotations

import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from feather_kernels.cli.commands import main, make_parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
READMES = [
    ROOT / part / "README.md"
    for part in ("benchmarks", "benchmarks/fake_cuda_driver", "csrc", "tests", "tools/ptx_executor")
]
SNIPPETS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippet_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "runs/NAME" in code:  # what a page's commands have left
        assert main(["train", "--epochs", "1", "--name", "NAME"]) == 0
    torch._dynamo.reset()  # frames that another test made it skip
    exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})


def test_the_ten_lines_do_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    torch.manual_seed(0)  # one seed in many ends with two weights of one magnitude, and the report counts that tie
    exec(compile(code, "README", "exec"), {"__name__": "__main__"})
    assert "17,996 of 18,944 prunable weights are zero" in capsys.readouterr().out


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_exist(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`]*`(?!\])", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        if "://" not in target:
            assert (page.parent / target).exists(), target


SOURCES = (".py", ".cpp", ".cu", ".cuh", ".h", ".cmake")
DATA = (".csv", ".json", ".md", ".toml", ".svg", ".txt")
PLACEHOLDER = re.compile(r"(?<![A-Z])(NAME|DATE|DEVICE|FOLDER|FILE)(?![A-Z])")
PARENTS = [ROOT, ROOT / "feather_kernels", ROOT / "csrc", ROOT / "tests"]  # documents may leave these out of a path
OWN = {folder.name for parent in PARENTS for folder in parent.iterdir() if folder.is_dir()}
IGNORED = {"build", "results", "runs", "data", ".venv"}  # made by the user's commands


def code_in(text: str) -> list[str]:
    """The words of a page that stand in backticks or in a block of shell commands."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, flags=re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [word for code in [*blocks, *re.findall(r"`([^`\n]+)`", prose)] for word in code.split()]


def is_path(word: str) -> bool:
    """Whether a word of code names a file or folder of this repository: by its first folder, or as a source file."""
    if not re.fullmatch(r"[\w.*/-]+", word) or word.startswith(("/", "--")) or PLACEHOLDER.search(word):
        return False
    first, slash, _ = word.partition("/")
    source = word.endswith(SOURCES) and word not in SOURCES  # not an ending by itself
    return first not in IGNORED and ((bool(slash) and first in OWN) or source)


def exists(word: str, page: Path) -> bool:
    """A path from the root, from the page or from a part of the repository; a bare file name may be anywhere."""
    if any(list(parent.glob(word.rstrip("/"))) for parent in [*PARENTS, page.parent]):
        return True
    tops = ("feather_kernels", "csrc", "tests", "tools", "benchmarks", "examples", "docs")
    return "/" not in word and any(list((ROOT / top).rglob(word)) for top in tops)


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_in_code_exists(page: Path) -> None:
    missing = {word for word in map(bare, code_in(page.read_text())) if is_path(word) and not exists(word, page)}
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", page.read_text()):
        (path,) = (parent / file for parent in (ROOT, ROOT / "tests") if (parent / file).is_file())
        assert f"def {name}(" in path.read_text(), f"{file} has no {name}"


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_module_in_code_exists(page: Path) -> None:
    own = re.compile(r"(?:tests|tools|benchmarks|feather_kernels)(?:\.\w+)+")
    for word in code_in(page.read_text()):
        if own.fullmatch(word) and not word.endswith((*SOURCES, *DATA)):
            assert pkgutil.resolve_name(word) is not None


def bare(word: str) -> str:
    """Without punctuation, and without what stands behind a path in ``file.py::test`` and ``file.md#part``."""
    return re.split(r"::|#", word.strip("(),;:'\""))[0].removeprefix("./")


GPU_CI = (ROOT / "docs" / "gpu-ci.md").read_text()


def shell_lines(page: str) -> list[str]:
    return [line for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", shell_lines(GPU_CI))
def test_shell_line_of_the_page_on_ci_runs(line: str, tmp_path: Path) -> None:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in re.findall(r"selftest\.\w+", line):
        assert (tmp_path / file).stat().st_size > 0


def test_every_command_of_the_page_on_ci_is_one() -> None:
    """Those for a GPU, for a workflow and for a container are parsed only."""
    commands = re.findall(r"feather-kernels ((?:doctor|selftest|gpu-report)\b[^`\n]*)", GPU_CI)
    given = [shlex.split(command) for command in commands]
    given.append([word.strip('", ') for word in re.findall(r"CMD \[(.+)\]", GPU_CI)[0].split(",")])
    assert len(given) >= 10
    for words in given:
        make_parser().parse_args(words)


def test_the_workflow_of_the_page_on_ci_runs_what_it_uploads() -> None:
    yaml = pytest.importorskip("yaml")
    (text,) = re.findall(r"```yaml\n(.*?)```", GPU_CI, flags=re.DOTALL)
    steps = yaml.safe_load(text)["jobs"]["gpu"]["steps"]
    runs = [step["run"] for step in steps if "run" in step]
    (upload,) = (step for step in steps if "upload-artifact" in step.get("uses", ""))
    assert upload["if"] == "always()", "a failure is what the file is for"
    assert upload["with"]["path"] in runs[-1]
    assert not any("pytest" in run for run in runs)

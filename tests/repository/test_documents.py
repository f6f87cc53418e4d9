"""Every Python snippet in the documents runs as it stands; links and paths lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from feather_kernels.cli.main import make_parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPETS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippet_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()  # frames that another test made it skip
    exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})


def test_the_ten_lines_do_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    exec(compile(code, "README", "exec"), {"__name__": "__main__"})
    assert "17,996 of 18,944 prunable weights are zero" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


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

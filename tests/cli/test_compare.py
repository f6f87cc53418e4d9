"""``feather-kernels compare``: grids, their folders, crashed and killed cells, table and figures."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from feather_kernels import cli
from feather_kernels.cli.compare import command, figures, process, table
from feather_kernels.cli.compare.folder import GRID
from feather_kernels.cli.compare.grid import make_grid, read_grid
from feather_kernels.cli.compare.results import FAILED, FINISHED, OPEN, Result, read_layers, read_results
from feather_kernels.cli.errors import InputError
from tests.support.train_runs import SHORT, make_npz, train

ROOT = Path(__file__).parents[2]
WRITTEN = {"results.csv", "layers.csv", "table.md", "accuracy.png", "layers.png"}
CPU = ["--device", "cpu", "--epochs", "3"]

# in place of a training: writes what a finished run has, or crashes, by the name of the cell
FAKE_CELL = """
import pathlib, sys
options = dict(option.removeprefix("--").split("=", 1) for option in sys.argv[3:] if "=" in option)
resumed = "--resume" in sys.argv
run = pathlib.Path(sys.argv[sys.argv.index("--resume") + 1] if resumed else f"{options['runs']}/{options['name']}")
run.mkdir(exist_ok=resumed)
if run.name.startswith("hard") or (run.name.startswith("soft") and not resumed):
    sys.exit("feather-kernels: error: it broke")
(run / "metrics.csv").write_text("epoch,test_accuracy,seconds\\n1,0.25,2.0\\n2,0.5,1.5\\n")
(run / "layers.csv").write_text("layer,numel,zeros\\nconv,100,50\\nlinear,300,270\\n")
for name in ("model.safetensors", "report.md", "report.png"):
    (run / name).write_text("")
"""


@pytest.fixture
def fake_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PROGRAM", FAKE_CELL)


def compare(*options: str) -> int:
    return cli.main(["compare", *options])


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line on stderr of a refused comparison."""
    capsys.readouterr()
    assert compare(*options) == 2
    output = capsys.readouterr()
    assert output.err.startswith("feather-kernels: error: ")
    assert output.err.count("\n") == 1
    assert output.out == ""
    return output.err


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")}


# ------------------------------------------------------------------------------------------------ grids


def write_grid(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_grid_file_names_exactly_its_cells(tmp_path: Path) -> None:
    path = write_grid(
        tmp_path / "grid.toml",
        """
        recipe = "cifar100-resnet20"
        [options]
        data = "digits"
        epochs = 24
        [[cells]]
        methods = ["feather", "dense"]
        sparsities = [0.98, 0.95]
        seeds = [0, 1]
        [[cells]]
        methods = ["feather"]
        sparsities = [0.98]
        grad_scale = 1
        """,
    )
    cells = read_grid(path, {"epochs": 2})
    assert [cell.name for cell in cells] == [
        *("feather-0.98-seed0", "feather-0.95-seed0", "dense-0-seed0", "feather-grad-scale-1-0.98-seed0"),
        *("feather-0.98-seed1", "feather-0.95-seed1", "dense-0-seed1"),
    ], "the first seed of every row comes first"
    assert {cell.config.epochs for cell in cells} == {2}, "the command line wins"
    assert {cell.config.model for cell in cells} == {"resnet20"}
    assert [cell.config.grad_scale for cell in cells if "grad_scale" in cell.label] == [1]


def test_the_grid_of_cifar100_has_22_cells() -> None:
    cells = read_grid(ROOT / "docs/experiments/cifar100.toml", {"data": "digits"})
    found = [(cell.label, cell.config.sparsity, cell.config.seed) for cell in cells]
    rows = [(method, s, seed) for method in ("feather", "hard", "soft") for s in (0.95, 0.98, 0.99) for seed in (0, 1)]
    extra = [("dense", 0, 0), ("dense", 0, 1), ("gmp", 0.98, 0), ("feather, theta 1", 0.98, 0)]
    assert sorted(found) == sorted(rows + extra)
    for cell in cells:
        assert (cell.config.model, cell.config.dtype, cell.config.epochs) == ("resnet20-16", "bfloat16", 24)
        assert cell.config.grad_scale == (1.0 if "theta" in cell.label else None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[cells]]\nmethods = ['feather']", "[[cells]] 1: sparsities must name at least one for method 'feather'"),
        ("[[cells]]\nmethod = ['feather']", "[[cells]] 1: unknown key 'method' (did you mean 'methods'?)"),
        ("[[cell]]\nmethods = ['feather']", "unknown key 'cell' (did you mean 'cells'?)"),
        (
            "[options]\nepoch = 3\n[[cells]]\nmethods = ['dense']",
            "options: unknown key 'epoch' (did you mean 'epochs'?)",
        ),
        ("[options]\nepochs = '3'\n[[cells]]\nmethods = ['dense']", "epochs must be int, got '3'"),
        ("[[cells]]\nmethods = ['dense', 'dense']", "got dense-0-seed0 twice"),
        ("[[cells]]\nmethods = 'dense'", "methods must be a list, got 'dense'"),
        ("[[cells]]\nmethods = ['dense']\nseeds = [0.5]", "seeds must be int, got 0.5"),
        (
            "[[cells]]\nmethods = ['lasso']\nsparsities = [0.5]",
            "[[cells]] 1: methods must be one of feather, hard, soft, gmp, dense, got 'lasso'",
        ),
        ("[[cells]]\nmethods = ['soft']\nsparsities = [95]", "[[cells]] 1: sparsities must be in [0, 1), got 95.0"),
        ("cells = 3", "at least one block [[cells]], got 3"),
        ("recipe = 'cifar'\n[[cells]]\nmethods = ['dense']", "--recipe must be one of cifar100-densenet40-24"),
        ("[[cells]", "must be a TOML file"),
    ],
)
def test_bad_grids_are_refused(tmp_path, capsys, text: str, words: str) -> None:
    path = write_grid(tmp_path / "grid.toml", text)
    assert words in refused(capsys, str(path), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["absent.toml"], "got 'absent.toml': no such file"),
        (["--methods", "feather", "--sparsities", "95"], "--sparsities must be in [0, 1), got 95.0"),
        (["--seeds", "0", "-1"], "--seeds must be in [0, 2^63), got -1"),
        (["--methods", "lasso"], "--methods must be one of feather, hard, soft, gmp, dense, got 'lasso'"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--sparsity", "0.9"], "unrecognized arguments: --sparsity"),
        (["--table", "absent"], "--table must be the folder of a grid, got 'absent': no results.csv"),
        (["--table", "absent", "--jobs", "2"], "--table takes no other option, got jobs"),
    ],
)
def test_bad_options_are_refused(tmp_path, monkeypatch, capsys, options: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [[], ["--table", "somewhere"]], ids=str)
def test_several_processes_are_refused(tmp_path, monkeypatch, capsys, options: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert compare(*options) == 2
    error = capsys.readouterr().err
    assert "compare must run as one process, got WORLD_SIZE=2" in error
    assert "--jobs" in error
    assert list(tmp_path.iterdir()) == []


def test_a_grid_file_and_lists_of_cells_are_refused(tmp_path, capsys) -> None:
    path = write_grid(tmp_path / "grid.toml", "[[cells]]\nmethods = ['dense']")
    assert "leave out --seeds" in refused(capsys, str(path), "--seeds", "1")


# ------------------------------------------------------------------------------------------------ the run


def test_a_crashed_cell_runs_once_more_and_else_is_marked(tmp_path, fake_cells, capsys) -> None:
    out = tmp_path / "out"
    options = ["--methods", "feather", "hard", "soft", "--sparsities", "0.9", "--jobs", "2", "--out", str(out)]
    assert compare(*options) == 1
    printed = capsys.readouterr().out
    assert "soft-0.9-seed0: feather-kernels: error: it broke; trying once more" in printed
    assert "hard-0.9-seed0: failed twice, the last time with: feather-kernels: error: it broke" in printed
    assert {path.name for path in out.iterdir() if path.is_file() and path.suffix} >= WRITTEN
    found = {result.label: result for result in read_results(out)}
    assert {label: result.status for label, result in found.items()} == {
        "feather": FINISHED,
        "hard": FAILED,
        "soft": FINISHED,
    }
    assert (found["soft"].test_accuracy, found["soft"].zeros, found["soft"].seconds) == (0.5, 320 / 400, 3.5)
    assert found["hard"].note == "feather-kernels: error: it broke"
    assert "| hard | failed |" in (out / "table.md").read_text()
    assert "- hard, 0.9, seed 0: feather-kernels: error: it broke" in (out / "table.md").read_text()
    assert [(layer.label, layer.layer, layer.zeros) for layer in read_layers(out)] == [
        *(("feather", "conv", 50), ("feather", "linear", 270), ("soft", "conv", 50), ("soft", "linear", 270)),
    ]
    assert compare(*options) == 1, "the same command tries the failed cell again"
    printed = capsys.readouterr().out
    assert "hard-0.9-seed0: resumed" in printed
    assert "soft-0.9-seed0" not in printed


def test_another_grid_in_the_folder_is_refused_and_nothing_changes(tmp_path, fake_cells, capsys) -> None:
    out = tmp_path / "out"
    options = ["--methods", "feather", "--sparsities", "0.9", "--out", str(out)]
    assert compare(*options) == 0
    before = contents(out)
    words = (
        f"{out} holds another grid (feather-0.9-seed0 has epochs 30 there, 2 here); choose another folder with --out"
    )
    assert words in refused(capsys, *options, "--epochs", "2")
    assert words in refused(capsys, *options, "--epochs", "2", "--seeds", "0", "1")
    words = f"{out} holds another grid (it has feather-0.9-seed0, which is not in this grid); choose another"
    assert words in refused(capsys, *options, "--seeds", "1")
    assert contents(out) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("keep")
    assert "it has notes.txt" in refused(capsys, *options[:-1], str(tmp_path / "other"))
    assert contents(tmp_path / "other") == {tmp_path / "other/notes.txt": b"keep"}
    assert "it is a file" in refused(capsys, *options[:-1], str(tmp_path / "other/notes.txt"))


def test_cells_are_added_to_a_grid_and_those_that_are_there_are_kept(tmp_path, fake_cells, capsys) -> None:
    out = tmp_path / "out"
    options = ["--methods", "feather", "--sparsities", "0.9", "--out", str(out)]
    assert compare(*options) == 0
    before = contents(out / "cells/feather-0.9-seed0")
    capsys.readouterr()
    assert compare(*options, "--seeds", "0", "1") == 0
    output = capsys.readouterr().out
    assert "feather-0.9-seed1: started" in output
    assert "feather-0.9-seed0: " not in output
    assert contents(out / "cells/feather-0.9-seed0") == before
    assert [result.cell for result in read_results(out)] == ["feather-0.9-seed0", "feather-0.9-seed1"]
    assert "which is not in this grid" in refused(capsys, *options), "the folder now has the larger grid"
    assert compare(*options, "--seeds", "0", "1") == 0


def test_the_same_grid_in_other_words_is_the_same(tmp_path, fake_cells, monkeypatch) -> None:
    out = tmp_path / "out"
    assert compare("--methods", "feather", "--sparsities", "0.9", "--out", str(out)) == 0
    path = write_grid(tmp_path / "grid.toml", "[[cells]]\nmethods = ['feather']\nsparsities = [0.9]")
    monkeypatch.chdir(tmp_path)
    assert compare(str(path), "--epochs", "30", "--threads", "2", "--out", str(out)) == 0


def test_two_comparisons_in_one_folder_are_refused(tmp_path, fake_cells, capsys) -> None:
    options = ["--methods", "feather", "--sparsities", "0.9", "--out", str(tmp_path)]
    with command.open_folder(tmp_path).locked():
        assert "another compare is running in this folder" in refused(capsys, *options)
    assert compare(*options) == 0


def test_a_cell_runs_the_package_of_its_parent_wherever_it_is_started(tmp_path, monkeypatch) -> None:
    """A module of the same name in the current folder is not taken, and the extra PYTHONPATH is not needed."""
    (tmp_path / "feather_kernels").mkdir()
    (tmp_path / "feather_kernels/__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    command = [sys.executable, "-c", process.PROGRAM, str(ROOT), "--version"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as begun:  # it ends with its input
        assert begun.stdout is not None
        assert begun.stdout.read().startswith(b"feather_kernels ")


def test_a_killed_comparison_stops_its_cells_and_is_continued_bit_for_bit(tmp_path) -> None:
    out = tmp_path / "out"
    options = ["--methods", "gmp", "--sparsities", "0.9", "--batch-size", "128", "--out", str(out), *CPU]
    begun = subprocess.Popen(
        [sys.executable, "-m", "feather_kernels", "compare", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    cell = out / "cells/gmp-0.9-seed0"
    deadline = time.monotonic() + 300
    while not (cell / "metrics.csv").is_file():
        assert begun.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    begun.kill()
    begun.communicate()
    assert compare(*options) == 0, "waits until the cell that was left alone has stopped"
    log = (out / "logs/gmp-0.9-seed0.log").read_text()
    assert "interrupted at step" in log
    assert "resumed at step" in log

    assert train(tmp_path, "--name", "whole", *SHORT, "--seed", "0", "--method", "gmp", "--sparsity", "0.9") == 0
    assert (cell / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    (result,) = read_results(out)
    with (tmp_path / "whole/metrics.csv").open() as file:
        assert result.test_accuracy == float(list(csv.DictReader(file))[-1]["test_accuracy"])
    assert result.zeros == pytest.approx(0.9, abs=1e-4)


def test_a_signal_stops_the_cells_and_tells_how_to_go_on(tmp_path, fake_cells, monkeypatch, capsys) -> None:
    waits = "import os, pathlib, sys; print('waits', flush=True); os.read(0, 1); sys.exit(130)"
    monkeypatch.setattr(process, "PROGRAM", waits)
    plain = command.Progress.update

    def update(self, running):
        if all(path.stat().st_size for path in (tmp_path / "logs").iterdir()):
            signal.raise_signal(signal.SIGTERM)
        plain(self, running)

    monkeypatch.setattr(command.Progress, "update", update)
    options = ["--methods", "feather", "hard", "--sparsities", "0.9", "--jobs", "2", "--out", str(tmp_path)]
    assert compare(*options) == 130
    assert "continue with the same command" in capsys.readouterr().out
    assert [result.status for result in read_results(tmp_path)] == [OPEN, OPEN]


# ------------------------------------------------------------------------------------------------ committed results


TWO_CELLS = ["--methods", "feather", "dense", "--sparsities", "0.9"]


@pytest.fixture
def committed(tmp_path, fake_cells, capsys) -> Path:
    """A folder with what compare has written, as it may be committed: without the runs and without grid.json."""
    assert compare(*TWO_CELLS, "--out", str(tmp_path / "out")) == 0
    folder = tmp_path / "committed"
    folder.mkdir()
    for name in WRITTEN:
        shutil.copy(tmp_path / "out" / name, folder)
    capsys.readouterr()
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PROGRAM", "raise SystemExit('trained again')")


def test_finished_rows_are_taken_over_unchanged(committed, no_training, capsys) -> None:
    edit(committed / "results.csv", ",0.5,", ",0.12345678901234568,")  # what no training here could give
    before = contents(committed)
    assert compare(*TWO_CELLS, "--out", str(committed)) == 0
    output = capsys.readouterr().out
    assert f"2 of 2 cells are taken from {committed / 'results.csv'}; their runs are gone" in output
    assert "started" not in output
    for name in ("results.csv", "layers.csv"):
        assert (committed / name).read_bytes() == before[committed / name]
    assert "| feather |  | 12.35 (1) |" in (committed / "table.md").read_text()
    assert compare(*TWO_CELLS, "--out", str(committed)) == 0, "now the folder has its grid.json"
    assert (committed / "results.csv").read_bytes() == before[committed / "results.csv"]


def test_cells_that_are_not_finished_or_new_are_trained(committed, capsys) -> None:
    edit(committed / "results.csv", ",0.5,", ",0.25,")
    lines = (committed / "results.csv").read_text().splitlines(keepends=True)
    dense = lines[2].replace("finished,0.25,0.8,3.5", "failed,,,").replace("\n", "it broke\n")
    (committed / "results.csv").write_text(lines[0] + lines[1] + dense)
    assert compare(*TWO_CELLS, "--seeds", "0", "1", "--out", str(committed)) == 0
    output = capsys.readouterr().out
    assert "feather-0.9-seed0" not in output
    assert output.count(": started") == 3
    assert {result.cell: result.test_accuracy for result in read_results(committed)} == {
        "feather-0.9-seed0": 0.25,  # as committed
        "dense-0-seed0": 0.5,
        "feather-0.9-seed1": 0.5,
        "dense-0-seed1": 0.5,
    }
    assert len(read_layers(committed)) == 8
    assert (committed / "accuracy.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_cell_whose_run_was_deleted_stays_finished(tmp_path, fake_cells, monkeypatch, capsys) -> None:
    assert compare(*TWO_CELLS, "--out", str(tmp_path)) == 0
    before = contents(tmp_path)
    shutil.rmtree(tmp_path / "cells/feather-0.9-seed0")
    (tmp_path / "cells/dense-0-seed0/model.safetensors").unlink()
    monkeypatch.setattr(process, "PROGRAM", "raise SystemExit('trained again')")
    assert compare(*TWO_CELLS, "--out", str(tmp_path)) == 0
    assert (tmp_path / "results.csv").read_bytes() == before[tmp_path / "results.csv"]
    assert (tmp_path / "layers.csv").read_bytes() == before[tmp_path / "layers.csv"]


def test_files_beside_committed_results_are_left_alone(committed, no_training) -> None:
    (committed / "README.md").write_text("the story")
    assert compare(*TWO_CELLS, "--out", str(committed)) == 0
    assert (committed / "README.md").read_text() == "the story"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "dense"], "the grid has no feather-0.9-seed0"),
        (["--methods", "hard", "--sparsities", "0.9"], "the grid has no feather-0.9-seed0, dense-0-seed0"),
        ([*TWO_CELLS, "--epochs", "2"], "feather-0.9-seed0 has epochs 30 there and 2 here"),
        ([*TWO_CELLS, "--model", "resnet20"], "feather-0.9-seed0 has model 'cnn' there and 'resnet20' here"),
        (
            [*TWO_CELLS, "--lr", "0.2"],
            "an option differs; if the row was made with label feather, data digits",
        ),
        ([*TWO_CELLS, "--dtype", "bfloat16"], "dtype bfloat16"),
    ],
)
def test_committed_results_of_another_grid_are_refused(committed, capsys, options: list[str], words: str) -> None:
    before = contents(committed)
    error = refused(capsys, *options, "--out", str(committed))
    assert words in error
    assert str(committed / "results.csv") in error
    assert contents(committed) == before


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("results.csv", ",finished,0.5,", ",finished,,", "a finished cell must have test_accuracy"),
        ("results.csv", ",finished,", ",done,", "status must be finished, failed or open, got 'done'"),
        ("results.csv", "feather,feather,digits,cnn,30,0.9,0,", "dense,dense,digits,cnn,30,0.0,0,", "more than one of"),
        ("layers.csv", "feather,", "soft,", "lacks feather-0.9-seed0"),
        ("layers.csv", ",100,", ",x,", "layers.csv with the columns"),
    ],
)
def test_damaged_committed_results_are_refused(committed, capsys, file, old, new, words) -> None:
    edit(committed / file, old, new)
    before = contents(committed)
    assert words in refused(capsys, *TWO_CELLS, "--out", str(committed))
    assert contents(committed) == before


def test_results_without_layers_or_with_runs_of_unknown_origin_are_refused(committed, capsys) -> None:
    (committed / "layers.csv").unlink()
    assert "no layers.csv" in refused(capsys, *TWO_CELLS, "--out", str(committed))
    (committed / "cells").mkdir()
    assert "must be a new folder" in refused(capsys, *TWO_CELLS, "--out", str(committed))


def test_rows_of_older_versions_need_grid_json_or_a_decision(tmp_path, fake_cells, capsys) -> None:
    """They have no fingerprint, so nothing but grid.json tells which options made them."""
    assert compare(*TWO_CELLS, "--out", str(tmp_path)) == 0
    new = (tmp_path / "results.csv").read_text()
    first, second = (result.fingerprint for result in read_results(tmp_path))
    old = new.replace(",fingerprint", "").replace(f",{first}", "").replace(f",{second}", "")
    (tmp_path / "results.csv").write_text(old)
    shutil.rmtree(tmp_path / "cells")
    assert compare("--table", str(tmp_path)) == 0
    capsys.readouterr()
    assert compare(*TWO_CELLS, "--out", str(tmp_path)) == 0
    assert "started" not in capsys.readouterr().out
    assert (tmp_path / "results.csv").read_text() == new
    (tmp_path / "results.csv").write_text(old)
    (tmp_path / GRID).unlink()
    shutil.rmtree(tmp_path / "cells")
    error = refused(capsys, *TWO_CELLS, "--out", str(tmp_path))
    assert "an older version wrote it" in error
    assert f"put {first} there" in error


def test_a_fingerprint_changes_with_every_option_that_counts_and_with_no_other(tmp_path: Path) -> None:
    def fingerprint(**given: object) -> str:
        (cell,) = make_grid(["feather"], [0.9], [0], {"device": "cpu", **given})
        return cell.fingerprint

    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        make_npz(tmp_path / folder / "bright.npz", (8, 8))
    counts = [
        *({"data": str(tmp_path / "here/bright.npz")}, {"model": "resnet20"}, {"power": 2.0}, {"grad_scale": 0.5}),
        *({"epochs": 2}, {"batch_size": 32}, {"lr": 0.2}, {"momentum": 0.8}, {"weight_decay": 0.0}, {"clip": 1.0}),
        {"dtype": "bfloat16"},
    ]
    found = [fingerprint(), *(fingerprint(**given) for given in counts)]
    assert len(set(found)) == len(found)
    assert fingerprint(lr=1) == fingerprint(lr=1.0)
    assert fingerprint(data_dir="elsewhere") == fingerprint()
    assert fingerprint(data=str(tmp_path / "there/bright.npz")) == found[1], "the data may lie elsewhere"
    named = {next(iter(given)) for given in counts} | {"label", "method", "sparsity", "seed", "device"}
    assert set(make_grid(["feather"], [0.9], [0], {})[0].portable_identity()) == named


# ------------------------------------------------------------------------------------------------ table


def result(label: str, sparsity: float, seed: int, accuracy: float | None, status: str = FINISHED) -> Result:
    return Result(label, label, "digits", "cnn", 3, sparsity, seed, status, accuracy, sparsity, 1.0)


def test_the_table_has_mean_spread_and_number_of_seeds() -> None:
    results = [
        *(result("feather", 0.95, 0, 0.60), result("feather", 0.95, 1, 0.64), result("feather", 0.98, 0, 0.5)),
        *(result("feather", 0.98, 1, None, OPEN), result("gmp", 0.98, 0, None, FAILED), result("dense", 0.0, 0, 0.7)),
    ]
    lines = table.to_markdown(results).splitlines()
    assert lines[0].startswith("digits, cnn, 3 epochs: ")
    assert lines[0].endswith("4 of 6 cells have finished.")
    assert lines[2:7] == [
        "| method | dense | 0.95 | 0.98 |",
        "|---|---|---|---|",
        "| feather |  | 62.00 ± 2.83 (2) | 50.00 (1 of 2) |",
        "| gmp |  |  | failed |",
        "| dense | 70.00 (1) |  |  |",
    ]


def test_table_and_figures_are_made_again_from_the_csv_files_alone(tmp_path, fake_cells, capsys) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy"
    methods = ["--methods", "feather", "soft", "dense", "--sparsities", "0.9", "0.95", "--seeds", "0", "1"]
    assert compare(*methods, "--jobs", "4", "--out", str(out)) == 0
    copy.mkdir()
    for name in ("results.csv", "layers.csv"):
        (copy / name).write_bytes((out / name).read_bytes())
    capsys.readouterr()
    assert compare("--table", str(copy)) == 0
    assert {path.name for path in copy.iterdir()} == WRITTEN
    for name in WRITTEN:
        assert (copy / name).read_bytes() == (out / name).read_bytes()
    assert capsys.readouterr().out == (copy / "table.md").read_text()
    assert (copy / "accuracy.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_figure_names_only_methods_that_have_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_png", lambda figure: figure.axes[0].get_legend_handles_labels()[1])
    known = {"data": "digits", "model": "cnn", "epochs": 1, "sparsity": 0.9, "seed": 0, "fingerprint": ""}
    finished = Result(label="soft", method="soft", status=FINISHED, test_accuracy=0.5, zeros=0.9, seconds=1.0, **known)
    waiting = Result(label="hard", method="hard", status=OPEN, **known)
    assert figures.draw_accuracy([finished, waiting]) == ["soft (one seed)"]
    assert figures.draw_accuracy([waiting]) == []


@pytest.mark.parametrize("damage", ["empty", "columns", "number"])
def test_a_damaged_csv_is_refused(tmp_path, fake_cells, capsys, damage: str) -> None:
    assert compare("--methods", "dense", "--out", str(tmp_path)) == 0
    path = tmp_path / "results.csv"
    text = path.read_text()
    path.write_text(
        {"empty": "", "columns": text.replace("seed", "sead"), "number": text.replace(",30,", ",x,")}[damage]
    )
    assert "results.csv" in refused(capsys, "--table", str(tmp_path))


def test_cells_must_be_trainable_before_any_begins() -> None:
    with pytest.raises(InputError, match="--model must be one of"):
        make_grid(["feather"], [0.9], [0], {"data": "digits", "model": "vgg"})

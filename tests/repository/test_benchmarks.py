"""The benchmarks at smoke size: every case runs, the gates catch wrong results, the csv has its documented columns."""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.profiler import profile

from benchmarks import backends, bars, fake_cuda_driver, gates, host_process, inputs, results, table
from benchmarks.__main__ import main
from benchmarks.case import Figure, Setting, Trial, Variant, accept
from benchmarks.cases import CASES, evaluation, host, memory, select, threshold, train_step
from benchmarks.clock import CpuClock, Run, clock_for
from benchmarks.environment import describe
from benchmarks.measure import Outcome, count_rounds, measure, rounds_for
from feather_kernels.cli.gpu_report.clock import is_due

SMOKE = Setting(torch.device("cpu"), smoke=True)


class FakeClock:
    """Says that a run took as many seconds as its function returns."""

    def time(self, run: Callable[[], Any]) -> Run:
        result = run()
        return Run(result, float(result))

    def peak_memory(self, run: Callable[[], Any]) -> tuple[Run, int | None]:
        return self.time(run), 1000


def constant_trial(seconds: dict[str, float], rounds: int = 10, **variant: Any) -> Trial:
    def make(name: str) -> Callable[[Any], Variant]:
        return lambda _: Variant(lambda: seconds[name], moved=8, gate=accept, **variant)

    return Trial("op", "input", 0.9, lambda: None, {name: make(name) for name in seconds}, "limit", rounds, 1.0)


def rows(trial: Trial, size: str = "full", case: str = "case") -> list[dict[str, str]]:
    return list(results.rows_of(case, trial, measure(trial, FakeClock()), size))


@pytest.mark.parametrize("name", CASES)
def test_every_case_runs_and_every_variant_passes_its_gate(name: str) -> None:
    if name == "host" and (reason := fake_cuda_driver.missing()):
        pytest.skip(reason)
    for trial in CASES[name].trials(SMOKE):
        assert trial.limit in trial.variants
        outcomes = measure(trial, CpuClock())
        assert {outcome.variant: outcome.failure for outcome in outcomes} == dict.fromkeys(trial.variants)
        assert all(len(outcome.times) == trial.rounds and min(outcome.times, default=1) > 0 for outcome in outcomes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("import", "host")])
def test_every_case_runs_on_a_gpu(name: str) -> None:
    setting = Setting(torch.device("cuda", 0), smoke=True)
    for trial in CASES[name].trials(setting):
        outcomes = measure(trial, clock_for(setting.device))
        assert {outcome.variant: outcome.failure for outcome in outcomes} == dict.fromkeys(trial.variants)


def test_trials_of_full_size_are_named_without_computing_anything() -> None:
    trials = [trial for case in CASES.values() for trial in case.trials(Setting(torch.device("cpu")))]
    assert all(trial.limit in trial.variants for trial in trials)
    keys = [(trial.title, tuple(trial.variants)) for trial in trials]
    assert len(keys) == len(set(keys))


# ---------------------------------------------------------------------------------------------- gates


def wrong_mask(y: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.where(w.abs() == w.abs()[w.abs() > t].min(), 0.0, y)


def wrong_value(y: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return y * (1 + 4 * torch.finfo(y.dtype).eps)


def not_a_number(y: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.full_like(y, math.nan)


@pytest.mark.parametrize("spoil", [wrong_mask, wrong_value, not_a_number])
@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, math.inf])
def test_forward_gate(spoil: Callable[..., torch.Tensor], power: float) -> None:
    data = inputs.make_inputs(SMOKE, *inputs.PEER_INPUT)
    right = [torch.ops.feather_kernels.threshold(w, data.threshold, power) for w in data.weights]
    assert gates.check_thresholded(right, data.weights, data.threshold, power) is None
    wrong = [*right[:-1], spoil(right[-1], data.weights[-1], data.threshold)]
    message = gates.check_thresholded(wrong, data.weights, data.threshold, power)
    assert message is not None
    assert message.startswith(f"tensor {len(right) - 1}: ")


def test_gate_of_a_peer_allows_the_formula_and_not_more() -> None:
    data = inputs.make_inputs(SMOKE, *inputs.PEER_INPUT)
    right = [torch.ops.feather_kernels.threshold(w, data.threshold, 3.0) for w in data.weights]
    hard = [torch.ops.feather_kernels.threshold(w, data.threshold, math.inf) for w in data.weights]
    assert gates.check_thresholded(right, data.weights, data.threshold, 3.0, exact=False) is None
    assert gates.check_thresholded(hard, data.weights, data.threshold, 3.0, exact=False) is not None


@pytest.mark.parametrize("exact", [True, False])
def test_gradient_gate(exact: bool) -> None:
    w, t = torch.tensor([0.1, 0.5, -2.0]), torch.tensor(0.3)
    g = torch.tensor([2.0, 4.0, 0.0])
    assert gates.check_scaled([torch.tensor([1.0, 4.0, 0.0])], [g], [w], t, 0.5, exact) is None
    assert gates.check_scaled([torch.tensor([1.0, 4.0, 0.0]).double()], [g], [w], t, 0.5, exact) is not None
    for scaled in ([2.0, 4.0, 0.0], [1.0, 2.0, 0.0], [1.0, 4.0, 1e-30]):
        assert gates.check_scaled([torch.tensor(scaled)], [g], [w], t, 0.5, exact) is not None


def test_selection_gate_is_bitwise() -> None:
    data = select.prepare_drifted(SMOKE, *inputs.PEER_INPUT)
    values = data.inputs.values
    assert data.gate(values.clone()) is None
    assert data.gate(torch.nextafter(values, torch.tensor(math.inf))) is not None
    assert data.gate(data.hint) is not None  # the weights have moved: the hint is not the answer


def test_a_variant_that_writes_nothing_does_not_pass_on_the_result_of_another() -> None:
    trial = next(iter(CASES["threshold"].trials(SMOKE)))
    data = trial.prepare()
    for name, make in trial.variants.items():
        make(data).run()
        if name.startswith("ours["):
            assert data.gate(data.outputs, exact=True) is None
            variant = threshold.ours(data, "reference")
            assert variant.gate(data.outputs) is not None


def test_a_variant_that_fails_is_reported_and_never_timed() -> None:
    calls: Counter[str] = Counter()

    def make(name: str, gate: Callable[[Any], str | None]) -> Callable[[Any], Variant]:
        def run() -> float:
            calls[name] += 1
            if name == "raises":
                raise RuntimeError("no compiler")
            return 0.001

        return lambda _: Variant(run, 8, gate)

    variants = {
        "limit": make("limit", accept),
        "wrong": make("wrong", lambda _: "4 elements differ"),
        "raises": make("raises", accept),
    }
    trial = Trial("op", "input", None, lambda: None, variants, "limit", rounds=5)
    outcomes = {outcome.variant: outcome for outcome in measure(trial, FakeClock())}
    assert calls == {"limit": 2 + 5, "wrong": 1, "raises": 1}
    assert (outcomes["wrong"].failure, outcomes["wrong"].times) == ("4 elements differ", [])
    assert (outcomes["raises"].failure, outcomes["raises"].times) == ("RuntimeError: no compiler", [])
    made = [row for row in results.rows_of("case", trial, list(outcomes.values()), "full") if row["variant"] == "wrong"]
    assert [(row["metric"], row["value"], row["note"]) for row in made] == [("gate", "0", "4 elements differ")]


# ---------------------------------------------------------------------------------------------- rounds and figures


@pytest.mark.parametrize(("count", "rounds"), [(3, 40), (40, 40), (1, 1), (7, 30)])
def test_slow_variants_are_spread_over_the_rounds(count: int, rounds: int) -> None:
    due = [index for index in range(rounds) if is_due(index, count, rounds)]
    assert len(due) == count
    gaps = [b - a for a, b in itertools.pairwise(due)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_rounds_fit_the_time_but_are_three_at_least() -> None:
    assert rounds_for(0.1, 40, 1.0) == 10
    assert rounds_for(5.0, 40, 1.0) == 3
    assert rounds_for(1e-6, 40, 1.0) == 40
    assert rounds_for(5.0, 1, 1.0) == 1


def test_what_is_as_fast_as_the_limit_takes_part_in_the_same_rounds() -> None:
    trial = constant_trial({"limit": 0.0, "ours": 0.0, "slow": 0.0}, rounds=40)  # 1 s for each
    assert count_rounds({"limit": 0.10, "ours": 0.05, "slow": 0.3}, trial) == {"limit": 20, "ours": 20, "slow": 3}
    assert count_rounds({"ours": 0.05, "slow": 0.3}, trial) == {"ours": 20, "slow": 3}


def test_rounds_are_interleaved_in_changing_order() -> None:
    order: list[str] = []
    ran = {"limit": 0.001, "b": 0.001, "c": 0.001}

    def make(name: str) -> Callable[[Any], Variant]:
        return lambda _: Variant(lambda: order.append(name) or 0.001, 8, accept)

    trial = Trial("op", "input", None, lambda: None, {name: make(name) for name in ran}, "limit", rounds=12)
    measure(trial, FakeClock())
    timed = order[2 * len(ran) :]
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert len(rounds) == 12
    assert all(set(names) == set(ran) for names in rounds)
    assert len(set(rounds)) > 2


def test_figures_of_a_trial() -> None:
    made = rows(constant_trial({"limit": 0.002, "ours[cpp]": 0.003}, calls=2))
    ours = {row["metric"]: float(row["value"]) for row in made if row["variant"] == "ours[cpp]"}
    assert ours == {
        "gate": 1.0,
        "time_median": 0.0015,
        "time_p20": 0.0015,
        "time_p80": 0.0015,
        "ratio_to_limit": 1.5,
        "time_beyond_limit": pytest.approx(0.0005),
        "bandwidth": pytest.approx(4 / 0.0015 / 1e9, rel=1e-5),
        "peak_extra_memory": 1000.0,
    }


def test_a_variant_has_figures_of_its_own() -> None:
    made = rows(constant_trial({"limit": 0.002}, figures={"launches": Figure(1.5, "count")}))
    assert [(row["value"], row["unit"]) for row in made if row["metric"] == "launches"] == [("1.5", "count")]


def test_without_rounds_only_the_gate_and_the_figures_count() -> None:
    made = rows(constant_trial({"limit": 0.002}, rounds=0, figures={"peak": Figure(8, "B")}))
    assert {row["metric"]: row["value"] for row in made} == {"gate": "1", "peak": "8"}


def test_without_a_compiler_the_stand_in_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    trial = next(trial for trial in CASES["host"].trials(SMOKE) if host.STAND_IN in trial.operation)
    reason = fake_cuda_driver.missing()
    assert reason is not None
    assert {outcome.failure for outcome in measure(trial, CpuClock())} == {f"RuntimeError: {reason}"}


def test_kernels_of_torch_are_counted_through_what_calls_them() -> None:
    pruned, layer = torch.ones(3), torch.nn.Linear(3, 3)

    def work() -> None:
        layer(pruned.view(1, 3).t().t()).tanh()  # addmm, tanh; views launch nothing
        torch.zeros(3)  # a fill

    with profile(use_kineto=False) as profiler:
        work()
    assert host_process.torch_kernels(profiler.function_events) == 3


def test_percentiles() -> None:
    assert results.spread([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == (1.0, 2.5, 4.0)


def test_memory_is_the_peak_and_not_what_remains() -> None:
    _, peak = clock_for(torch.device("cpu")).peak_memory(lambda: torch.ones(16 << 20).sum())
    if peak is None:
        pytest.skip("the system does not tell a process its peak memory")
    assert 60e6 < peak < 80e6


def test_shapes_are_those_of_resnet50() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.resnet50()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert Counter(inputs.resnet50_shapes()) == Counter(tuple(layer.weight.shape) for layer in layers)
    assert sum(map(math.prod, inputs.resnet50_shapes())) == 25_502_912


# ---------------------------------------------------------------------------------------------- results


def test_csv_has_the_documented_columns(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    assert main(["run", "count", "--smoke", "--results", str(path)]) == 0
    assert main(["run", "count", "--smoke", "--results", str(path)]) == 0
    with path.open(newline="") as file:
        made = list(csv.DictReader(file))
    documented = (results.FOLDER.parent / "README.md").read_text().split("## The csv")[1]
    assert set(made[0]) == set(results.COLUMNS)
    assert set(results.COLUMNS) <= set(re.findall("[a-z_]+", documented))
    assert {row["case"] for row in made} == {"count"}
    assert all(row["commit"] is not None and row["torch"] == torch.__version__ for row in made)
    assert sum(row["metric"] == "time_median" and row["variant"] == "sum" for row in made) == 2
    assert main(["bars", "--results", str(path)]) == 2  # nothing of full size in it


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns"):
        results.append(path, [], describe(SMOKE.device))
    assert path.read_text() == "a,b\n1,2\n"


def test_a_file_of_two_machines_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mixed.csv"
    path.write_text(",".join(results.COLUMNS) + "\n")
    made = rows(constant_trial({"limit": 0.001}))
    results.append(path, made, describe(SMOKE.device))
    assert results.read_full(path)
    results.append(path, made, {**describe(SMOKE.device), "threads": "17"})
    with pytest.raises(ValueError, match="one threads, got"):
        results.read_full(path)


def rows_of_a_full_run(**environment: str) -> list[dict[str, str]]:
    """Every trial of full size with figures made up: 1 ms, ours 2 ms, 3 launches, some bytes."""
    backend = backends.available(SMOKE.device)[0]
    base = {**describe(SMOKE.device), "backend": backend, "commit": "0123456789", **environment}
    counts = dict.fromkeys(("triton_launches", "torch_kernels", host.LAUNCHES), Figure(3, "count"))
    held = memory.Held(4e6, 5e6, 0, 6e6).figures(memory.Held(4e6, 4e6, 0, 4e6), weights=1e6)
    made = []
    for name, case in CASES.items():
        for trial in case.trials(Setting(SMOKE.device)):
            figures = {"host": counts, "memory": held}.get(name, {})
            outcomes = [
                Outcome(
                    variant, None, 8, 1000, figures, [0.002 if "ours[" in variant else 0.001] * min(1, trial.rounds)
                )
                for variant in trial.variants
            ]
            made += [{**base, **row} for row in results.rows_of(name, trial, outcomes, "full")]
    return made


def test_a_full_run_measures_every_bar() -> None:
    verdicts = list(bars.judge(rows_of_a_full_run()))
    assert [verdict.bar.text for verdict in verdicts if verdict.holds is None] == []
    assert len({verdict.bar.text for verdict in verdicts}) == len(verdicts)
    shown = bars.format_verdicts(verdicts)
    assert re.search(r"^FAIL  us a layer beyond dense: GPU path, eager, 1 +<= 20 us +1000 +dense 1000 us$", shown, re.M)
    assert re.search(r"^pass  launches a layer beyond dense: GPU path, eager, 0.5 +<= 2 +0 +dense 3$", shown, re.M)
    assert re.search(r"^FAIL  import beyond torch +<= 50 ms ", shown, re.M) is None
    assert len(shown.splitlines()) == len(verdicts)


def test_a_full_run_fills_the_table() -> None:
    made = table.make_table(rows_of_a_full_run(), "results.csv")
    body = [line for line in made.splitlines() if line.startswith("| ")]
    titles = [cells[1].strip() for line in body if (cells := line.split("|"))]
    assert {line.text for line in table.LINES} <= set(titles)
    assert {comparison.operation for comparison in train_step.COMPARISONS} <= set(titles)
    assert {network.title for network in evaluation.NETWORKS} <= set(titles)
    assert {memory.operation(n, p) for n in memory.FOR_MEMORY for p in memory.PRECISIONS} <= set(titles)
    assert "| ResNet-50, 128 px, batch 8 | 1 ms | 2.00 | 2.00 | 2.00 | 1.000 | 1.000 |" in body
    assert "| ResNet-20, 32 px, batch 128 | 1 ms | 2.00 | 2.00 |" in body
    assert "| CPU, eager | 1 ms | 1 ms | 1 ms |" in body
    assert "| ViT-B/16, float32 | 4 / 5 / 6 | +0.00 / +1.00 / +2.00 | +0.00 / +1.00 / +2.00 |" in body
    assert "`step()` of 20 layers: 2 ms and 3 launches (GPU path" in made
    assert "`import feather_kernels` after `import torch`: " in made


def full_rows(ratio: float) -> list[dict[str, str]]:
    environment = {**describe(SMOKE.device), "backend": "cpp", "kernels": "avx2", "commit": "0123456789"}
    made = []
    for sparsity in (0.5, 0.9):
        trial = constant_trial({"sum": 0.001, "ours[cpp]": 0.001 * ratio, "plain PyTorch": 0.009})
        trial = Trial("float32", "normal", sparsity, trial.prepare, trial.variants, "sum", 3)
        made += [{**environment, **row} for row in rows(trial, case="count")]
    return made


def test_bars_hold_or_not() -> None:
    verdicts = {verdict.bar.text: verdict for verdict in bars.judge(full_rows(1.5))}
    assert verdicts["count_pruned / sum"].holds is True
    assert verdicts["count_pruned / sum"].inputs == 2
    assert verdicts["selection, steady / sum"].holds is None
    verdicts = {
        verdict.bar.text: verdict for verdict in bars.judge([*full_rows(1.5), *full_rows(1.7)])
    }  # the last one counts
    assert verdicts["count_pruned / sum"].holds is False
    assert verdicts["count_pruned / sum"].worst == pytest.approx(1.7)
    failed = [row | {"value": "0"} if row["metric"] == "gate" else row for row in full_rows(1.0)]
    verdicts = {verdict.bar.text: verdict for verdict in bars.judge(failed)}
    assert verdicts["count_pruned / sum"].holds is False


def test_table_goes_between_the_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    made = table.make_table(full_rows(1.5), "results.csv")
    table.insert(made, readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n")
    assert text.endswith(f"{table.END}\nafter\n")
    assert "old" not in text
    assert "| count of pruned weights | 1.5 ms | 1.50 × `sum` | 0.0 MB | plain PyTorch 6.00 × |" in text
    assert "python -m benchmarks run count --device cpu" in text
    table.insert(made, readme)
    assert readme.read_text() == text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="must hold the lines"):
        table.insert(made, readme)


def test_a_readme_takes_no_figures_from_a_dirty_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, path = tmp_path / "README.md", tmp_path / "results.csv"
    for commit, status in (("0123456789-dirty", 2), ("0123456789", 0)):
        readme.write_text(f"{table.BEGIN}\n{table.END}\n")
        path.unlink(missing_ok=True)
        results.append(path, [row | {"commit": commit} for row in full_rows(1.5)], {})
        assert main(["table", "--results", str(path)]) == 0
        assert main(["table", "--results", str(path), "--readme", str(readme)]) == status
        assert ("0123456789" in readme.read_text()) == (status == 0)
    assert "clean commit, got 0123456789-dirty" in capsys.readouterr().err

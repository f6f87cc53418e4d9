"""The report names layers without a weight left, and what stays dense with its share of the model."""

from __future__ import annotations

import csv
import io

import pytest
import torch
from torch import nn

import feather_kernels as fk


def uneven() -> nn.Sequential:
    """Three layers of 16, 32 and 8 weights; the first has magnitudes far below those of the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
        model[1].weight[:, 0] = 5.0
    return model


def report_of(model: nn.Module, sparsity: float = 0.5, **options: object) -> fk.Report:
    return fk.Sparsifier(model, schedule=fk.ConstantSchedule(sparsity), **options).report()


def test_a_layer_without_a_weight_left_is_marked_in_every_form() -> None:
    report = report_of(uneven())
    assert [layer.empty for layer in report.layers] == [True, False, False]
    assert report.empty_layers == report.layers[:1]
    assert [layer["empty"] for layer in report.to_dict()["layers"]] == [True, False, False]
    assert [row["note"] for row in csv.DictReader(io.StringIO(report.to_csv()))] == ["empty", "", ""]
    line = "1 layer is empty, with no weight left: min_density=... keeps a fraction of it"
    for text in (str(report), report.to_markdown()):
        lines = text.splitlines()
        assert lines.count(line) == 1
        assert [row for row in lines if row.rstrip(" |").endswith("empty")] == [next(r for r in lines if "4x4" in r)]


def test_nothing_is_marked_where_every_layer_keeps_a_weight() -> None:
    report = report_of(uneven(), min_density=0.05)
    assert report.empty_layers == ()
    assert "empty" not in str(report) + report.to_markdown() + report.to_csv()


def test_a_layer_without_elements_is_not_empty() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(0, 4))
    assert report_of(model).empty_layers == ()


def test_many_empty_layers_of_a_real_network_are_counted() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    report = report_of(torchvision.models.mobilenet_v2(num_classes=10), 0.95)
    count = sum(layer.zeros == layer.numel for layer in report.layers)
    assert len(report.empty_layers) == count > 10
    assert f"{count} layers are empty, with no weight left: min_density=... keeps a fraction of each" in str(report)


def test_what_stays_dense_has_its_share_of_all_parameters() -> None:
    model = nn.ModuleDict({"kept": nn.Linear(10, 10, bias=False), "left": nn.Linear(10, 5), "right": nn.Linear(5, 10)})
    report = report_of(model, ignore=["left", "right"])
    assert report.model_parameters == 100 + 55 + 60
    total = f"left dense: 2 layers, 100 weights, {100 / 215:.4%} of all parameters"
    size = f"in ignore (50 weights, {50 / 215:.4%} of all parameters)"
    text, markdown = str(report).splitlines(), report.to_markdown().splitlines()
    assert text[-3:] == [total, f"left dense: left: {size}", f"left dense: right: {size}"]
    assert markdown[-4:] == [f"{total}:", "", f"- `left`: {size}", f"- `right`: {size}"]
    data = report.to_dict()
    assert data["dense_numel"] == 100
    assert data["skipped"][0] == {
        "name": "left",
        "reason": "in ignore",
        "numel": 50,
        "shared": 0,
        "model_share": 50 / 215,
    }


def test_nothing_is_said_of_dense_layers_where_there_are_none() -> None:
    report = report_of(uneven())
    assert report.dense_numel == 0
    assert "left dense" not in str(report) + report.to_markdown()


@pytest.mark.parametrize("end", [fk.Sparsifier.finalize, fk.Sparsifier.detach])
def test_a_report_of_layers_that_are_dense_again_has_counts_but_no_advice(end) -> None:
    sparsifier = fk.Sparsifier(uneven(), schedule=fk.ConstantSchedule(0.5))
    before = sparsifier.report()
    end(sparsifier)
    report = sparsifier.report()
    counts = [(layer.name, layer.zeros, layer.threshold, layer.ties, layer.empty) for layer in before.layers]
    assert [(layer.name, layer.zeros, layer.threshold, layer.ties, layer.empty) for layer in report.layers] == counts
    assert report.kept_bytes == 0 < before.kept_bytes
    for live, text in ((str(before), str(report)), (before.to_markdown(), report.to_markdown())):
        assert "1 layer is empty, with no weight left\n" in f"{text}\n"
        for advice in ("keeps", "P(w)", "recompute", "min_density"):
            assert advice in live
            assert advice not in text


def test_the_picture_marks_empty_layers() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    from matplotlib.colors import to_hex

    from feather_kernels.cli.train.figure import TEST, TRAIN, draw_layers

    axes = figure.subplots()
    draw_layers(axes, report_of(uneven()))
    assert axes.texts[0].get_text() == "empty, all of 16"
    assert [text.get_color() for text in axes.texts] == [TEST, "black", "black"]
    assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == [TEST, TRAIN, TRAIN]

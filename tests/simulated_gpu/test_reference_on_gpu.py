"""The reference backend on a GPU, where additions are atomic, spreads its counts over copies of the histogram."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from feather_kernels.backends import reference
from feather_kernels.backends.interface import Histogram, Selection
from tests.support.no_host_read import NoHostRead
from tests.support.oracle import same_bits
from tests.support.recorded_operations import RecordedOperations
from tests.support.uploads import count_uploads


class IndexAdditions(RecordedOperations):
    """Per index_add_ of keys: the additions at its busiest address, and how large its target was."""

    def __init__(self) -> None:
        super().__init__()
        self.busiest: list[int] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket is torch.ops.aten.index_add_ and args[0].dim() == 1:  # of keys, not of groups
            self.busiest.append(int(args[2].bincount().max()))
            self.sizes.append(args[0].numel())
        return super().__torch_dispatch__(func, types, args, kwargs)


KEYS = {
    "normal": lambda: torch.randn(600_001, generator=torch.Generator().manual_seed(0)),
    "float64": lambda: torch.randn(300_001, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "strided": lambda: torch.randn(600, 1001, generator=torch.Generator().manual_seed(0))[:, ::2],
    "ties": lambda: torch.full((300_000,), 0.5),
}


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("capped", [False, True])
def test_the_reference_adds_few_keys_at_one_address_of_a_gpu(
    kind: str, capped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [KEYS[kind](), torch.linspace(-2, 2, 999, dtype=KEYS[kind]().dtype)]
    rank = torch.tensor([sum(w.numel() for w in weights) * 9 // 10])
    caps = torch.tensor([w.numel() - 7 for w in weights]) if capped else None
    seen = []
    for atomically in (False, True):
        monkeypatch.setattr(reference, "_adds_atomically", lambda _, answer=atomically: answer)
        with IndexAdditions() as mode, NoHostRead():
            selection = Selection(weights, [0, 0], rank, caps=caps)
            out = torch.empty(1, 2, dtype=weights[0].dtype)
            reference.magnitude_select(selection, out)
        seen.append((out, mode))
    (plain, before), (spread, after) = seen
    assert same_bits(plain, spread)
    assert max(before.busiest) > reference.CHUNK * 0.9  # nearly all keys of a chunk are under another prefix
    assert max(after.busiest) <= reference.CHUNK // reference.MOST_COPIES
    assert max(after.sizes) * 8 <= 4 << 20
    assert not {"sort", "bincount", "nonzero", "masked_select"} & set(after.names)


@pytest.mark.parametrize("bits", [1, 8, 11, 18])
def test_histograms_of_spread_bins_are_those_of_single_ones(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, generator=generator) for n in (70_000, 0, 333, 1)]
    prefix = torch.tensor([0x3F000000 >> bits + 5, 0x3F800000 >> bits + 5])
    counts = []
    for atomically in (False, True):
        monkeypatch.setattr(reference, "_adds_atomically", lambda _, answer=atomically: answer)
        out = torch.empty(2, 1 << bits, dtype=torch.int64)
        reference.magnitude_histogram(Histogram(weights, [0, 1, 0, 1], prefix, 5, bits), out)
        counts.append(out)
    assert counts[0].sum() > 0
    assert counts[0].equal(counts[1])


def test_the_reference_uploads_the_groups_of_capped_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = count_uploads(monkeypatch)
    weights, caps = [torch.randn(50), torch.randn(60)], torch.tensor([40, 50])
    for _ in range(3):
        reference.magnitude_select(Selection(weights, [0, 0], torch.tensor([9]), caps=caps), torch.empty(1, 2))
    assert [upload.tolist() for upload in uploads] == [[0, 0]]

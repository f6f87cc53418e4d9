"""Whether all processes train the same sparse model."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from feather_kernels.nn.dtensor import local_part
from feather_kernels.sparsify.distributed.collectives import sum_of_parts
from feather_kernels.sparsify.weight_memory import sums_of_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from feather_kernels.sparsify.distributed.sharding import Part
    from feather_kernels.sparsify.report import LayerReport

LISTED = 5  # differences that the error names


class Fingerprint(NamedTuple):
    """What must agree: the step, and of each layer its name and shape, T, zeros and the sum of the weight's bits."""

    step: int
    layers: tuple[tuple[str, float, int, int], ...]


def fingerprint(
    step: int, reports: Sequence[LayerReport], parameters: Sequence[Tensor], parts: Sequence[Part] | None
) -> Fingerprint:
    """Of the whole weights: what is sharded is summed over its processes."""
    sums = sums_of_bits(list(map(local_part, parameters))).cpu()
    if parts is not None:
        sums = sum_of_parts(sums, parts, step, read=True)
    rows = zip(reports, sums.tolist(), strict=True)
    return Fingerprint(
        step, tuple((f"{report.name} {report.shape}", report.threshold, report.zeros, bits) for report, bits in rows)
    )


def compare(own: Fingerprint) -> None:
    """Raise RuntimeError in all processes, naming ranks and layers, unless all have the same fingerprint."""
    import torch.distributed as dist

    found: list[Fingerprint | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    prints = [one for one in found if one is not None]
    different = [
        f"rank {rank}: {difference}"
        for rank, other in enumerate(prints)
        for difference in _differences(other, prints[0])
    ]
    if different:
        more = f", and {len(different) - LISTED} more" if len(different) > LISTED else ""
        listed = "; ".join(different[:LISTED])
        raise RuntimeError(f"the ranks must train one model, but not all have what the first has: {listed}{more}")


def _differences(other: Fingerprint, first: Fingerprint) -> list[str]:
    found = [f"step {other.step}, not {first.step}"] if other.step != first.step else []
    if len(other.layers) != len(first.layers):
        found.append(f"{len(other.layers)} sparse layers, not {len(first.layers)}")
    names = "name and shape", "threshold", "zeros", "sum of the weight's bits"
    for theirs, ours in zip(other.layers, first.layers, strict=False):
        facts = [
            f"{name} {a!r}, not {b!r}"
            for name, a, b in zip(names, theirs, ours, strict=True)
            if a != b and not (a != a and b != b)  # NaN
        ]
        if facts:
            found.append(f"layer {ours[0]} has {', '.join(facts)}")
    return found

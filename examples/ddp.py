"""Sparse training under DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/ddp.py

Every rank has all weights and selects their thresholds by itself: the sparsifier sends nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import feather_kernels as fk

STEPS = 60


def main() -> None:
    """Train in all processes that torchrun starts; the first prints what came out."""
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10)).to(device)
    sparsifier = fk.Sparsifier(model, sparsity=0.9, total_steps=STEPS)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)

    teacher = torch.randn(64, 10)
    for step in range(STEPS):
        x = torch.randn(256, 64, generator=torch.Generator().manual_seed(step)).chunk(ranks)[rank]
        y = (x @ teacher).argmax(1)
        loss = F.cross_entropy(parallel(x.to(device)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    sparsifier.assert_consistent()  # all ranks have the same weights and thresholds
    sparsifier.finalize()
    if rank == 0:
        report = sparsifier.report()
        print(f"loss {loss.item():.3f}, {report.zeros:,} of {report.numel:,} prunable weights are zero")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

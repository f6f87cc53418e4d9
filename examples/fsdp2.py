"""Sparse training under FSDP2.

    torchrun --nproc-per-node 2 examples/fsdp2.py

Every rank has a part of each weight. The ranks add up what they count in their parts, so that all find the thresholds
of one process: call what looks at weights, such as step(), finalize() and report(), on all ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import feather_kernels as fk

STEPS = 60


def main() -> None:
    """Train in all processes that torchrun starts; the first prints what came out."""
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if gpu:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    device = torch.device("cuda" if gpu else "cpu")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10)).to(device)
    sparsifier = fk.Sparsifier(model, sparsity=0.9, total_steps=STEPS, recompute=True)  # keeps no whole P(weight)
    mesh = init_device_mesh(device.type, (ranks,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)

    teacher = torch.randn(64, 10)
    for step in range(STEPS):
        x = torch.randn(256, 64, generator=torch.Generator().manual_seed(step)).chunk(ranks)[rank]
        y = (x @ teacher).argmax(1)
        loss = F.cross_entropy(model(x.to(device)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    sparsifier.finalize()
    if rank == 0:
        report = sparsifier.report()  # after finalize() it waits for nobody
        print(f"loss {loss.item():.3f}, {report.zeros:,} of {report.numel:,} prunable weights are zero")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""One backward of DistributedDataParallel on the CPU, as one of two processes: data_parallel_step.py FOLDER RANK

Writes the averaged gradients to FOLDER/rank<RANK>.pt; rank 0 also those of one process on the whole batch, to
FOLDER/whole.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import haste_ext


class Student(nn.Module):
    """A projection to q and k, and one to the teacher's features."""

    def __init__(self):
        super().__init__()
        self.qk, self.features = nn.Linear(16, 32), nn.Linear(16, 24)

    def forward(self, x: Tensor, teacher_q: Tensor, teacher_k: Tensor, teacher_features: Tensor) -> Tensor:
        q, k = self.qk(x).unflatten(-1, (2, 2, 8)).permute(2, 0, 3, 1, 4)
        attention = haste_ext.attn_align_loss(q, k, teacher_q, teacher_k)
        return attention + haste_ext.token_cosine_loss(self.features(x), teacher_features)


def gradients(model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
    model(*batch).backward()
    return {name.removeprefix("module."): x.grad for name, x in model.named_parameters()}


def main(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    student = Student()
    batch = [torch.randn(4, 9, 16), torch.randn(4, 2, 9, 8), torch.randn(4, 2, 9, 8), torch.randn(4, 9, 24)]
    if rank == 0:
        torch.save(gradients(student, batch), folder / "whole.pt")
        student.zero_grad()
    half = [x.chunk(2)[rank] for x in batch]
    torch.save(gradients(DistributedDataParallel(student), half), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""Owns data-parallel training: how the processes that torchrun started share batches and average gradients."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, distributed, nn

__all__ = ["ProcessGroup"]

STATISTICS: Final = ("mean", "variance")
"""Names of the buffers that training updates (`kar_offline.models.layers.Dice`)."""


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """The processes that train one model together. A process without torchrun is a group of one."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """Number of processes."""

    @staticmethod
    def current() -> "ProcessGroup":
        """The process group that torch has initialised, or this process alone."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return ProcessGroup()
        return ProcessGroup(distributed.get_rank(), distributed.get_world_size())

    @staticmethod
    @contextmanager
    def joined() -> Iterator["ProcessGroup"]:
        """Join the processes that torchrun started, over nccl on GPUs and gloo on CPUs; alone without torchrun."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
            yield ProcessGroup.current()
            return
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield ProcessGroup.current()
        finally:
            # The group's threads must end before the interpreter does, or they may abort the process.
            distributed.destroy_process_group()

    @property
    def device(self) -> torch.device:
        """The device that this process trains on: the GPU if there is one, else the CPU."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def share(self, rows: Tensor, list_length: int) -> Tensor:
        """This process' part of a batch.

        Args:
            rows: Row numbers of the batch [B].
            list_length: Rows of a list; lists are not divided.

        Returns:
            Row numbers. There may be none: the last batch can have fewer lists than there are processes.
        """
        if self.size == 1:
            return rows
        return rows.view(-1, list_length).tensor_split(self.size)[self.rank].flatten()

    def average_gradients(self, parameters: Sequence[Tensor], loss_sum: float, weight: float) -> float:
        """Replace each gradient by its mean over the whole batch.

        Args:
            parameters: Parameters, in the same order in every process.
            loss_sum: Sum of the losses of this process' rows.
            weight: This process' share of the batch's rows, from 0 to 1.

        Returns:
            The sum of the losses of the whole batch.
        """
        if self.size == 1:
            return loss_sum
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() * weight for parameter in parameters if parameter.grad is not None])
        flat = torch.cat([flat, flat.new_tensor([loss_sum])])
        distributed.all_reduce(flat)
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.grad = flat[start:end].view_as(parameter)
            start = end
        return float(flat[-1])

    def broadcast(self, flag: bool = False) -> bool:
        """The first process' `flag`, in every process."""
        if self.size == 1:
            return flag
        tensor = torch.tensor([flag], dtype=torch.uint8, device=self.device)
        distributed.broadcast(tensor, 0)
        return bool(tensor.item())

    def average_statistics(self, model: nn.Module) -> None:
        """Replace each running statistic by its mean over the processes, which saw different rows."""
        if self.size == 1:
            return
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and name.rsplit(".", 1)[-1] in STATISTICS:
                distributed.all_reduce(buffer)
                buffer /= self.size

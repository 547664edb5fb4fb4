"""Distributed context of a training run: ranks, batch slices, gradient synchronisation, small collectives.

accelerate initialises the process group of processes that `torchrun` or `accelerate launch` started, and wraps the step
in DDP. For FSDP2 torch's `fully_shard` is called directly, because accelerate's plugin silently falls back to DDP on
the CPU. Every rank takes slices of the global batch, and every random draw is a function of the position in the global
batch, so the number of processes changes results only by rounding.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyfusion.config.recipe import ComputeSection
from tinyfusion.core.compiler import check_compiler
from tinyfusion.core.device import choose_device
from tinyfusion.core.errors import UserError
from tinyfusion.core.fetching import WouldFetch
from tinyfusion.core.launch import check_meeting_place, launched_local_rank, launched_processes, launched_rank
from tinyfusion.training.shards import is_sharded, local_part

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
Slice = tuple[int, int]  # (first, number) of samples of the global batch


def cut(batch_size: int, num: int) -> list[Slice]:
    """Split a global batch into `num` slices, at even indices if possible: some gates compare samples in pairs."""
    unit = 2 if batch_size % 2 == 0 and batch_size // 2 >= num else 1
    edges = [unit * (batch_size // unit * i // num) for i in range(num + 1)]
    return [(start, end - start) for start, end in pairwise(edges)]


class Engine:
    """Distributed context of a training: this rank's device, batch slices and collectives. Default: one process."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        compute: ComputeSection | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.compute = compute or ComputeSection()
        self.accelerator = accelerator
        self.device = torch.device(device) if accelerator is None else accelerator.device
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.world = 1 if accelerator is None else accelerator.num_processes
        self._split: nn.Module | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and messages."""
        return self.rank == 0

    # ------------------------------------------------------------------------------------------------- models and data

    @property
    def splits(self) -> bool:
        """Whether models are sharded over the ranks (FSDP2)."""
        return self.world > 1 and self.compute.parallel == "fsdp2"

    def place(self, module: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """Move `module` to the device in place, and shard it with FSDP2 if used, which replaces its parameter objects.

        blocks: the submodules that FSDP2 gathers one at a time.
        """
        module.to(self.device)
        if self.splits:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            # gated blocks return a view of their stream, which is never written to
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
            mesh = init_device_mesh(self.device.type, (self.world,))
            for part in (*blocks, module):
                fully_shard(part, mesh=mesh)
        return module

    def place_teacher(self, module: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """Move a frozen module to the device; it is sharded only with `compute.shard_teacher`."""
        return self.place(module, blocks) if self.compute.shard_teacher else module.to(self.device)

    def slices(self, batch_size: int) -> list[Slice]:
        """The microbatches of this rank, one per step of gradient accumulation. Raises UserError if one would be empty."""
        each = self.compute.gradient_accumulation_steps
        num = self.world * each
        if batch_size < num:
            raise UserError(
                f"a batch of {batch_size} images cannot be split into {num} microbatches ({self.world} processes x {each} "
                "accumulation steps): use a larger batch or fewer of them"
            )
        return cut(batch_size, num)[self.rank * each : (self.rank + 1) * each]

    # ------------------------------------------------------------------------------------------------------- gradients

    def wrap(self, step: nn.Module) -> nn.Module:
        """Return `step`, wrapped so that its backward pass averages gradients over the ranks."""
        if self.accelerator is None or self.world == 1:
            return step
        if not self.splits:
            return self.accelerator.prepare_model(step, device_placement=False)
        self._split = step
        return step

    @contextlib.contextmanager
    def gradients(self, step: nn.Module, last: bool) -> Iterator[None]:
        """Context of a microbatch's backward pass: only the `last` one synchronises gradients over the ranks."""
        if self._split is not None:
            from torch.distributed.fsdp import FSDPModule

            for module in self._split.modules():
                if isinstance(module, FSDPModule):
                    module.set_requires_gradient_sync(last, recurse=False)
        if last or self.accelerator is None or self._split is not None:
            yield
            return
        with self.accelerator.no_sync(step):
            yield

    def finish_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Average over the ranks the gradients that FSDP2 does not: those of unsharded parameters, such as gates."""
        for parameter in parameters if self._split is not None else ():
            if parameter.grad is not None and not is_sharded(parameter):
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world

    def gradient_norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """Euclidean norm of the gradients of `parameters` (a scalar), over all ranks if they are sharded."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return torch.zeros((), device=self.device)
        low = any(g.dtype != gradients[0].dtype or g.element_size() < 4 for g in gradients)
        norms = torch.stack(
            torch._foreach_norm([local_part(g) for g in gradients], dtype=torch.float32 if low else None)
        )
        if self._split is None:
            return torch.linalg.vector_norm(norms)
        split = torch.tensor([is_sharded(g) for g in gradients], device=norms.device)
        squares = torch.where(split, norms.square(), 0).sum()
        dist.all_reduce(squares)
        return (squares + torch.where(split, 0, norms.square()).sum()).sqrt()

    # ----------------------------------------------------------------------------------------------------- collectives

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def agree(self, number: int) -> int:
        """The largest `number` of all ranks."""
        if self.world == 1:
            return number
        value = torch.tensor([number], device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def gathered(self, values: Sequence[int]) -> list[int]:
        """The `values` of all ranks in one sorted list."""
        lists: list[Any] = [list(values)] * self.world
        if self.world > 1:
            dist.all_gather_object(lists, list(values))
        return sorted(value for listed in lists for value in listed)

    def first(self, call: Callable[[], T]) -> T:
        """Run `call` on rank 0 only and return its result on all ranks; a UserError is raised on all of them."""
        if self.world == 1:
            return call()
        outcome: list[Any] = [None, None]
        failure: UserError | WouldFetch | None = None
        if self.is_main:
            try:
                outcome[0] = call()
            except (UserError, WouldFetch) as error:
                failure, outcome[1] = error, str(error)
        dist.broadcast_object_list(outcome, device=self.device)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise UserError(str(outcome[1]))
        return outcome[0]

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()


_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Connection refused", "timed out",
         "Broken pipe", "Application timeout", "failed to pass monitoredBarrier", "Socket Timeout")  # fmt: skip


def lost_process(error: BaseException) -> UserError | None:
    """A UserError that explains `error` if its cause is another process that has ended or hangs; else None."""
    if not dist.is_available() or not isinstance(error, RuntimeError):
        return None
    if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in _LOST):
        return None
    # gloo writes its source file before the reason, and advice after it
    reason = re.sub(r"^\[\S+\] | This is typically.*", "", str(error).strip().splitlines()[0]).rstrip(". ")
    if not dist.is_initialized():
        return UserError(
            f"process {launched_rank()} of {launched_processes()} waited for the others in vain ({reason}): their own output says "
            "why, else check that all were started and reach MASTER_ADDR; compute.timeout_s allows more"
        )
    return UserError(
        f"process {dist.get_rank()} of {dist.get_world_size()} has lost another one, which ended or hangs ({reason}): its own "
        "output says why, and the same command continues from the last checkpoint"
    )


def open_engine(device: str, compute: ComputeSection) -> Engine:
    """Create the engine of this process on `device`: "auto", "cpu", "cuda" or "mps".

    Joins the other processes if a launcher started several. Raises UserError if the device is not available.
    """
    if compute.gradient_accumulation_steps < 1:
        raise UserError(f"compute.gradient_accumulation_steps is at least 1; got {compute.gradient_accumulation_steps}")
    chosen = choose_device(device)
    if compute.compile:
        check_compiler(chosen)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = compute.tf32
    if launched_processes() == 1:
        return Engine(chosen, compute)
    check_meeting_place()
    if chosen.type == "cuda" and launched_local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"process {launched_local_rank()} of this machine has no GPU: there are {torch.cuda.device_count()}; start as many "
            "processes as there are GPUs, or give --device cpu"
        )
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    accelerator = Accelerator(
        cpu=chosen.type == "cpu",
        mixed_precision="no",  # the loop casts by itself: losses stay in float32
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=compute.timeout_s)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    return Engine(chosen, compute, accelerator)

"""Several processes that train together. This is the only file that knows torch.distributed.

    torchrun --nproc-per-node 2 train.py --method neural_recursion

Every process computes the same batch, a pure function of seed and step, and takes its share of the
rows. So the data and their order are those of one process. A loss is divided by the number of
targets of the whole batch, so the gradients of all processes add up to the gradient of one. They
are small, and travel in one buffer after the backward pass. (DistributedDataParallel divides by the
number of processes and wraps one forward; a composition calls several methods.) Then every process
takes the same step. Questions are divided too. Only the first process writes and prints.

Without torchrun there is one process, and nothing here communicates. Needs torch.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

# torchrun ends the others when a process dies, and a closed connection is noticed at once. So this
# limits only how long they wait for the first one, which may make an index of passages for hours.
TIMEOUT = timedelta(days=1)


def launched() -> int:
    """The number of processes that torchrun started, or 1."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def start(device: str) -> None:
    """Connect the processes that torchrun started. On CUDA each of them takes a device."""
    if dist.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    if not first():
        sys.stdout = open(os.devnull, "w")


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if count() > 1 else 0


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


@contextmanager
def connected():
    """A context of communication. ConnectionError, in one line, if another process has ended."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0].split("] ", 1)[-1]  # gloo: [file] reason
        raise ConnectionError(f"another process of this run has ended ({reason})") from None


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes, in place."""
    if count() > 1:
        with connected():
            dist.all_reduce(x)
    return x


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return bool(total(torch.tensor([int(flag)])).item())


def wait() -> None:
    """Wait until all processes are here."""
    any_of(False)


def share(items: Sequence) -> Sequence:
    """This process's items: every n-th. Neighbours have similar lengths, so the shares do too."""
    return items[rank() :: count()]


def divide(function: Callable[[Sequence], Iterable], items: Sequence) -> list:
    """function(items), one result for each item. Each process computes its share, and gets all."""
    if count() == 1:
        return list(function(items))
    part, parts = share(items), [None] * count()
    results = list(function(part)) if len(part) else []
    with connected():
        dist.all_gather_object(parts, results)
    return [parts[i % len(parts)][i // len(parts)] for i in range(len(items))]


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], loss: float) -> float:
    """Add up the gradients of all processes, and their losses. Returns the sum of the losses.

    A parameter that has a gradient in no process gets none.
    """
    if count() == 1:
        return loss
    parameters = [p for p in parameters if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    scalars = [*(float(p.grad is not None) for p in parameters), loss]
    buffer = torch.cat([*(g.flatten() for g in gradients), gradients[0].new_tensor(scalars)])
    *sums, present, loss = total(buffer).split([*map(torch.numel, parameters), len(parameters), 1])
    for p, gradient, some in zip(parameters, sums, present.tolist()):
        p.grad = gradient.view_as(p) if some else None
    return loss.item()


class AllRows(torch.autograd.Function):
    """Rows of all processes. The gradient of a row is the sum over all processes."""

    @staticmethod
    def forward(ctx, x: Tensor, own: list[int], rows: int) -> Tensor:
        """x: the rows `own` of (rows, ...), which this process has computed."""
        ctx.own, whole = own, x.new_zeros(rows, *x.shape[1:])
        whole[own] = x
        return total(whole)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return total(gradient.clone())[ctx.own], None, None


def shard(lm: nn.Module, device: str) -> int:
    """Keep 1/n of a frozen LM in each of n processes (FSDP2). Returns its bytes in this one.

    A block's weights are gathered when it runs, forward and backward, and freed after it. The
    embeddings and the output layer are gathered by the first call of a step and freed after its
    backward pass. All processes must make the same calls: each takes its share of a batch, but all
    of them answer the same questions.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing writes to its views
    mesh = init_device_mesh(device, (count(),))
    for block in lm.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(block, "keys_values")
    small = [module.to(device) for module in filter(None, (lm.norm, lm.embed_positions))]
    kept = {p for module in small for p in module.parameters()}  # whole in every process
    fully_shard(lm, mesh=mesh, ignored_params=kept)
    for name in ("embed", "read", "logits"):  # besides forward
        register_fsdp_forward_method(lm, name)
    local = [p.to_local() if hasattr(p, "to_local") else p for p in lm.parameters()]
    return sum(p.numel() * p.element_size() for p in local)


def whole(tensor: Tensor) -> Tensor:
    """The tensor that a shard is a part of, or the tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Whole(dict):
    """Tensors by name. Each is put together from its shards when it is looked up."""

    def __getitem__(self, name: str) -> Tensor:
        return whole(super().__getitem__(name))

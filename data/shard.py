"""One model over several GPUs: `torchrun --nproc_per_node=8 train.py ...`, and without that prefix.

Each of W processes holds 1/W of every parameter (of its first dimension: some rows of a matrix,
some experts of a stack), of the gradients and of AdamW's moments, and works on its own rows of the
batch. PyTorch's `fully_shard` (FSDP2) gathers a block's parameters right before they are used and
frees them after; in the backward pass it averages the gradients, and leaves each process its share
of them. What a caller must know:

  * Every process makes the same calls in the same order: a forward pass, an evaluation, a save is a
    meeting of all.
  * Losses are divided by numbers of the whole batch (labels, tokens), so that the processes' losses
    sum to the loss of one process; and multiplied by W for the backward pass, since an average is W
    times too small.
  * No process ever holds the whole of a loaded model: it is built without memory, cut, and each
    share filled from the files (data/hub.py). Saving gathers one parameter at a time; process 0
    writes.

Ctrl-C goes to torchrun, which passes it on: all finish the same step and save it, for --resume to
go on there. torchrun waits 30 seconds for that. When a process is killed the others say so in a
line, which torchrun's report, the last thing on the screen, quotes, unless it stopped them before.

Frozen bfloat16 weights and float32 adapters may stand in one block (they travel as bytes); what
trains has one dtype.

Imported as `from data import shard as processes`, so that its verbs say of what they speak.
"""

import os
import sys

import torch

from data import run

RANK = int(os.environ["RANK"]) if run.is_shared() else 0
WORLD = int(os.environ["WORLD_SIZE"]) if run.is_shared() else 1


def start(device):
    """Join the processes that torchrun started -> this one's device. Alone: `device` itself."""
    if WORLD == 1:
        return device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # small messages between the CPUs do not wait for the GPUs
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    torch.distributed.init_process_group(backend)
    return device


def meet():
    """Wait for all: what one has written is there for the others."""
    if WORLD > 1:
        torch.distributed.barrier()


def stop():
    """The end of a process that torchrun started.

    All leave together: one that tears its connections down while another still uses them brings
    that one down. And at once: threads of theirs outlive the group, and one that wakes up while
    Python is being taken down aborts a process whose work was done.
    """
    if WORLD > 1:
        meet()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def is_alone(error):
    """Did a meeting fail because another process is gone?"""
    return WORLD > 1 and ("gloo" in str(error) or isinstance(error, torch.distributed.DistError))


def total(t):
    """The sum over the processes; no gradient goes through it."""
    t = t.detach().clone()
    if WORLD > 1:
        torch.distributed.all_reduce(t)
    return t


def micro_batches(batch, rows):
    """A step's (input_ids, labels, mask), each (B, T), the same on every process -> one by one this
    process's parts of at most `rows` rows, as many parts on each.

    Where the last rows do not go round, some get a row that counts nowhere: who stays away from a
    meeting stops the others.
    """
    for first in range(0, len(batch[0]), rows * WORLD):
        part = [t[first : first + rows * WORLD] for t in batch]
        if RANK < len(part[0]):
            yield [t[RANK::WORLD] for t in part]
        else:
            ids, labels, mask = (t[:1] for t in part)
            yield [ids, torch.full_like(labels, -100), torch.zeros_like(mask)]


def whole(t):
    """A tensor that may be spread over the processes, as one. All must ask."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def held(t):
    """The rows of a tensor (of its first dimension) that are here, and the number of the first.
    The first processes hold ceil(n / W) each."""
    if not hasattr(t, "to_local"):
        return t, 0
    each = -(-len(t) // WORLD)
    return t.to_local(), RANK * each


def cut(model, device):
    """Cut `model` in place, block by block. Best on the meta device, with all that trains there."""
    if WORLD == 1:
        return
    # imported here: it takes a second, and one process does without
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.split(":")[0], (WORLD,))
    # the root last: it takes what is left, embeddings, norm and head
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)

"""Whether all ranks of a group were asked for the same thing, and can do it: nobody begins what another refuses."""

import hashlib

import torch
import torch.distributed as dist

from ...spec.errors import MoeplanError
from ..groups import Group, open_group


def check_group(group: Group) -> None:
    """Raises MoeplanError where there is no group that this process belongs to."""
    if not dist.is_available() or not dist.is_initialized():
        raise MoeplanError(
            "torch.distributed is not initialised: call torch.distributed.init_process_group first, and start one "
            "process for each device of the plan (torchrun --nproc-per-node N)"
        )
    if dist.get_rank(group) < 0:
        raise MoeplanError("this process is no member of the group: call apply_plan on its members only")


def agree(subject: str, problem: MoeplanError | None, device: torch.device, group: Group) -> None:
    """All ranks together. Raises ``problem``, or MoeplanError where another rank has one or was asked for another
    ``subject``."""
    digest = int.from_bytes(hashlib.sha256(subject.encode()).digest()[:7], "big")
    own = torch.tensor([problem is not None, digest], dtype=torch.int64, device=device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    if problem is not None:
        raise problem
    told = torch.stack(every).tolist()
    for rank, (refused, _) in enumerate(told):
        if refused:
            raise MoeplanError(f"rank {rank} refused the plan, and says why; nothing was changed here")
    for rank, (_, other) in enumerate(told):
        if other != told[0][1]:
            raise MoeplanError(f"ranks 0 and {rank} were given another plan or model: give all the same")


_opened: list[tuple[dist.ProcessGroup, Group]] = []  # the default group that was found last, and the one opened for it


def own_group() -> Group:
    """Of all ranks, for moeplan alone: on gloo one whose threads give way (``groups``), opened once; else the default
    group. Every rank must call it."""
    default = dist.group.WORLD
    if default is None or dist.get_backend() != "gloo":
        return None
    if not _opened or _opened[0][0] is not default:
        _opened[:] = [(default, open_group(range(dist.get_world_size())))]
    return _opened[0][1]

"""The command line on a host that seems to have one GPU, for the refusal of two ranks on it, which needs none.

    torchrun --nproc-per-node 2 benchmarks/gpu/one_gpu.py profile --device cuda

Only what torch says of the GPU stands in for one. A rank that gets as far as NCCL waits for its peer there, as it does.
"""

import time
from types import SimpleNamespace

import torch
import torch.distributed as dist

from moeplan.service.cli import main

GPU = SimpleNamespace(uuid="01234567-89ab-cdef-0123-456789abcdef")


def stand_in() -> None:
    """One GPU, as far as torch says."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda device: None
    setattr(torch.cuda, "get_device_properties", lambda device: GPU)  # noqa: B010 of another type
    dist.init_process_group = lambda *_, **__: time.sleep(60)


if __name__ == "__main__":
    stand_in()
    main()

"""Two ranks on one GPU are refused with our own message, before NCCL is asked; a stand-in answers for torch."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from moeplan.runtime.launch import rank as launch
from moeplan.runtime.launch.environment import Place, own_gpu
from moeplan.runtime.launch.secret_store import SecretStore, Server
from moeplan.spec import MoeplanError

STANDIN = Path(__file__).parents[1] / "benchmarks" / "gpu" / "one_gpu.py"


def stores():
    yield dist.HashStore()
    server = Server("127.0.0.1", 0, b"secret")
    yield SecretStore("127.0.0.1", server.port, b"secret")


@pytest.fixture
def gpus(monkeypatch):
    """GPU i of a host has the UUID ``names[i]``."""
    names = ["aa", "bb", "aa"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid=names[d.index]))


def test_a_gpu_each(gpus):
    for store in stores():
        for rank in (0, 1):
            launch.claim_gpu(rank, torch.device("cuda", rank), store)
        launch.claim_gpu(1, torch.device("cuda", 1), store)  # the same rank may ask again


def test_one_for_two(gpus):
    for store in stores():
        launch.claim_gpu(0, torch.device("cuda", 0), store)
        with pytest.raises(MoeplanError, match=r"^ranks 0 and 7 have one GPU, cuda:2 \(GPU-aa\), and NCCL needs one"):
            launch.claim_gpu(7, torch.device("cuda", 2), store)


@pytest.mark.parametrize(
    ("seen", "local", "want"), [(4, 0, 0), (4, 3, 3), (1, 0, 0), (1, 3, 0), (2, 3, None), (0, 0, None)]
)
def test_the_gpu_of_a_rank(monkeypatch, seen, local, want):
    """Its number on the host, or the only one that a scheduler shows it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    place = Place(rank=5, world=8, local=local, node=1)
    if want is None:
        with pytest.raises(MoeplanError, match=rf"^rank 5 needs GPU {local}, it sees {seen}$"):
            own_gpu(place)
    else:
        assert own_gpu(place) == torch.device("cuda", want)


def test_through_torchrun(tmp_path):
    """Both ranks see one GPU as their first, as with CUDA_VISIBLE_DEVICES or a scheduler that binds them wrongly."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(STANDIN)]
    arguments = ["profile", "--device", "cuda", "--model", "tiny-moe", "-o", str(tmp_path / "cluster.json")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=200, env=os.environ)
    assert done.returncode != 0
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "have one GPU" in line]
    assert len(lines) == 1
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "cluster.json").exists()

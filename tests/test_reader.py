"""Experts on their way from a disk: the order of reads, places, what is dropped, and a tier that fails."""

import threading

import pytest
import torch

from moeplan.runtime.reader import Reader
from moeplan.runtime.tiers import ExpertFile, HostMemory, places_for
from moeplan.spec.errors import MoeplanError
from moeplan.spec.offload import PAGE

CPU = torch.device("cpu")


class Gate:
    """A tier that reads when it is let, and remembers what it read."""

    def __init__(self) -> None:
        self.let, self.begun, self.read_entries = threading.Semaphore(0), threading.Semaphore(0), []
        self.fail = False

    def write(self, entry, place):
        raise AssertionError("nothing is written")

    def read(self, entry, place):
        self.read_entries.append(entry)
        self.begun.release()
        self.let.acquire()
        if self.fail:
            raise MoeplanError("disk: broken")
        place.fill_(entry)


def reader(places: int) -> tuple[Reader, Gate]:
    gate = Gate()
    return Reader(gate, torch.zeros(places, PAGE, dtype=torch.uint8)), gate


@pytest.mark.parametrize("tier", ["file", "host"])
def test_what_is_written_comes_back(tmp_path, tier):
    size = PAGE * 3
    places = places_for(2, size - 5, CPU)
    assert places.shape == (2, size)
    held = ExpertFile(tmp_path, 5, size) if tier == "file" else HostMemory(5, size, CPU)
    found = Reader(held, places)
    parts = [(torch.randn(7, 11), torch.randn(5)) for _ in range(5)]
    for entry, pair in enumerate(parts):
        found.put(entry, pair)
    assert list(tmp_path.iterdir()) == []  # the file has no name
    order = [3, 0, 4, 1, 2, 3]
    found.ask(order)
    for entry in order:
        values = found.take(entry).view(torch.float32)
        torch.testing.assert_close(values[:77].view(7, 11), parts[entry][0], rtol=0, atol=0)
        torch.testing.assert_close(values[77:82], parts[entry][1], rtol=0, atol=0)
        found.give_back(entry)
    assert found.vain == 0


def test_reads_wait_for_a_place():
    found, gate = reader(1)
    found.ask([5, 6])
    gate.begun.acquire()
    gate.let.release()
    assert found.take(5)[0] == 5
    assert not gate.begun.acquire(timeout=0.1)  # 6 has no place yet
    found.give_back(5)
    gate.let.release()
    assert found.take(6)[0] == 6
    assert gate.read_entries == [5, 6]


def test_what_is_dropped_is_not_read_and_gives_its_place_back():
    found, gate = reader(2)
    found.ask([1, 2, 3, 4])
    gate.begun.acquire()
    gate.let.release()
    gate.begun.acquire()  # 1 is there, 2 is being read
    found.take(1)
    found.drop([1, 2, 3])
    gate.let.release()
    gate.let.release()
    assert found.take(4)[0] == 4
    assert gate.read_entries == [1, 2, 4]
    assert found.vain == 2
    found.restart()
    assert found.vain == 3


def test_a_tier_that_fails_is_told_to_whoever_waits():
    found, gate = reader(1)
    gate.fail = True
    found.ask([1])
    gate.let.release()
    with pytest.raises(MoeplanError, match="disk: broken"):
        found.take(1)


@pytest.mark.parametrize(
    ("folder", "entries", "said"),
    [
        ("missing", 1, "No such file or directory; give a folder on a disk"),
        ("a-file", 1, "Not a directory; give a folder on a disk"),
        ("", 2**24, "no space for 65536.00 GiB of experts"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, folder, entries, said):
    (tmp_path / "a-file").touch()
    with pytest.raises(MoeplanError) as raised:
        ExpertFile(tmp_path / folder, entries, 4 << 20)
    assert said in str(raised.value)
    assert str(tmp_path / folder) in str(raised.value)

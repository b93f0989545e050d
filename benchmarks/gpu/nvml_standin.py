"""Stands in for pynvml in a dry run: the calls that the profiler makes, answered as a GPU of a plain host might.

Strings are bytes in some answers, as older drivers' are, and one question has no answer, as on virtual machines.
"""

UUID = "01234567-89ab-cdef-0123-456789abcdef"
NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
NVML_NVLINK_MAX_LINKS, NVML_FEATURE_ENABLED = 18, 1
NVML_TOPOLOGY_INTERNAL, NVML_TOPOLOGY_SINGLE, NVML_TOPOLOGY_MULTIPLE = 0, 10, 20
NVML_TOPOLOGY_HOSTBRIDGE, NVML_TOPOLOGY_NODE, NVML_TOPOLOGY_SYSTEM = 30, 40, 50
HANDLE, OTHER = "handle 0", "handle 1"
_ANSWERS: dict[str, object] = {
    "GetMaxClockInfo": 1980,
    "GetEnforcedPowerLimit": 700_000,
    "GetCurrPcieLinkGeneration": 5,
    "GetCurrPcieLinkWidth": 16,
    "GetIndex": 0,
}


class NVMLError(Exception):
    """As pynvml's."""


class _Memory:
    total = 143_771 << 20


class _Pci:
    busId = b"00000000:19:00.0"


def nvmlInit() -> None: ...


def nvmlShutdown() -> None: ...


def nvmlSystemGetDriverVersion() -> bytes:
    return b"580.159.04"


def nvmlDeviceGetCount() -> int:
    return 2


def nvmlDeviceGetHandleByIndex(index: int) -> str:
    return (HANDLE, OTHER)[index]


def nvmlDeviceGetHandleByUUID(uuid: bytes) -> str:
    if uuid != f"GPU-{UUID}".encode():
        raise NVMLError("not found")
    return HANDLE


def nvmlDeviceGetMemoryInfo(handle: str) -> type[_Memory]:
    return _Memory


def nvmlDeviceGetPciInfo(handle: str) -> type[_Pci]:
    return _Pci


def nvmlDeviceGetNumaNodeId(handle: str) -> int:
    raise NVMLError("not supported")


def nvmlDeviceGetNvLinkState(handle: str, link: int) -> int:
    if link > 1:
        raise NVMLError("invalid argument")
    return NVML_FEATURE_ENABLED


def nvmlDeviceGetTopologyCommonAncestor(first: str, second: str) -> int:
    return NVML_TOPOLOGY_SYSTEM


def __getattr__(name: str) -> object:
    """Questions whose answer does not depend on what is asked about."""
    answer = _ANSWERS.get(name.removeprefix("nvmlDevice"))
    if answer is None:
        raise AttributeError(name)
    return lambda *_: answer

"""What NVML said of a GPU when it was profiled (``Device.details``), as facts of the topology."""

PCIE_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}  # bytes per second, by generation
SAME_SWITCH = ("same board", "PIX", "PXB")  # what ``nvidia-smi topo`` calls it when no host bridge lies between


def switch_of(details: dict[str, str]) -> str | None:
    """Name of the PCIe switch, after the first GPU below it; None where it is not shared, or nothing is said of it."""
    pairs = [entry.split(": ") for entry in details.get("topology", "").split(", ") if entry.count(": ") == 1]
    levels = {int(name[3:]): level for name, level in pairs if name.startswith("gpu") and name[3:].isdecimal()}
    near = [number for number, level in levels.items() if level in SAME_SWITCH]
    own = next(n for n in range(len(levels) + 1) if n not in levels)  # it lists all others of its host
    return f"gpu{min(own, *near)}" if near else None


def pcie_rate(details: dict[str, str]) -> float | None:
    """Bytes per second of the PCIe link."""
    try:
        return PCIE_LANE[int(details["pcie_generation"])] * int(details["pcie_width"])
    except (KeyError, ValueError):
        return None


def has_nvlink(details: dict[str, str]) -> bool:
    """Whether any of its NVLink links is active."""
    return details.get("nvlinks", "0") not in ("", "0")

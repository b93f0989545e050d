"""What a benchmark ran on, for the head of its table."""

import os
import platform


def processor() -> str:
    """Model and number of cores, as Linux has them."""
    with open("/proc/cpuinfo") as f:
        found = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
    return f"{found[0] if found else platform.machine()}, {os.cpu_count()} cores"

"""A cluster in a few lines: which GPUs on how many hosts, and what joins them.

    devices:
      - {gpu: h100_sxm, hosts: 2, gpus: 8, nics: 8, nic_rate: 400Gb/s}
      - {gpu: l40s, hosts: 1, gpus: 8}
    between: 50GB/s

What a GPU does is in measured tables under its name; what is left out here is taken from the tables' data sheet.
"""

import json
import re
from pathlib import Path

from pydantic import Field, ValidationError

from .cluster.kinds import MAX_CLUSTER_DEVICES
from .document import Part, describe, read_text, show
from .errors import DocumentError, MoeplanError
from .texts import parse_yaml

MAX_PER_HOST = 256
_FORM = re.compile(r"([A-Za-z0-9_.-]{1,64}):([0-9]{1,6})x([0-9]{1,6})")

TEMPLATE = """\
# One entry for hosts that are alike. `moeplan systems` lists the names of GPUs.
devices:
  - gpu: h100_sxm        # name in the tables
    hosts: 2             # so many hosts
    gpus: 8              # GPUs of each host
    nics: 8              # network cards of each host; left out: one for each GPU
    nic_rate: 400Gb/s    # what one card carries each way; left out: as `between`, else by the data sheet
    switches: 1          # switches that divide the GPUs of a host; left out: 1
    hosts_per_rack: 2    # left out: racks make no difference
  - gpu: l40s
    hosts: 1
    gpus: 8
    memory: 46068MiB     # of each GPU; left out: by the data sheet
between: 50GB/s          # what one GPU sends to another host; left out: by the data sheet
between_racks: 25GB/s    # the same to another rack; left out: as `between`
"""


class Hosts(Part):
    """Hosts that are alike."""

    gpu: str = Field(min_length=1, max_length=64)
    hosts: int = Field(1, ge=1, le=MAX_CLUSTER_DEVICES)
    gpus: int = Field(ge=1, le=MAX_PER_HOST, description="of each host")
    memory: str | None = Field(None, description="of each GPU, such as 80GiB")
    nics: int | None = Field(None, ge=1, le=MAX_PER_HOST, description="network cards of each host")
    nic_rate: str | None = Field(None, description="of one card each way, such as 400Gb/s")
    switches: int = Field(1, ge=1, le=MAX_PER_HOST)
    hosts_per_rack: int | None = Field(None, ge=1, le=MAX_CLUSTER_DEVICES)


class Described(Part):
    """Hosts, and what joins them."""

    devices: tuple[Hosts, ...] = Field(min_length=1, max_length=64)
    between: str | None = Field(None, description="what one GPU sends to another host, such as 50GB/s")
    between_racks: str | None = Field(None, description="the same to another rack")

    @property
    def count(self) -> int:
        """GPUs in all."""
        return sum(group.hosts * group.gpus for group in self.devices)


def read_described(path: str | Path) -> Described:
    """From a YAML file. Raises DocumentError naming file, field and rule."""
    where = str(path)
    body = parse_yaml(read_text(path, "; write one with `moeplan cluster --template FILE`"), where)
    try:
        text = json.dumps(body)
        return Described.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise DocumentError(f"{where}: {describe(error)}") from None
    except (TypeError, ValueError):
        raise DocumentError(f"{where}: a value is no text, number or list; see `moeplan cluster --template`") from None


def parse_device(text: str) -> Hosts:
    """``KIND:HOSTSxGPUS``, such as ``h100_sxm:2x8``. Raises MoeplanError."""
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise MoeplanError(f"--device {show(text)}: expected KIND:HOSTSxGPUS, such as h100_sxm:2x8")
    hosts, gpus = int(match[2]), int(match[3])
    if not (1 <= hosts <= MAX_CLUSTER_DEVICES and 1 <= gpus <= MAX_PER_HOST):
        raise MoeplanError(
            f"--device {show(text)}: expected 1 to {MAX_CLUSTER_DEVICES:,} hosts of 1 to {MAX_PER_HOST} GPUs"
        )
    return Hosts(gpu=match[1], hosts=hosts, gpus=gpus)

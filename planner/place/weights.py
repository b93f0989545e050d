"""What tokens pay to travel, from the measured links: the weights of placements that predicted time decides."""

import numpy as np

from ..costs import Costs

PROBE_BYTES = 1 << 20  # message at which links are compared


def exchange_weights(costs: Costs, row_bytes: float) -> tuple[float, float]:
    """Seconds of a whole layer's exchange per mean row of a token: inside a host, and between hosts.

    row_bytes: out and back, of all tokens of the step.
    """
    hosts = np.array(costs.hosts)
    per_byte: dict[bool, list[float]] = {False: [], True: []}
    for link in costs.cluster.links:
        seconds = link.curve.at(bytes=PROBE_BYTES).seconds / PROBE_BYTES
        per_byte[bool(hosts[link.source] != hosts[link.target])].append(seconds)
    inside = row_bytes * float(np.mean(per_byte[False] or per_byte[True] or [0.0])) / len(hosts)
    # Devices of a host share its uplink.
    between = row_bytes * float(np.mean(per_byte[True] or [0.0])) / len(set(hosts.tolist()))
    return inside, max(inside, between)

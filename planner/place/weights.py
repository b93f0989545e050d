"""What tokens pay to travel, from the measured links: the weights of placements that predicted time decides."""

from ..costs import Costs

PROBE_BYTES = 1 << 20  # message at which links are compared


def exchange_weights(costs: Costs, row_bytes: float) -> tuple[float, float]:
    """Seconds of a whole layer's exchange per mean row of a token: inside a host, and between hosts.

    row_bytes: out and back, of all tokens of the step.
    """
    within, across = (seconds and seconds / PROBE_BYTES for seconds in costs.link_seconds(PROBE_BYTES))
    inside = row_bytes * (within or across or 0.0) / costs.devices
    # Devices of a host share its uplink.
    between = row_bytes * (across or 0.0) / len(set(costs.hosts))
    return inside, max(inside, between)

"""What the choice of attention schedules needs to know, from what planners know of the ranks."""

from __future__ import annotations

from hdp.attention.auto import Chooser
from hdp.attention.choose import Links
from hdp.balance.topology import Topology
from hdp.parallel.costs import HOST_SECONDS


def make_chooser(
    topology: Topology,
    *,
    flops: float,
    kind: str = "nic",
    byte_seconds: float = 0.0,
    message_seconds: float = HOST_SECONDS,
    call_seconds: float = HOST_SECONDS,
) -> Chooser:
    """Resolves the schedule ``"auto"`` on these ranks; set it as ``world.runtime.chooser``.

    Args:
        topology: nodes and links, equal on all ranks.
        flops: operations a second that attention attains on one rank.
        kind: ``"nic"``: a rank's traffic shares one port; ``"peer"``: each pair of ranks has a link of its own.
        byte_seconds: what a byte sent or received takes from computation.
        message_seconds, call_seconds: what a message and a kernel call take beyond that, see ``hdp.parallel.costs``.
    """
    links = Links(
        kind=kind,
        inner_rate=topology.intra.bandwidth,
        outer_rate=topology.inter.bandwidth,
        latency=topology.intra.latency if topology.nodes == 1 else topology.inter.latency,
    )
    per_node = topology.ranks_per_node if topology.nodes > 1 else None
    return Chooser(
        links=links,
        flops=flops,
        ranks_per_node=per_node,
        byte_seconds=byte_seconds,
        message_seconds=message_seconds,
        call_seconds=call_seconds,
    )

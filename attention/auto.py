"""Resolves the schedule ``"auto"`` of a sequence, for one layer geometry, by cost (``hdp.attention.choose``).

Every sharer asks with the same numbers and gets the same answer: nothing is measured or communicated here.
"""

from __future__ import annotations

from dataclasses import dataclass

from hdp.attention.choose import SIGNIFICANT_BITS, choose
from hdp.attention.counts import Sizes
from hdp.attention.lowered import Geometry
from hdp.attention.mask import Mask
from hdp.attention.predict import Case, Links, Rates, rounded
from hdp.attention.schedules import SCHEDULES, get_pair, get_schedule

AUTO = "auto"
SHARED = tuple(name for name in SCHEDULES if name != "local")


def parse_schedule(name: str) -> tuple[str, str]:
    """Forward and backward of ``"ring"``, ``"ring/ring_q"`` or ``"auto"``. Raises ValueError with all names for another one."""
    if not isinstance(name, str):
        raise ValueError(
            f"schedule is {name!r}: give a name, two joined by '/', 'auto', or None for what the plan says"
        )
    forward, slash, backward = name.partition("/")
    names = forward, backward if slash else forward
    for part in names:
        if part != AUTO and part.partition(":")[0] not in SHARED:
            raise ValueError(
                f"unknown attention schedule {part!r} in schedule={name!r}: choose one of {', '.join((AUTO, *SHARED))}"
                " (some take a number: 'ulysses:2', 'hybrid:4'), or one forward and one backward, 'ring/ring_q'"
            )
        if part != AUTO:
            get_schedule(part)
    if AUTO not in names:
        get_pair(*names)
    return names


@dataclass(frozen=True, kw_only=True)
class Chooser:
    """What the choice needs to know of the machine; equal on all ranks."""

    links: Links
    flops: float
    """Floating-point operations a second that attention attains on one rank."""
    backward_factor: float = 2.5
    """Operations of backward over those of forward."""
    ranks_per_node: int | None = None
    """Ranks that reach each other over the inner links; None: all."""
    step_seconds: float = 3e-5
    """Cost of a program step on the host."""
    byte_seconds: float = 0.0
    """What a byte sent or received takes from computation."""
    message_seconds: float = 1e-5
    """Cost of a tensor sent or received on the host."""
    call_seconds: float = 1e-5
    """Cost of a kernel call beyond its work."""
    sum_seconds: float = 0.0
    """Cost of a byte of partial results that is merged or added up."""
    tiles: tuple[tuple[int, float, float], ...] = ()
    """As of ``hdp.attention.predict.Rates``; the longest says what pairs of other calls take. Empty: by ``flops``."""
    kept_limit: float | None = None
    """Bytes a layer may keep of a sequence from forward to backward; None: any."""
    kept_per_token: float | None = None
    """The same by the tokens that a rank has of it, of schedules both of which are to be chosen; None: any."""

    def __post_init__(self) -> None:
        if not self.flops > 0:
            raise ValueError(f"flops is {self.flops}: give the operations a second that attention attains")

    def names(
        self,
        length: int,
        group: tuple[int, ...],
        layout: str,
        geometry: Geometry,
        mask: Mask,
        wanted: tuple[str, str] = (AUTO, AUTO),
    ) -> tuple[str, str]:
        """Forward and backward schedule of a sequence of ``length`` tokens on the ranks ``group``; of ``wanted`` what is no
        ``"auto"`` stays, and the other is the cheapest that goes with it."""
        fixed = [None if name == AUTO else name for name in wanted]
        nodes = None
        if self.ranks_per_node is not None:
            nodes = tuple(rank // self.ranks_per_node for rank in group)
            nodes = None if len(set(nodes)) == 1 else nodes
        forward = self.flops / (4 * geometry.head_dim)
        backward = forward / self.backward_factor
        if self.tiles:
            tokens, *seconds = self.tiles[-1]
            forward, backward = (tokens * (tokens + 1) / 2 / each for each in seconds)
        case = Case(
            length=length,
            size=len(group),
            heads=geometry.heads,
            sizes=Sizes(
                head_dim=geometry.head_dim,
                model_bytes=geometry.model_bytes,
                sum_bytes=geometry.sum_bytes,
                input_bytes=geometry.wire_bytes,
            ),
            links=self.links,
            rates=Rates(
                forward=forward,
                backward=backward,
                sum_seconds=self.sum_seconds,
                tiles=self.tiles,
                step_seconds=self.step_seconds,
                byte_seconds=self.byte_seconds,
                message_seconds=self.message_seconds,
                call_seconds=self.call_seconds,
            ),
            mask=mask,
            layout=layout,
            nodes=nodes,
            kept_limit=self.kept_limit if any(fixed) else self._kept_limit(length, len(group)),
            widens=geometry.widens,
            forward=fixed[0],
            backward=fixed[1],
        )
        return choose(case).names

    def _kept_limit(self, length: int, size: int) -> float | None:
        """By the length that the choice rounds to, so that as many lengths as before share an answer."""
        if self.kept_per_token is None:
            return self.kept_limit
        found = self.kept_per_token * rounded(length, SIGNIFICANT_BITS) / size
        return found if self.kept_limit is None else min(found, self.kept_limit)


def resolve(
    names: tuple[str, str],
    chooser: Chooser | None,
    *,
    length: int,
    group: tuple[int, ...],
    layout: str,
    geometry: Geometry,
    mask: Mask,
) -> tuple[str, str]:
    """Forward and backward schedule of a shared sequence, with ``"auto"`` chosen. Raises ValueError without a chooser."""
    if AUTO not in names:
        return names
    if chooser is None:
        raise ValueError(
            "schedule 'auto' needs to know links and rates, and no chooser does; give a hdp.attention.auto.Chooser, or name a"
            " schedule"
        )
    return chooser.names(length, group, layout, geometry, mask, names)

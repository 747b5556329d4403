"""The ring in closed form, of members or of nodes. See [Note: weights] in ``hdp.attention.costs``."""

from __future__ import annotations

from dataclasses import dataclass

from hdp.attention.costs_shape import Cost, Shape, inside, peak
from hdp.attention.program import Kind


@dataclass(frozen=True, kw_only=True)
class RingForm:
    """A ring of ``places`` as the one at ``place`` sees it; blocks in bytes."""

    places: int
    place: int
    causal: bool
    block: float
    """K and V of a block."""
    sums: float
    """DK and DV of a block."""

    def block_weight(self, hop: int) -> float:
        """Which part travels of the block ``hop`` behind: the back half of the first place's never does."""
        return 0.5 if self.causal and (self.place - hop) % self.places == 0 else 1.0

    def seen_weight(self, hop: int) -> float:
        """Which part of the block ``hop`` behind this place looks at."""
        return 0.5 if self.causal and hop <= self.place else 1.0

    @property
    def forward_bytes(self) -> float:
        return self.block * (self.places - 1 - 0.5 * (self.causal and self.place != self.places - 1))

    @property
    def backward_bytes(self) -> float:
        if self.places == 1:
            return 0
        inputs: float = self.places - 2
        if self.causal:  # front halves, and the back halves that this place looks at
            inputs = inputs / 2 + (self.places - 1 - self.place) / 2 * (self.place > 0)
        return self.block * inputs + self.sums * (self.places - 1 - 0.5 * (self.causal and self.place >= 1))

    @property
    def kept_bytes(self) -> float:
        return self.block * self.block_weight(self.places - 1) if self.places > 1 else 0

    def forward_live(self, hop: int, keeps: bool) -> float:
        """Bytes held at ``hop``; the last block goes where it is kept."""
        last = self.places - 2 if keeps else self.places - 1
        return self.block * (inside(self.block_weight, hop, 1, last) + inside(self.block_weight, hop + 1, 1, last))

    def backward_live(self, hop: int) -> float:
        """Block at hand and next; sums made, arriving, leaving."""
        last = self.places - 1
        inputs = inside(self.seen_weight, hop, 1, last) + inside(self.seen_weight, hop - 1, 1, last)
        made = inside(self.seen_weight, hop, 1, last)
        arriving = inside(self.block_weight, hop, 0, last - 1)
        leaving = inside(self.block_weight, hop + 1, 1, last)
        return self.block * inputs + self.sums * (made + arriving + leaving)


def ring_cost(shape: Shape, backward: bool, keeps: bool = True) -> Cost:
    form = RingForm(
        places=shape.size,
        place=shape.member,
        causal=shape.causal,
        block=shape.bytes(Kind.KV),
        sums=shape.bytes(Kind.DKV),
    )
    hops = range(shape.size)
    live = [form.backward_live(h) if backward else form.forward_live(h, keeps) for h in hops]
    return Cost(
        sent_bytes=form.backward_bytes if backward else form.forward_bytes,
        area=shape.area,
        steps=shape.size,
        peak_bytes=peak(live),
        kept_bytes=form.kept_bytes if keeps else 0,
    )

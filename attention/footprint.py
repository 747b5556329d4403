"""Bytes that one document's programs take of the arena, found by lowering them: for limits on memory that hold.

What a schedule needs is counted (``hdp.attention.counts``) and known in closed form (``hdp.attention.costs``). The arena also
holds what comes with running it: chunks gathered for a kernel, messages packed for sending and kept until they are gone, sums
in fp32 beside a bf16 model's tensors. That depends on where things lie, so there is no formula for it.
"""

from __future__ import annotations

from collections.abc import Iterable

from hdp.attention.bundle import Bundle, structure_of
from hdp.attention.counts import Sizes
from hdp.attention.lower import Task, lower
from hdp.attention.lowered import Geometry
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount


def arena_bytes(
    names: tuple[str, str],
    *,
    backward: bool,
    layout: str,
    length: int,
    size: int,
    members: Iterable[int],
    heads: HeadCount,
    sizes: Sizes,
    mask: Mask,
    widens: bool = False,
) -> int:
    """The most that any of ``members`` needs in one direction.

    Args:
        names: forward and backward schedule. layout: of ``hdp.attention.layout``.
        length: tokens of the whole document. size: ranks that share it.
        widens: as :attr:`hdp.attention.lowered.Geometry.widens`.
    """
    geometry = Geometry(
        heads=heads,
        head_dim=sizes.head_dim,
        model_bytes=sizes.model_bytes,
        sum_bytes=sizes.sum_bytes,
        wire_bytes=sizes.input_bytes,
        widens=widens,
    )
    structure, group = structure_of(layout, length, size, mask), tuple(range(size))
    return max(
        lower(
            [Task(Bundle(structure, names[backward], group, member, [0], [length], [0]), names)], geometry, backward
        ).arena_bytes
        for member in members
    )

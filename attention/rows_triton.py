"""What Triton does to rows of attention: the merge of partials, and an out with a given delta.

The formulas are those of ``hdp.attention.merge`` and ``hdp.attention.delta``; kernels are in ``hdp.attention.moves_triton``.
Triton is part of torch's CUDA wheels; nothing is compiled on the user's machine but by Triton itself.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merged(mine, old, theirs, new):
    """(out, lse) of two partials: mine, theirs [pairs, width] with lse old, new [pairs]."""
    empty = new == float("-inf")
    untouched = old == float("-inf")
    # Where one side is empty the difference is infinite or undefined: 0 stands in, and `where` picks the other side.
    difference = tl.where(empty | untouched, 0.0, new - old)
    small = tl.exp(-tl.abs(difference))
    total = 1.0 + small
    more = tl.div_rn(tl.full(small.shape, 1.0, tl.float32), total)
    less = tl.div_rn(small, total)
    old_weight = tl.where(difference > 0, less, more)
    new_weight = tl.where(difference > 0, more, less)
    # log1p(small), which Triton has only in libdevice: log(total) misses what the sum rounds off, the quotient puts it back.
    added = total - 1.0
    rest = tl.where(added == 0.0, small, tl.log(total) * tl.div_rn(small, tl.where(added == 0.0, 1.0, added)))
    both = tl.maximum(old, new) + rest
    lse = tl.where(untouched, new, tl.where(empty, old, both))
    out = old_weight[:, None] * mine + new_weight[:, None] * theirs
    # A row that had nothing takes the partial as it is, whatever its memory holds; an empty partial changes nothing.
    out = tl.where(untouched[:, None], theirs, tl.where(empty[:, None], mine, out))
    keep = empty & untouched
    return tl.where(keep[:, None], mine, out), lse


@triton.jit
def stand_in(grad, total, cells, column, limit, DTYPE: tl.constexpr, WIDTH: tl.constexpr):
    """An out [pairs, WIDTH] of DTYPE, as fp32, with sum(grad * out) = total [pairs]; limit: the largest number of DTYPE."""
    # Magnitudes are in the order of their bits, and NaN above all of them: no comparison can lose it.
    size = tl.where(cells, grad.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
    most = tl.max(size, axis=1)
    first = tl.min(tl.where(size == most[:, None], column, WIDTH), axis=1)
    is_first = column == first[:, None]
    at_first = tl.sum(tl.where(is_first, grad, 0.0), axis=1)
    largest = tl.abs(at_first)
    alone = tl.where(total == 0.0, 0.0, tl.div_rn(total, at_first))
    weight = tl.sum(tl.div_rn(tl.abs(grad), tl.broadcast_to(largest[:, None], grad.shape)), axis=1)
    share = tl.div_rn(tl.div_rn(total, weight), largest)  # in this order: nothing leaves the range
    share = tl.where(share > limit, limit, tl.where(share < -limit, -limit, share))
    too_large = (tl.abs(alone) > limit) & (tl.abs(total) < float("inf")) & (largest > 0.0)
    spread = tl.where(grad < 0.0, -share[:, None], share[:, None])
    value = tl.where(too_large[:, None], spread, tl.where(is_first, alone[:, None], 0.0))
    if tl.float32 != DTYPE:
        value = value.to(DTYPE).to(tl.float32)
        rest = total - tl.sum(grad * value, axis=1)
        others = tl.where(is_first, -1, size)
        second = tl.min(tl.where(others == tl.max(others, axis=1)[:, None], column, WIDTH), axis=1)
        is_target = column == tl.where(too_large, first, second)[:, None]
        more = tl.div_rn(rest, tl.sum(tl.where(is_target, grad, 0.0), axis=1))
        mended = value + more[:, None]
        finite = tl.abs(mended) < float("inf")  # false for NaN
        mended = tl.where(mended > limit, limit, tl.where(mended < -limit, -limit, mended))
        value = tl.where(is_target & finite, mended, value)
    return value

"""Errors of a running job. Each names the rank, and where it applies the peer, the sequence and the step."""

from __future__ import annotations


class HdpError(RuntimeError):
    """Base of errors raised while ranks work together."""


class PeerError(HdpError):
    """A transfer or collective failed or timed out; names this rank, and the ranks whose fault it was if that is known."""

    explained = False
    """Whether the guard has looked for the cause."""
    peer: int | None = None
    """The other end of the transfer, if it was one."""


class PlanMismatch(HdpError):
    """Ranks made different plans for one batch, or see different data."""


class CallMismatch(HdpError):
    """Ranks ran the attention calls of what they share in different orders; the step's gradients are discarded."""

"""Errors of a running job. Each names the rank, and where it applies the peer, the sequence and the step."""

from __future__ import annotations


class HdpError(RuntimeError):
    """Base of errors raised while ranks work together."""


class PeerError(HdpError):
    """A transfer failed or timed out; names rank, peer, sequence, and what was moved."""


class PlanMismatch(HdpError):
    """Ranks made different plans for one batch, or see different data."""

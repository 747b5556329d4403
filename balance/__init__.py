"""Planning: the lengths of a global batch in, a plan out.

Pure Python and C++: no torch, no clock, no global state, no randomness without a seed. The same input gives the same
plan on every rank and every machine.
"""

from hdp.balance.plan import MicroBatch, Plan, PlanError, Shard

__all__ = ["MicroBatch", "Plan", "PlanError", "Shard"]

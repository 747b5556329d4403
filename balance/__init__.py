"""Planning: the lengths of a global batch in, a plan out.

Pure Python and C++: no torch, no clock, no global state, no randomness without a seed. The same input gives the same
plan on every rank and every machine.
"""

from hdp.balance.clock import evaluate
from hdp.balance.cost import CostModel
from hdp.balance.evaluate import Evaluation
from hdp.balance.machine import Machine
from hdp.balance.models import MODELS, ModelShape
from hdp.balance.plan import DoesNotFit, MicroBatch, Plan, PlanError, Shard
from hdp.balance.planners import PLANNERS, make_plan, plan
from hdp.balance.topology import Link, Topology

__all__ = [
    "MODELS",
    "PLANNERS",
    "CostModel",
    "DoesNotFit",
    "Evaluation",
    "Link",
    "Machine",
    "MicroBatch",
    "ModelShape",
    "Plan",
    "PlanError",
    "Shard",
    "Topology",
    "evaluate",
    "make_plan",
    "plan",
]

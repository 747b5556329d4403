"""Simulates training steps: what a plan would take on a cluster that is not at hand, from 1 to 16,384 ranks.

    simulation = simulate(plan, cost, Cluster(topology=topology))

A discrete-event simulation of one step: micro-batches in order, the rounds of the attention programs of shared sequences with
their own tiles and bytes, links inside nodes and NICs between them, parameter gather and gradient reduction, copies of
offloaded activations, pipeline stages. Pure and deterministic, as all of ``hdp.balance``: whole ticks, no clock.

``hdp.balance.evaluate`` answers in microseconds what a planner needs to know; the simulation adds what it leaves out: rounds of
unequal size, ranks that reach a shared micro-batch late, ports that several messages want at once, whole sequences that fill
the waits of shared ones, collectives, copies, stages.
"""

from hdp.balance.simulator.cluster import SHARDINGS, Cluster
from hdp.balance.simulator.simulation import Simulation, simulate

__all__ = ["SHARDINGS", "Cluster", "Simulation", "simulate"]

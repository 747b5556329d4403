"""What ``hdp profile`` measured: a cost model and links, as a JSON file.

profile = Profile.read("profile.json")
plan(lengths, profile.topology(world_size=64), profile.cost, ...)
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdp.balance.cost import CostModel
from hdp.balance.host import NO_HOST_COSTS, HostCosts
from hdp.balance.models import ModelShape
from hdp.balance.plan import PlanError
from hdp.balance.topology import Link, Topology

FORMAT = 2
GRADIENT_BYTES = 4
"""Of an element: ``hdp.shard`` reduces gradients in fp32."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measured micro-batch: some documents of one length on one rank."""

    length: int
    """Tokens of each document."""
    documents: int
    forward: float
    """Seconds."""
    backward: float
    """Seconds."""
    fitted: float = 0.0
    """Seconds of forward and backward together that the fitted cost model says."""

    @property
    def seconds(self) -> float:
        return self.forward + self.backward

    @property
    def error(self) -> float:
        """Of the fit, relative."""
        return self.fitted / self.seconds - 1.0


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A measured machine."""

    model: str
    device: str
    """What was measured on, in words."""
    world_size: int
    """Ranks that measured together."""
    ranks_per_node: int
    cost: CostModel
    samples: tuple[Sample, ...]
    intra: Link | None
    """Between ranks of one node, all sending at once; None: not measured."""
    inter: Link | None
    """The same between nodes."""
    parameters: int
    """Of the model."""
    overlap: float = 1.0
    """Part of the shorter of compute and messages that hides behind the longer when both run at once, 0 to 1."""
    gather_bandwidth: float = 0.0
    """Bytes per second of an all-gather over all ranks, counted by its result; 0: not measured."""
    reduce_bandwidth: float = 0.0
    """Bytes per second of a reduce-scatter over all ranks, counted by its input; 0: not measured."""
    host: HostCosts = NO_HOST_COSTS
    """What rounds, messages and tiles of attention cost the host, and gathering and reducing, FSDP2's own work included;
    zeros: not measured."""
    element_bytes: int = 4
    """Of an element of the parameters, as they are gathered."""
    root_share: float = 0.0
    """Part of the parameters that belongs to no layer (embeddings, head); 0: not known."""
    shape: ModelShape | None = None
    """Of the model; None: not known."""

    def __post_init__(self) -> None:
        for name in ("world_size", "ranks_per_node", "parameters", "element_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise PlanError(f"profile: {name} is {value!r}, must be a whole number of at least 1")
        for name in ("overlap", "gather_bandwidth", "reduce_bandwidth", "root_share"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise PlanError(f"profile: {name} is {value!r}, must be a number of at least 0")

    @property
    def parameter_bytes(self) -> float:
        """Of all parameters, as they are gathered."""
        return float(self.element_bytes) * self.parameters

    @property
    def gradient_bytes(self) -> float:
        """Of all gradients, as they are reduced."""
        return float(GRADIENT_BYTES) * self.parameters

    @property
    def sharding_seconds(self) -> float:
        """What gathering all parameters and reducing all gradients once takes the host."""
        return self.host.gather_byte * self.parameter_bytes + self.host.reduce_byte * self.gradient_bytes

    def topology(self, *, world_size: int | None = None, ranks_per_node: int | None = None) -> Topology:
        """With the measured links. Where only one kind was measured, it stands for both."""
        links = [link for link in (self.intra, self.inter) if link is not None]
        if not links:
            raise PlanError(
                "the profile has no links: measure with two ranks or more (torchrun), or give bandwidths (--intra-bandwidth,"
                " --inter-bandwidth)"
            )
        return Topology(
            world_size=world_size or self.world_size,
            ranks_per_node=ranks_per_node or self.ranks_per_node,
            intra=self.intra or links[0],
            inter=self.inter or links[0],
        )

    def with_layers(self, layers: int) -> Profile:
        """Of the same model with more layers than were measured."""
        times = layers / self.cost.layers
        windows = round(self.cost.window_layers * times)
        root = self.parameters * self.root_share
        parameters = round(root + (self.parameters - root) * times)
        return replace(
            self,
            cost=replace(self.cost, layers=layers, window_layers=windows),
            parameters=parameters,
            root_share=root / parameters,
            shape=replace(self.shape, layers=layers, window_layers=windows) if self.shape else None,
        )

    def write(self, path: str | Path) -> None:
        fields = {"format": FORMAT, **asdict(self)}
        Path(path).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """Raises PlanError for a file that is none, or one of another version."""
        try:
            fields: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(fields, dict) or "format" not in fields:
                raise PlanError(f"{str(path)!r} is no profile: give a file that hdp profile --out wrote")
            if fields.pop("format") != FORMAT:
                raise PlanError(
                    f"{str(path)!r} is a profile of another version, which measured other things: run hdp profile again"
                )
            links = {name: Link(**fields[name]) if fields[name] else None for name in ("intra", "inter")}
            samples = tuple(Sample(**sample) for sample in fields["samples"])
            parts = {"cost": CostModel(**fields["cost"]), "host": HostCosts(**fields["host"]), "samples": samples}
            shape = ModelShape(**fields["shape"]) if fields["shape"] else None
            return cls(**{**fields, **links, **parts, "shape": shape})
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(
                f"{str(path)!r} is no profile of hdp profile ({error}): write one with hdp profile --out"
            ) from error


def fit(
    samples: Sequence[Sample], layers: int, head: float, piece: float = 0.0
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """(a, b, c) of one layer's forward and backward: seconds per squared token, per token, per micro-batch.

    Least squares of relative errors, no term negative. ``head``: seconds per token outside the layers, forward and
    backward together; one third of it counts as forward. ``piece``: seconds of each document in each layer and pass that
    are counted elsewhere.
    """
    tokens = np.array([s.length * s.documents for s in samples], dtype=np.float64)
    documents = np.array([s.documents for s in samples], dtype=np.float64)
    squares = np.array([float(s.length) ** 2 * s.documents for s in samples])
    matrix = np.stack([squares, tokens, np.ones(len(samples))], axis=1)
    passes = []
    for part, seconds in ((1 / 3, [s.forward for s in samples]), (2 / 3, [s.backward for s in samples])):
        layer = (np.array(seconds) - tokens * head * part) / layers - piece * documents
        passes.append(_fit(matrix, np.maximum(layer, 0.02 * np.array(seconds) / layers)))
    return passes[0], passes[1]


def _fit(matrix: NDArray[np.float64], seconds: NDArray[np.float64]) -> tuple[float, float, float]:
    scaled, ones = matrix / seconds[:, None], np.ones(len(seconds))
    best, least = (0.0, 0.0, 0.0), np.inf
    for chosen in ((0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,)):  # the best subset whose terms are not negative
        found = np.linalg.lstsq(scaled[:, chosen], ones, rcond=None)[0]
        error = float(((scaled[:, chosen] @ found - ones) ** 2).sum())
        if found.min() >= 0 and error < least:
            terms = dict(zip(chosen, found.tolist(), strict=True))
            best, least = (terms.get(0, 0.0), terms.get(1, 0.0), terms.get(2, 0.0)), error
    return best


def predicted(cost: CostModel, length: int, documents: int, piece: float = 0.0) -> float:
    """Seconds of ``documents`` whole documents in one micro-batch on one rank, forward and backward."""
    attention = float(cost.attention_seconds([length])[0]) * (1.0 + cost.backward_quadratic)
    linear = length * (cost.layers * cost.linear + cost.head) * (1.0 + cost.backward_linear)
    return documents * (attention + linear + 2 * cost.layers * piece) + cost.layers * cost.constant

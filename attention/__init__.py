"""Distributed attention as a program.

The pure half (layouts, masks, schedules, programs, checker, lowering) needs neither torch nor processes; the executor
and its backends load only when a name of theirs is used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hdp.attention.op import attend as attend
    from hdp.attention.route import AttentionRuntime as AttentionRuntime
    from hdp.attention.route import Route as Route
    from hdp.attention.route import RouteShard as RouteShard

_LAZY = {
    "attend": "hdp.attention.op",
    "AttentionRuntime": "hdp.attention.route",
    "Route": "hdp.attention.route",
    "RouteShard": "hdp.attention.route",
}

__all__ = ["AttentionRuntime", "Route", "RouteShard", "attend"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

"""csrc/partials.cpp: see hdp.attention.merge."""

from typing import Any

def merge(*arguments: Any) -> None: ...

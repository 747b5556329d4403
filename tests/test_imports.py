"""Imports point one way: hdp -> parallel -> offload -> balance -> attention -> csrc. The pure parts need no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "attention": {"attention"},
    "balance": {"balance", "attention"},
    "offload": {"offload", "balance", "attention"},
    "parallel": {"parallel", "offload", "balance", "attention"},
}
NEEDS_TORCH = {"executor", "op", "route", "merge", "delta", "memory", "huggingface", "channel", "backends", "bound"}


def imports_of(file: Path) -> set[str]:
    """Modules of hdp that a file imports, at the top, inside functions, and for type checking alike."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.partition(".")[0] == "hdp"}


FILES = [(part, file) for part in MAY_IMPORT for file in sorted((ROOT / part).rglob("*.py"))]


@pytest.mark.parametrize(("part", "file"), FILES, ids=lambda value: value.name if isinstance(value, Path) else value)
def test_imports_point_one_way(part, file):
    for name in imports_of(file):
        assert name != "hdp", f"{file.relative_to(ROOT)} imports hdp itself: import from the module that has the name"
        target = name.split(".")[1]
        if target.startswith("_"):  # compiled, from csrc
            continue
        assert target in MAY_IMPORT[part], f"{file.relative_to(ROOT)} imports {name}"
        if part == "balance" and target == "attention":
            assert name.split(".")[2] not in NEEDS_TORCH, f"{file.relative_to(ROOT)} imports {name}, which needs torch"


WITHOUT_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import hdp, hdp.attention, hdp.balance
from hdp.attention import checker, layout, lower, mask, program, schedules
plan = hdp.make_plan([100, 5, 900, 30], world_size=4, capacity=300)
plan.validate()
from hdp.balance.planners import PLANNERS
for planner in PLANNERS:
    hdp.make_plan([100, 5, 900, 30], world_size=4, capacity=300, planner=planner).validate()
made = layout.make_layout("zigzag", 50, 2)
schedules.get_schedule("ring").forward(made, mask.Mask(), program.HeadCount(query=2, key=1), 0)
assert not any(name.partition(".")[0] == "torch" for name in sys.modules)
try:
    hdp.init
except ImportError as error:
    assert "torch" in str(error)
else:
    raise SystemExit("hdp.init needs torch, and it was blocked")
"""


def test_planning_and_programs_work_without_torch():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists_and_says_what_it_is():
    import hdp

    for name in hdp.__all__:
        value = getattr(hdp, name)
        assert (value.__doc__ or "").strip(), f"hdp.{name} has no docstring"
    assert set(hdp.__all__) <= set(dir(hdp))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hdp.nothing  # noqa: B018


def test_what_attend_takes_is_public_beside_it():
    """``hdp.attend(route=...)`` needs a route, and a route shards."""
    import hdp
    import hdp.attention

    for name in ("Route", "RouteShard", "attend"):
        assert name in hdp.__all__ and getattr(hdp, name) is getattr(hdp.attention, name)


def test_folders_with_names_of_their_own_load_on_first_use():
    code = "import hdp; hdp.data.open_documents; hdp.report.launch; hdp.offload.FileTier"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert not done.returncode, done.stderr

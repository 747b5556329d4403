"""``make test`` tries the same examples whatever else is loaded; ``make fuzz`` others, and more of them."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest
from fuzz import TIMES, USUAL, examples, load_profile
from hypothesis import given, settings
from hypothesis import strategies as st

NUMBER = 1_234_567_891


def drawn(count: int) -> list[int]:
    found: list[int] = []

    @examples(count)
    @given(st.integers(0, 2 * NUMBER))
    def draw(number: int) -> None:
        found.append(number)

    draw()
    return found


@pytest.fixture
def profile():
    before = settings.get_current_profile_name()
    yield load_profile
    load_profile(before)


def test_the_same_examples_whatever_is_loaded(profile, tmp_path, monkeypatch):
    profile("test")
    first = drawn(300)
    (tmp_path / "full_of_constants.py").write_text(f"NUMBERS = [{', '.join(str(NUMBER + i) for i in range(500))}]\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("full_of_constants")
    try:
        assert drawn(300) == first and len(first) == 300
    finally:
        sys.modules.pop("full_of_constants")


def test_fuzzing_tries_more_examples_and_others(profile):
    profile("test")
    few, usual = drawn(20), settings().max_examples
    profile("fuzz")
    assert len(drawn(20)) == TIMES * len(few) and settings().max_examples == TIMES * usual == TIMES * USUAL
    assert drawn(20) != drawn(20)


def nested_properties() -> list[tuple[str, list[str], list[str]]]:
    """Tests with a property inside: where, their decorators, and those of the property."""
    found = []
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        for test in ast.parse(path.read_text()).body:
            for inner in ast.walk(test) if isinstance(test, ast.FunctionDef) and test.name.startswith("test_") else ():
                if isinstance(inner, ast.FunctionDef) and inner is not test:
                    outside, inside = ([ast.unparse(d) for d in f.decorator_list] for f in (test, inner))
                    if any(d.startswith("given(") for d in inside):
                        found.append((f"{path.name}: {test.name}", outside, inside))
    return found


def test_make_fuzz_runs_properties_inside_tests_too():
    """Hypothesis marks what has @given itself; ``-m hypothesis`` leaves out the others, and ``settings`` is not multiplied."""
    found = nested_properties()
    assert found
    for where, outside, inside in found:
        assert "pytest.mark.hypothesis" in outside, where
        assert not any(d.startswith("settings(") for d in inside), where

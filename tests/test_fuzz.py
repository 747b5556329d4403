"""``make test`` tries the same examples whatever else is loaded; ``make fuzz`` others, and more of them."""

from __future__ import annotations

import importlib
import sys

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

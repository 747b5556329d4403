"""Which examples hypothesis tries: in ``make test`` the same ones every time, in ``make fuzz`` others, and more of them.

    @examples(150)
    @given(st.integers(1, 9))
    def test_of_a_property(number): ...

A test that needs more or fewer than hypothesis' own hundred examples says so by ``examples``, not by ``settings``, so that
``make fuzz`` can multiply the number. What ``make fuzz`` finds stays with its test as an ``@example``.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.internal.conjecture import providers

USUAL = 100
"""Examples of a test that says nothing."""
TIMES = 10
"""Factor of all numbers of examples in ``make fuzz``."""
_CONSTANTS_OF_MODULES = providers._get_local_constants  # type: ignore[attr-defined]

# Neither profile depends on how fast the machine is. What hypothesis sets by itself where it sees a CI server is said here.
settings.register_profile(
    "test", max_examples=USUAL, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.register_profile(
    "fuzz", max_examples=USUAL * TIMES, derandomize=False, database=DirectoryBasedExampleDatabase(".hypothesis/examples"),
    deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


def examples(count: int) -> settings:
    """``count`` examples, in ``make fuzz`` :data:`TIMES` as many."""
    return settings(max_examples=count * settings().max_examples // USUAL)


def load_profile(name: str) -> None:
    """Chooses how the tests that are collected from now on draw their examples: ``"test"`` or ``"fuzz"``."""
    settings.load_profile(name)
    # Hypothesis also draws constants that it finds in whatever modules of this tree are loaded: which ones those are depends
    # on the tests that were collected and have run in this process. There is no setting for it.
    repeats = settings().derandomize
    providers._get_local_constants = providers.Constants if repeats else _CONSTANTS_OF_MODULES  # type: ignore[attr-defined]

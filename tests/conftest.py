"""Fixtures of all tests: ranks that are started once a module; the table of exactness errors; the profile of hypothesis."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fuzz
import pytest

# Before torch is imported, here or in a rank: ranks share the cores, and a pool of threads does not survive a fork.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
# The same plans in every run, and no test waits for a measurement: those of test_measure.py ask for one.
os.environ["HDP_MACHINE"] = "assume"
# Of each environment its own, as the Makefile has it: two would build DeepSpeed's op anew in turn, each within a test's limit,
# and a rank that is killed meanwhile leaves a lock for which all later ones wait.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions")))

EXACTNESS = "exactness"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exactness", metavar="FILE", help="write the error of every exactness case to FILE ('-': show it)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that no process is left with one when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The same random numbers in a test, whichever ran before it in this process."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], object]]:
    """``ranks(n)``: n real ranks (see ``harness.Ranks``), shared by the tests of a module; new ones if a test lost them."""
    from harness import Ranks

    groups: dict[int, Ranks] = {}

    def get(world_size: int) -> Ranks:
        if world_size in groups and not groups[world_size].alive:
            groups.pop(world_size).close()
        if world_size not in groups:
            groups[world_size] = Ranks(world_size)
        return groups[world_size]

    yield get
    for group in groups.values():
        group.close()


@pytest.fixture
def exactness(record_property: Callable[[str, object], None]) -> Callable[[str, float, str], None]:
    """``exactness(case, error, parameter)``: notes a case's worst error for the table at the end."""

    def record(case: str, error: float, parameter: str) -> None:
        record_property(EXACTNESS, (case, error, parameter))

    return record


class _Table:
    """Rows arrive with the reports, so they are complete under pytest-xdist too."""

    def __init__(self, target: str | None) -> None:
        self.target = target
        self.rows: list[tuple[str, float, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.rows += [tuple(value) for name, value in report.user_properties if name == EXACTNESS]  # type: ignore[misc]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.rows:
            return
        lines = [f"{case:<60} {error:.2e}  {parameter}" for case, error, parameter in sorted(self.rows)]
        if self.target == "-":
            terminalreporter.write_sep("-", "exactness: largest relative error of a gradient, by case")
            terminalreporter.write_line("\n".join(lines))
        elif self.target:
            Path(self.target).write_text("\n".join(lines) + "\n")
        case, error, parameter = max(self.rows, key=lambda row: row[1])
        terminalreporter.write_line(
            f"exactness: {len(self.rows)} cases, largest error {error:.2e} ({case}, {parameter})"
        )


def pytest_configure(config: pytest.Config) -> None:
    fuzz.load_profile(config.getoption("--hypothesis-profile", None) or "test")
    config.pluginmanager.register(_Table(config.getoption("--exactness")), "exactness-table")

"""A pytest plugin for a run that may be cut off (``-p tests.going_on --passed FILE``).

Tests that passed before are left out, by the node ids in the file, to which every test that passes is added at once. A
run in which something chosen did not run fails: a test that was skipped for another reason than a package or data that
isn't there, and tests that nobody came to.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

# reasons that name what the machine lacks, and tests that have nothing to test on a GPU
ALLOWED = re.compile(
    r"could not import|not installed|NO [A-Z ]+:|a size for a GPU|the interpreter's process|"
    r"no row for the CPU|looks into the convolution that stands for cuDNN's|there is one"
)
SHARED = "going_on_passed"  # in what pytest-xdist hands its workers


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("going on")
    group.addoption("--passed", metavar="FILE", help="Leave out the tests that this file names; add those that pass.")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--passed"):
        config.pluginmanager.register(GoingOn(config, Path(config.getoption("--passed"))), "going-on-with-the-rest")


class GoingOn:
    """The tests that passed, and those that did not run.

    Args:
        config: pytest's.
        path: of the file of node ids, a line each.
    """

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self.path, self.worker = path, getattr(config, "workerinput", None)
        if self.worker is not None:  # all workers choose the same tests, those that start late too
            self.passed = set(self.worker[SHARED])
        else:
            self.passed = set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
        self.chosen: set[str] = set()
        self.ended: set[str] = set()
        self.failed: set[str] = set()
        self.skipped: dict[str, str] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker of pytest-xdist what passed before this run."""
        node.workerinput[SHARED] = sorted(self.passed)

    @pytest.hookimpl(trylast=True)  # -m has chosen by then
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        before = [item for item in items if item.nodeid in self.passed]
        items[:] = [item for item in items if item.nodeid not in self.passed]
        config.hook.pytest_deselected(items=before)
        self.chosen = {item.nodeid for item in items}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """Note what a worker collected: with workers, this process collects nothing."""
        self.chosen = set(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.skipped and not hasattr(report, "wasxfail"):
            longrepr = report.longrepr
            self.skipped[report.nodeid] = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
        if report.when == "teardown":
            self.ended.add(report.nodeid)
            if self.worker is None and report.nodeid not in self.failed and report.nodeid not in self.wrongly_skipped:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(f"{report.nodeid}\n")

    @property
    def wrongly_skipped(self) -> dict[str, str]:
        return {name: reason for name, reason in self.skipped.items() if not ALLOWED.search(reason)}

    @property
    def not_run(self) -> set[str]:
        return self.chosen - self.ended - self.failed

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.worker is not None or session.config.getoption("--collect-only"):
            return
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.passed and not self.chosen:
            session.exitstatus = pytest.ExitCode.OK  # all of them passed before
        elif session.exitstatus == pytest.ExitCode.OK and (self.wrongly_skipped or self.not_run):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.passed:
            terminalreporter.write_line(f"{len(self.passed)} tests passed before and were left out")
        for name, reason in self.wrongly_skipped.items():
            terminalreporter.write_line(f"DID NOT RUN {name}: {reason}")
        if self.not_run:
            terminalreporter.write_line(f"DID NOT RUN {len(self.not_run)} tests, {min(self.not_run)} among them")

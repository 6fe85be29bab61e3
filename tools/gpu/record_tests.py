"""A pytest plugin (-p gpu.record_tests): every test's result goes into gpu_check's records as the test ends."""

from __future__ import annotations

import pytest

from gpu import records


def pytest_configure(config: pytest.Config) -> None:
    """The workers of pytest-xdist tell their controller, which writes."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(), "gpu_check_recorder")


class Recorder:
    def __init__(self) -> None:
        self.results: dict[str, str] = {}
        self.planned = False

    def plan(self, names: list[str]) -> None:
        if names and not self.planned:
            self.planned = True
            records.write(planned=names)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.plan([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: list[str]) -> None:
        self.plan(list(ids))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        records.write(name=nodeid, result="started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Three reports per test; one alone, of no phase, where a worker died."""
        name = report.nodeid
        if report.failed:
            self.results[name] = "failed"
        elif report.when != "teardown" and self.results.get(name) != "failed":
            self.results[name] = "skipped" if report.skipped else "passed"
        if report.when not in ("setup", "call"):
            records.write(name=name, result=self.results.pop(name, "failed"))

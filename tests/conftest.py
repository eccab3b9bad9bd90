"""What every test shares: one thread a worker, seeds, and none of MMEngine's global objects left by another test."""

import os
import random
import signal
import sys
from collections.abc import Iterator

if 'PYTEST_XDIST_WORKER' in os.environ:  # the workers are the parallelism; torch reads it here and in child processes
    os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import pytest
import torch

# A shell starts background jobs with Ctrl-C ignored, and child processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

GLOBALS = {
    'mmengine.logging': ('MessageHub', 'MMLogger'),
    'mmengine.registry': ('DefaultScope',),
    'mmengine.visualization': ('Visualizer',),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run in which nothing passed proves nothing, though no test failed."""
    reporter = session.config.pluginmanager.get_plugin('terminalreporter')
    if reporter is None or session.config.option.collectonly:  # a worker of pytest-xdist has no reporter
        return
    if session.exitstatus == pytest.ExitCode.OK and not reporter.stats.get('passed'):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_memory_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Several processes test on one GPU: what one has allocated and freed is the others' again."""
    yield
    if request.node.get_closest_marker('gpu'):
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _no_globals_left() -> Iterator[None]:
    """MMEngine keeps the default scope, loggers and visualizers of every run under its name for good."""
    yield
    for module in GLOBALS.keys() & sys.modules.keys():  # not imported here: the tests decide what is imported first
        for name in GLOBALS[module]:
            getattr(sys.modules[module], name)._instance_dict.clear()

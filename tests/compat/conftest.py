"""A fresh Python for each test of an import: what one test blocks or mends must not reach another."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

PREAMBLE = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))  # None: `import` raises ModuleNotFoundError, find_spec finds nothing
"""


@pytest.fixture
def python(tmp_path, monkeypatch) -> Callable[..., str]:
    """`python(code)` runs it in a new process, in an empty folder, and returns what it printed.

    `block` names modules that cannot be imported in it, `path` a folder searched before all others. A failure there
    fails the test.
    """
    monkeypatch.setenv('OMP_NUM_THREADS', '1')

    def run(code: str, *, block: tuple[str, ...] = (), path: Path | None = None) -> str:
        if path is not None:
            monkeypatch.setenv('PYTHONPATH', str(path), prepend=os.pathsep)
        result = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', PREAMBLE.format(blocked=block) + dedent(code)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run

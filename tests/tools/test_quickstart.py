"""The steps of tools/quickstart.py, and `python -m mmvig`; tests/package/test_distribution.py runs them for real."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def steps(monkeypatch, tmp_path) -> list[list[str]]:
    """The commands that are called instead of being run, in an empty folder; training leaves a checkpoint's name."""
    called = []

    def run(words: list):
        called.append([str(word) for word in words[1:]])
        if called[-1][0].endswith('train.py'):
            for name in ('quickstart', 'quickstart-short'):
                folder = tmp_path / 'work_dirs' / name
                folder.mkdir(parents=True)
                (folder / 'last_checkpoint').write_text('epoch_7.pth\n')
        return SimpleNamespace(returncode=3 if called[-1][0].endswith('test.py') else 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, 'run', run)
    return called


@pytest.mark.parametrize('short', [True, False])
def test_steps(short, steps, run_tool):
    status, out = run_tool('quickstart.py', *['--short'] * short)
    assert status == 3, 'the status of the step that failed'
    assert [Path(words[0]).name for words in steps] == ['make_digit_scenes.py', 'train.py', 'test.py']
    assert all(Path(words[0]).is_file() for words in steps)
    assert steps[2][2] == 'epoch_7.pth' and '--resume' in steps[1]
    for words in steps[1:]:
        assert ('train_cfg.max_epochs=1' in words) == short
    assert out.count('$ python -m mmvig ') == 3 and 'Done' not in out


def mmvig(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-m', 'mmvig', *words], cwd=cwd, capture_output=True, text=True)


def test_a_tool_by_its_name(tmp_path):
    scenes = ['make_digit_scenes', 'scenes', '--train', '1', '--test', '1', '--size', '128', '--workers', '1']
    done = mmvig(*scenes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / 'scenes' / 'meta.json').read_text())['recipe']['train'] == 1


def test_names_of_the_tools(tmp_path):
    listed = mmvig(cwd=tmp_path).stdout
    assert all(path.stem in listed for path in (ROOT / 'tools').glob('*.py'))
    done = mmvig('trian', cwd=tmp_path)
    assert done.returncode != 0 and "no tool 'trian'" in done.stderr and 'train' in done.stderr

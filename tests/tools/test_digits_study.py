import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = [
    ROOT / 'configs/mmdet/digits/mask-rcnn_vigh-gla-nano_fpn_quickstart_digits.py',
    ROOT / 'configs/mmpretrain/digits/vigh-gla-nano_1xb64_digits-64px.py',
    ROOT / 'configs/mmseg/digits/vigh-gla-nano_upernet_1xb8-2k_digits-448x448.py',
]
LOADERS = ('train_dataloader', 'val_dataloader')
OPTIONS = ['default_hooks.logger.interval=1', *(f'{loader}.num_workers=0' for loader in LOADERS)]
NOT_PERSISTENT = [f'{loader}.persistent_workers=False' for loader in LOADERS]


@pytest.fixture
def folder(digit_scenes, tmp_path, monkeypatch) -> Path:
    """A working directory whose data are a few small scenes."""
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/digit_scenes').symlink_to(digit_scenes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_trains_tabulates_and_draws(folder, run_tool):
    for config, more in zip(CONFIGS, (NOT_PERSISTENT, [], NOT_PERSISTENT)):
        length = ['train_cfg.max_epochs=2'] if 'upernet' not in config.name else ['train_cfg.max_iters=2']
        status, out = run_tool('digits_study.py', config, '--cfg-options', *OPTIONS, *more, *length)
        assert status == 0, out
    status, out = run_tool('digits_study.py', *CONFIGS, '--out', 'study.csv', '--picture', 'study.png')
    assert status == 0 and '3 of 3 trainings are complete: study.csv, study.png' in out and 'begins' not in out
    header, *rows = (folder / 'study.csv').read_text().splitlines()
    assert header.startswith('task,backbone,') and len(rows) == 3
    assert (folder / 'study.png').stat().st_size > 10_000


@pytest.mark.slow
def test_sigterm_lets_trainings_save(folder):
    options = [*OPTIONS, 'train_cfg.max_epochs=10000']
    command = [sys.executable, ROOT / 'tools/digits_study.py', CONFIGS[1], '--cfg-options', *options]
    study = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    work_dir = folder / 'work_dirs/digits_study' / CONFIGS[1].stem
    for _ in range(600):
        if (work_dir / 'console.txt').exists() and 'train  iter' in (work_dir / 'console.txt').read_text():
            break
        time.sleep(0.1)
    study.send_signal(signal.SIGTERM)
    said = study.communicate(timeout=60)[0]
    assert study.returncode == 143 and 'Told to stop' in said and 'has stopped, and goes on with the next call' in said
    assert (work_dir / 'last_checkpoint').exists() and not (work_dir / 'complete.json').exists()


def test_no_time(folder, run_tool):
    status, out = run_tool('digits_study.py', CONFIGS[1], '--minutes', '0')
    assert status == 0 and '0 s are over: 0 running and 1 waiting trainings stop' in out
    assert not (folder / 'work_dirs/digits_study/digits_study.csv').exists()


def test_the_study_has_all_three_backbones_at_each_task(folder, run_tool, monkeypatch):
    """And writes scenes of each size where there are none."""
    from mmvig.datasets import digit_scenes

    made = []
    monkeypatch.setattr(digit_scenes, 'make_digit_scenes', lambda out, recipe, workers: made.append((out, recipe.size)))
    status, out = run_tool('digits_study.py', '--minutes', '0')
    assert status == 0 and '0 running and 12 waiting' in out
    assert made == [('data/digit_scenes_512', 512), ('data/digit_scenes_1536', 1536)]

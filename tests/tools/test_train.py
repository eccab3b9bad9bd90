import re
import shlex
from pathlib import Path

import pytest
import torch

STOPPING = "custom_hooks.append(dict(type='Signal', signum=2, train_iter=8))\n"


@pytest.fixture
def train(run_tool, toy_file, tmp_path):
    """Runs tools/train.py on the toy: (exit status or message, standard output)."""

    def run(*arguments: object, work_dir: str = 'work') -> tuple[int | str, str]:
        return run_tool('train.py', toy_file, '--work-dir', tmp_path / work_dir, *arguments)

    return run


def test_a_run_that_is_stopped_goes_on_by_the_command_it_prints(train, run_tool, toy_file, tmp_path):
    options = ['--progress', 'lines', '--cfg-options', 'train_cfg.max_epochs=2']
    assert train(*options, work_dir='whole')[0] == 0
    config = toy_file.read_text()
    toy_file.write_text(config + STOPPING)
    status, said = train(*options, '--resume')
    assert status == 130
    assert 'starting from the beginning' in said and 'stopped by SIGINT' in said
    toy_file.write_text(config)
    python, tool, *arguments = shlex.split(re.search(r'To go on:\n(.*)\n', said)[1])
    assert python == 'python' and tool.endswith('tools/train.py') and arguments.count('--resume') == 1
    status, said = run_tool('train.py', *arguments)
    assert status == 0
    assert f'Going on from {tmp_path / "work/interrupted.pth"}: epoch 1, iteration 9.' in said
    assert 'custom_hooks.2.type: ' in said  # what stopped it is gone
    whole, parts = ((tmp_path / name / 'losses.txt').read_text() for name in ('whole', 'work'))
    assert parts == whole


def test_resume_takes_a_path(train, tmp_path):
    assert train('--cfg-options', 'train_cfg.max_epochs=1')[0] == 0
    status, said = train('--cfg-options', 'train_cfg.max_epochs=1', '--resume', tmp_path / 'work/iter_3.pth')
    assert status == 0 and 'iter_3.pth: epoch 0, iteration 3.' in said
    lines = (tmp_path / 'work/losses.txt').read_text().splitlines()
    assert lines[6:] == lines[3:6]


def test_no_validate(train):
    status, said = train('--no-validate', '--cfg-options', 'train_cfg.max_epochs=1')
    assert status == 0 and 'train  iter 6/6' in said and 'toy/mean' not in said


def test_log_of_mmengine_on_the_console(train):
    status, said = train('--progress', 'log', '--cfg-options', 'train_cfg.max_epochs=1')
    assert status == 0 and 'Epoch(train)' in said and 'train  iter' not in said


def test_auto_scale_lr(train):
    status, _ = train('--auto-scale-lr')
    assert 'auto_scale_lr.base_batch_size' in status
    status, said = train(
        '--auto-scale-lr', '--cfg-options', 'train_cfg.max_epochs=1', 'auto_scale_lr.base_batch_size=8'
    )
    assert status == 0 and 'lr 2.50e-02' in said


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--cfg-options', 'model.wdth=9'], '--cfg-options: model.wdth matches nothing.*model.width'),
        (['--cfg-options', 'load_from=gone.pth'], 'load_from: there is no file gone.pth'),
        (['--resume', 'gone.pth'], '--resume: .*gone.pth'),
        (
            ['--cfg-options', '+train_dataloader.dataset.data_root=data/nowhere/digit_scenes'],
            r'missing  data/nowhere/digit_scenes(.|\n)*make_digit_scenes.py data/nowhere/digit_scenes',
        ),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_built(train, arguments, message):
    status, said = train(*arguments)
    assert re.search(message, status) and said == ''


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without GPU')
def test_amp_needs_a_device(train):
    status, _ = train('--amp')
    assert status.startswith('--amp: ')


def test_foreign_weights(train, tmp_path):
    (tmp_path / 'page.pth').write_text('<html>')
    status, _ = train('--cfg-options', f'load_from={tmp_path}/page.pth')
    assert 'page.pth is no PyTorch checkpoint' in status


def test_option_without_a_value(run_tool, toy_file, capsys):
    assert run_tool('train.py', toy_file, '--cfg-options', 'train_cfg.max_epochs')[0] == 2


@pytest.mark.parametrize('library', ['mmdet', 'mmseg', 'mmpretrain'])
def test_each_library(run_tool, library_file, library, tmp_path):
    status, said = run_tool('train.py', library_file(library), '--work-dir', tmp_path / 'work')
    assert status == 0, said
    assert re.search(r'train  iter (\d+)/\1 .*loss', said)
    metric = dict(mmdet='coco/bbox_mAP', mmseg='mIoU', mmpretrain='accuracy/top1')[library]
    assert re.search(rf'val  (epoch|iter) \d  .*{metric} ', said)
    assert Path(tmp_path, 'work/last_checkpoint').is_file()


def test_compile(train):
    """The flag puts the hook into the config: it looks for the backbone, of which the toy has none."""
    assert "CompileHook: ToyModel has no module 'backbone'" in train('--compile')[0]

"""A checkpoint that would run code when unpickled: every tool that takes one refuses it, and nothing runs."""

import os

import pytest
import torch
from packaging.version import Version

pytestmark = pytest.mark.skipif(Version(torch.__version__) < Version('2.6'), reason='torch before 2.6')


class Command:
    """What pickle makes of it is a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / 'it-ran'


@pytest.fixture
def evil(marker, tmp_path) -> str:
    path = tmp_path / 'evil.pth'
    state = dict(
        state_dict={}, optimizer={}, meta=dict(iter=1, epoch=0, seed=0, cfg='', code=Command(f'touch {marker}'))
    )
    torch.save(state, path)
    return str(path)


def test_the_file_is_what_it_should_be(evil, marker):
    torch.load(evil, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    'tool', ['load_from', 'resume', 'resume the newest', 'test', 'image_demo', 'convert', 'export']
)
def test_it_is_refused(tool, evil, marker, run_tool, toy_file, library_file, digit_scenes, tmp_path):
    out = tmp_path / 'out'
    match tool:
        case 'load_from':
            words = ['train.py', toy_file, '--work-dir', out, '--cfg-options', f'load_from={evil}']
        case 'resume':
            words = ['train.py', toy_file, '--work-dir', out, '--resume', evil]
        case 'resume the newest':
            words = [
                'train.py',
                toy_file,
                '--work-dir',
                tmp_path,
                '--resume',
                '--cfg-options',
                'train_cfg.max_epochs=1',
            ]
        case 'test':
            words = ['test.py', toy_file, evil, '--work-dir', out]
        case 'image_demo':
            image = digit_scenes / 'images/test/000001.jpg'
            words = ['image_demo.py', library_file('mmpretrain'), evil, image, '--out-dir', out]
        case 'convert':
            words = ['convert_checkpoint.py', evil, tmp_path / 'converted.pth']
        case 'export':
            words = ['export.py', library_file('mmpretrain'), tmp_path / 'model.pt2', '--checkpoint', evil]
    status, said = run_tool(*words)
    if tool == 'resume the newest':
        assert status == 0
        assert 'passes over' in said and 'starting from the beginning' in said
    else:
        assert 'evil.pth was not loaded' in str(status)
    assert not marker.exists()
    assert not (tmp_path / 'converted.pth').exists() and not (tmp_path / 'model.pt2').exists()

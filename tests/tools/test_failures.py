"""What is wrong with a user's files, through the tools: each names the file, or does without."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mmvig.engine.resume import load_for_resume

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')


@pytest.fixture
def scenes(digit_scenes, tmp_path) -> Path:
    """A copy of the data set, to be damaged."""
    return Path(shutil.copytree(digit_scenes, tmp_path / 'scenes'))


@pytest.fixture
def train(run_tool, library_file, scenes, tmp_path):
    """Runs tools/train.py on a library's toy with the copied data: (exit status or message, standard output)."""

    def run(library: str, *options: str) -> tuple[int | str, str]:
        file = library_file(library)
        _, *lines = file.read_text().splitlines()
        file.write_text('\n'.join([f'data_root = {str(scenes)!r}', *lines]))
        options = ('randomness.seed=0', *options)
        return run_tool('train.py', file, '--work-dir', tmp_path / 'work', '--no-validate', '--cfg-options', *options)

    return run


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('library', LIBRARIES)
def test_a_corrupt_image_is_named(train, scenes, library, workers):
    paths = list((scenes / ('crops/train' if library == 'mmpretrain' else 'images/train')).rglob('*.jpg'))
    for path in paths:
        path.write_bytes(b'\xff\xd8\xff' + bytes(50))
    with pytest.raises(AssertionError, match='failed to load image: ') as caught:
        train(library, f'train_dataloader.num_workers={workers}')
    assert any(str(path) in str(caught.value) for path in paths)


@pytest.mark.parametrize('content', ['', '{"images": [', None], ids=['empty', 'cut', 'no images'])
def test_annotations_without_content(train, scenes, content):
    file = scenes / 'annotations/instances_train.json'
    document = json.loads(file.read_text())
    file.write_text(json.dumps(dict(document, images=[], annotations=[])) if content is None else content)
    status, _ = train('mmdet')
    assert str(file) in status and ('holds no sample' if content is None else 'cannot be read: ') in status


def test_images_without_objects(train, scenes, tmp_path):
    """They are background: the losses are finite, and the weights move."""
    file = scenes / 'annotations/instances_train.json'
    file.write_text(json.dumps(dict(json.loads(file.read_text()), annotations=[])))
    status, said = train('mmdet', 'train_dataloader.batch_size=1')
    assert status == 0 and 'iter 4/4' in said
    weights = load_for_resume(tmp_path / 'work/epoch_1.pth')['state_dict']
    assert all(value.isfinite().all() for value in weights.values())


def test_resume_passes_over_a_cut_checkpoint(run_tool, toy_file, tmp_path):
    command = ['train.py', toy_file, '--work-dir', tmp_path / 'work', '--resume']
    assert run_tool(*command, '--cfg-options', 'train_cfg.max_epochs=1')[0] == 0
    whole = (tmp_path / 'work/losses.txt').read_text().splitlines()
    for name in ('iter_6.pth', 'iter_5.pth'):
        file = tmp_path / 'work' / name
        file.write_bytes(file.read_bytes()[:-500])
    status, said = run_tool(*command, '--cfg-options', 'train_cfg.max_epochs=1')
    assert status == 0
    assert 'passes over' in said and 'iter_6.pth is a damaged checkpoint' in said and 'iteration 4.' in said
    assert (tmp_path / 'work/losses.txt').read_text().splitlines() == [*whole, *whole[4:]]


@pytest.mark.parametrize('tool', ['train', 'resume', 'test'])
def test_a_checkpoint_of_another_size(run_tool, toy_file, tmp_path, tool):
    wide = ['--no-validate', '--cfg-options', 'model.width=16', 'train_cfg.max_epochs=1']
    assert run_tool('train.py', toy_file, '--work-dir', tmp_path / 'wide', *wide)[0] == 0
    file = str(tmp_path / 'wide/iter_6.pth')
    command = dict(
        train=['train.py', toy_file, '--cfg-options', f'load_from={file}'],
        resume=['train.py', toy_file, '--resume', file],
        test=['test.py', toy_file, file],
    )[tool]
    status, _ = run_tool(*command, '--work-dir', tmp_path / 'narrow')
    message = 'model.width: 16 -> 8' if tool == 'resume' else 'embed.0.weight (16, 4) in the file, (8, 4) in the model'
    assert message in status


def test_a_checkpoint_of_another_depth_is_not_tested(run_tool, toy_file, tmp_path):
    """Its first blocks would fill a shallower model, and warnings would be all."""
    command = ['train.py', toy_file, '--work-dir', tmp_path / 'work', '--cfg-options', 'train_cfg.max_epochs=1']
    assert run_tool(*command)[0] == 0
    checkpoint = load_for_resume(tmp_path / 'work/iter_6.pth')
    weights = checkpoint['state_dict']
    less = {name: value for name, value in weights.items() if name != 'block.weight'}
    more = {**weights, 'backbone.deeper': torch.ones(3, 3)}
    other = {**weights, 'head.weight': torch.ones(3, 8)}
    for change, name in ((less, 'block.weight'), (more, 'backbone.deeper'), (other, 'head.weight')):
        torch.save(dict(checkpoint, state_dict=change), tmp_path / 'other.pth')
        status, _ = run_tool('test.py', toy_file, tmp_path / 'other.pth', '--work-dir', tmp_path / 'work')
        assert 'other.pth is no checkpoint of this model' in status and name in status
    torch.save(dict(checkpoint, state_dict={**weights, 'auxiliary_head.weight': torch.ones(3)}), tmp_path / 'other.pth')
    assert run_tool('test.py', toy_file, tmp_path / 'other.pth', '--work-dir', tmp_path / 'work')[0] == 0

import os
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmvig.engine.preflight import check_paths, prepare_resume
from mmvig.engine.settings import SetupError


def config(tmp_path, **settings) -> Config:
    return Config(dict(work_dir=str(tmp_path / 'work'), model=dict(type='A'), **settings))


def coco(root: str) -> dict:
    dataset = dict(
        type='CocoDataset',
        data_root=root,
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
    )
    return dict(dataset=dict(type='RepeatDataset', times=2, dataset=dataset))


def message(cfg: Config, *parts: str) -> str:
    with pytest.raises(SetupError) as error:
        check_paths(cfg, *parts)
    return str(error.value)


def test_everything_in_place(tmp_path):
    root = tmp_path / 'coco'
    (root / 'annotations').mkdir(parents=True)
    (root / 'train').mkdir()
    (root / 'annotations/train.json').touch()
    (tmp_path / 'weights.pth').touch()
    cfg = config(
        tmp_path,
        train_dataloader=coco(f'{root}/'),
        val_dataloader=None,
        val_evaluator=[dict(type='CocoMetric', ann_file=f'{root}/annotations/train.json')],
        load_from=str(tmp_path / 'weights.pth'),
    )
    cfg.model.backbone = dict(init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'))
    check_paths(cfg, 'train', 'val')
    assert os.listdir(tmp_path / 'work') == []


def test_missing_data_root_shows_the_expected_layout(tmp_path):
    said = message(config(tmp_path, train_dataloader=coco('data/nowhere/')), 'train')
    assert said.startswith('train_dataloader.dataset.dataset: the data are not where the config expects them')
    assert os.getcwd() in said
    for line in (
        'missing  data/nowhere/  (data_root)',
        'missing  data/nowhere/annotations/train.json  (ann_file)',
        'missing  data/nowhere/train/  (data_prefix.img)',
        '--cfg-options train_dataloader.dataset.dataset.data_root=...',
    ):
        assert line in said


def test_missing_annotation_file_alone(tmp_path):
    (tmp_path / 'coco/train').mkdir(parents=True)
    said = message(config(tmp_path, val_dataloader=coco(str(tmp_path / 'coco'))), 'train', 'val')
    assert f'missing  {tmp_path}/coco/annotations/train.json' in said and f'found    {tmp_path}/coco/train/' in said


def test_missing_digit_scenes_come_with_their_command(tmp_path):
    for root in ('data/nowhere/digit_scenes', 'data/nowhere/digit_scenes/'):
        said = message(config(tmp_path, train_dataloader=coco(root)), 'train')
        assert 'python tools/make_digit_scenes.py data/nowhere/digit_scenes\n' in said
        assert 'data/nowhere/digit_scenes/\n    images/{train,test}/000001.jpg' in said


def test_only_the_named_parts_are_looked_at(tmp_path):
    cfg = config(tmp_path, train_dataloader=coco('nowhere'), test_dataloader=coco('nowhere'))
    cfg.model.init_cfg = dict(type='Pretrained', checkpoint='nowhere.pth')
    check_paths(cfg, 'val')
    assert 'test_dataloader' in (said := message(cfg, 'test')) and 'train_dataloader' not in said
    assert 'nowhere.pth' not in said


@pytest.mark.parametrize(
    'dataset',
    [
        dict(type='CIFAR10', data_root='nowhere'),
        dict(type='CocoDataset', data_root='s3://bucket/coco', ann_file='a.json'),
        dict(type='CocoDataset', data_root='nowhere', backend_args=dict(backend='petrel')),
        dict(type='CocoDataset', ann_file='https://example.org/a.json'),
        dict(type='ToyDataset'),
    ],
)
def test_data_that_is_fetched_or_elsewhere_is_not_looked_for(tmp_path, dataset):
    check_paths(config(tmp_path, train_dataloader=dict(dataset=dataset)), 'train')


def test_imagenet_has_a_folder_for_each_split(tmp_path):
    (tmp_path / 'imagenet/train').mkdir(parents=True)
    for split, missing in (('train', False), ('val', True)):
        dataset = dict(type='ImageNet', data_root=str(tmp_path / 'imagenet'), split=split, data_prefix='')
        cfg = config(tmp_path, train_dataloader=dict(dataset=dataset))
        if missing:
            assert f'missing  {tmp_path}/imagenet/val  (data_prefix)' in message(cfg, 'train')
        else:
            check_paths(cfg, 'train')


def test_missing_weights(tmp_path):
    cfg = config(tmp_path, load_from='gone/a.pth')
    cfg.model.backbone = dict(init_cfg=dict(type='Pretrained', checkpoint='gone/b.pth'))
    cfg.model.neck = dict(pretrained='gone/c.pth')
    said = message(cfg, 'train')
    for name in ('load_from', 'model.backbone.init_cfg.checkpoint', 'model.neck.pretrained'):
        assert f'{name}: there is no file gone/' in said


def test_work_dir_that_cannot_be_written_to(tmp_path):
    (tmp_path / 'work').write_text('a file')
    assert message(config(tmp_path)).startswith(f'work_dir: {tmp_path}/work cannot be written to')


def test_all_problems_are_told_at_once(tmp_path):
    said = message(config(tmp_path, load_from='gone.pth', train_dataloader=coco('nowhere')), 'train')
    assert 'load_from' in said and 'nowhere' in said


# Resuming


@pytest.fixture
def saved(toy_config):
    """A config, and a checkpoint that a run of it with seed 3 might have written."""
    cfg = toy_config()
    Path(cfg.work_dir).mkdir()
    meta = dict(cfg=cfg.pretty_text, seed=3, epoch=1, iter=6)
    torch.save(dict(meta=meta, optimizer={}, state_dict={}), Path(cfg.work_dir, 'epoch_1.pth'))
    return cfg, str(Path(cfg.work_dir, 'epoch_1.pth'))


def test_resuming_with_the_same_config(saved):
    cfg, path = saved
    cfg.randomness.seed = 3
    for checkpoint in ('auto', path):
        lines = prepare_resume(cfg, checkpoint)
        assert lines[0] == f'Going on from {path}: epoch 1, iteration 6.'
        assert cfg.load_from == path and cfg.resume is True


def test_resuming_takes_the_seed_of_the_checkpoint(saved):
    cfg, path = saved
    cfg.randomness.seed = None
    assert prepare_resume(cfg, path) == [f'Going on from {path}: epoch 1, iteration 6.']
    assert cfg.randomness.seed == 3


def test_another_model_is_an_error_that_lists_the_differences(saved):
    cfg, path = saved
    cfg.model.width = 16
    cfg.model.depth = 2
    cfg.train_cfg.max_epochs = 5
    with pytest.raises(SetupError) as error:
        prepare_resume(cfg, path)
    assert '  model.width: 8 -> 16\n  model.depth: (not set) -> 2\n' in str(error.value)
    assert 'max_epochs' not in str(error.value) and f'load_from={path}' in str(error.value)
    assert 'resume' not in cfg


def test_other_differences_are_listed_and_it_goes_on(saved):
    cfg, path = saved
    cfg.train_cfg.max_epochs = 5
    cfg.model.init_cfg = dict(type='Pretrained', checkpoint='weights.pth')  # where the weights came from at the start
    cfg.work_dir = cfg.work_dir + '_elsewhere'
    lines = prepare_resume(cfg, path)
    assert '  train_cfg.max_epochs: 3 -> 5' in lines
    assert "  model.init_cfg.checkpoint: (not set) -> 'weights.pth'" in lines
    assert not any('work_dir' in line for line in lines)
    assert cfg.resume is True


def test_nothing_to_resume_starts_from_the_beginning(toy_config):
    cfg = toy_config(load_from='weights.pth')
    assert 'starting from the beginning' in prepare_resume(cfg, 'auto')[0]
    assert cfg.load_from == 'weights.pth' and not cfg.get('resume')


@pytest.mark.parametrize('content', [b'', b'no checkpoint', None])
def test_what_cannot_be_resumed_is_an_error(saved, content, tmp_path):
    cfg, _ = saved
    path = tmp_path / 'other.pth'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SetupError, match='--resume: .*other.pth'):
        prepare_resume(cfg, str(path))

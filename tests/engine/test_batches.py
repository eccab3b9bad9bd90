import json
import random

import cv2
import numpy as np
import pytest
import torch
from mmengine.runner import Runner

from mmvig.engine.batches import SeededBatch, positioned, seed_random


def draw() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_seed_random_is_a_function_of_its_key():
    drawn = {}
    for key in [(0,), (0, 1), (1, 0), (7, 3, 2**40)]:
        seed_random(*key)
        drawn[key] = draw()
    assert all(len(set(numbers)) == len(drawn) for numbers in zip(*drawn.values()))
    seed_random(0, 1)
    assert draw() == drawn[0, 1]


def test_a_batch_seeds_where_it_is_iterated_over():
    batch = SeededBatch([3, 1, 2], key=(5, 0, 9))
    first = [(index, draw()) for index in batch]
    torch.rand(100)
    assert [(index, draw()) for index in batch] == first
    assert [index for index, _ in first] == [3, 1, 2] and len(batch) == 3


def build(dataloader: dict, endless: bool = False):
    return Runner.build_dataloader(positioned(dataloader, seed=0, endless=endless), seed=0)


def toy_loader(**settings) -> dict:
    dataset = dict(type='ToyDataset', size=10)
    return dict(dataset=dataset, sampler=dict(type='DefaultSampler'), batch_size=4, num_workers=0, **settings)


def labels(loader) -> list[list[float]]:
    return [list(batch['label']) for batch in loader]


def test_the_config_decides_on_batches_as_before(toy):
    for settings in ({}, dict(drop_last=True), dict(sampler=dict(type='DefaultSampler', shuffle=False))):
        config = {**toy_loader(), **settings}
        assert labels(build(config)) == labels(Runner.build_dataloader(config, seed=0))
        assert len(build(config)) == len(Runner.build_dataloader(config, seed=0))
        assert 'batch_sampler' not in config


def test_endless_batches_reshuffle_as_mmengine_does(toy):
    loader = build(toy_loader(), endless=True)
    iterator = iter(loader)
    stock = Runner.build_dataloader(toy_loader(), seed=0)
    for epoch in range(3):
        stock.sampler.set_epoch(epoch)
        assert [list(next(iterator)['label']) for _ in range(3)] == labels(stock)


@pytest.mark.parametrize('workers', [0, 2])
def test_mosaic_and_mixup_of_a_batch_depend_on_its_position(tmp_path, workers):
    """They draw other images; the batch sampler of mmdet keeps images in buckets by aspect ratio."""
    from mmdet.utils import register_all_modules

    register_all_modules()
    rng = np.random.default_rng(0)
    (tmp_path / 'images').mkdir()
    coco = dict(images=[], annotations=[], categories=[dict(id=1, name='thing')])
    for number in range(9):
        height, width = (40, 32) if number % 3 else (32, 40)
        cv2.imwrite(str(tmp_path / f'images/{number}.png'), rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        coco['images'].append(dict(id=number, file_name=f'{number}.png', height=height, width=width))
        coco['annotations'].append(
            dict(id=number + 1, image_id=number, category_id=1, bbox=[4, 4, 20, 20], area=400, iscrowd=0)
        )
    (tmp_path / 'coco.json').write_text(json.dumps(coco))
    config = dict(
        batch_size=2,
        num_workers=workers,
        sampler=dict(type='DefaultSampler', shuffle=True),
        batch_sampler=dict(type='AspectRatioBatchSampler'),
        dataset=dict(
            type='MultiImageMixDataset',
            dataset=dict(
                type='CocoDataset',
                data_root=str(tmp_path),
                ann_file='coco.json',
                data_prefix=dict(img='images/'),
                metainfo=dict(classes=('thing',)),
                pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)],
            ),
            pipeline=[
                dict(type='Mosaic', img_scale=(48, 48)),
                dict(type='RandomAffine', border=(-24, -24)),
                dict(type='MixUp', img_scale=(48, 48)),
                dict(type='PhotoMetricDistortion'),
                dict(type='PackDetInputs', meta_keys=()),
            ],
        ),
    )
    whole = [torch.stack(batch['inputs']) for batch in build(config)]
    assert len(whole) == 5 and not torch.equal(whole[0], whole[1])
    loader = build(config)
    loader.batch_sampler.seek(3)
    rest = [torch.stack(batch['inputs']) for batch in loader]
    assert len(rest) == 2 and all(map(torch.equal, rest, whole[3:]))

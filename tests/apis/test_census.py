import csv
import runpy
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from mmvig.apis.census import BUILT, NOT_BUILT, REFUSED, Entry, check_old_backbone, find_configs, summary, take_census

ROOT = Path(__file__).parents[2]


def test_find_configs():
    found = find_configs()
    assert {library for library, _ in found} == {'mmdet', 'mmseg', 'mmpretrain'}
    assert ('mmdet', 'retinanet/retinanet_r50_fpn_1x_coco.py') in found
    assert not [path for _, path in found if '_base_' in path]


def test_a_wrong_width_would_be_seen(monkeypatch):
    cfg = Config(dict(model=dict(backbone=dict(type='ResNet', depth=50)), default_scope='mmdet'))
    check_old_backbone(cfg)
    monkeypatch.setitem(
        check_old_backbone.__globals__['old_pyramid'].__globals__['OLD_BACKBONES'],
        'ResNet',
        lambda b: ([256, 512, 1024, 1024], [4, 8, 16, 32]),
    )
    check_old_backbone.__globals__['_check_old_backbone'].cache_clear()
    with pytest.raises(AssertionError, match='gives widths .*2048.*, not .*1024, 1024'):
        check_old_backbone(cfg)


def test_summary():
    table = summary(
        [
            Entry('mmdet', 'a.py', 'ResNet', False, BUILT, ''),
            Entry('mmseg', 'b.py', 'ResNet', True, BUILT, ''),
            Entry('mmseg', 'c.py', 'ResNet', False, NOT_BUILT, 'no'),
            Entry('mmseg', 'd.py', 'ViT', False, REFUSED, 'no'),
        ]
    )
    columns = [list(column.cells) for column in table.columns]
    assert [column[0] for column in columns] == ['mmdet', '1', '0', '0', '0', '1']
    assert [column[3] for column in columns] == ['all', '1', '1', '1', '1', '4']


@pytest.mark.slow
def test_take_census():
    wanted = [
        ('mmdet', 'retinanet/retinanet_r50_fpn_1x_coco.py'),
        ('mmseg', 'pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'),
        ('mmpretrain', 'vision_transformer/vit-base-p16_64xb64_in1k-384px.py'),
    ]
    found = list(take_census(wanted, 'vigh-gla-tiny'))
    assert [(entry.library, entry.config) for entry in found] == wanted
    assert [(entry.outcome, entry.undilate) for entry in found] == [(BUILT, False), (BUILT, True), (REFUSED, False)]
    late = list(take_census(wanted[:1], 'vigh-gla-tiny', limit=1))
    assert late[0].outcome == NOT_BUILT and late[0].reason == 'took longer than 1 s'


@pytest.mark.slow
def test_tool(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, 'argv', ['tools/census.py', '--sample', '2', '--out', str(tmp_path / 'census.csv')])
    runpy.run_path(str(ROOT / 'tools/census.py'), run_name='__main__')
    with (tmp_path / 'census.csv').open() as file:
        header, *rows = csv.reader(file)
    assert header == list(Entry._fields) and len(rows) == 2
    assert 'refused' in capsys.readouterr().out

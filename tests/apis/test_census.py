import runpy
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hub import get_config

from mmvig.apis import census, swap_backbone
from mmvig.apis.census import (
    BROKEN,
    CONVERTED,
    NO_MODEL,
    REFUSED,
    WRONG,
    Entry,
    check_old_backbone,
    find_configs,
    measured_strides,
    read_entries,
    reasons,
    run_after_backbone,
    summary,
    take_census,
    write_entries,
)

ROOT = Path(__file__).parents[2]
RETINANET = ('mmdet', 'retinanet/retinanet_r50_fpn_1x_coco.py')
ENTRIES = [
    Entry('mmdet', 'a.py', 'ResNet', '4 8 16 32', False, CONVERTED, ''),
    Entry('mmdet', 'b.py', 'Net', '8 16 32', False, REFUSED, 'model.backbone is a Net, whose forward (self)'),
    Entry('mmdet', 'c.py', '', '', False, NO_MODEL, 'a part of other configs'),
    Entry('mmseg', 'd.py', 'ResNet', '4 8 8 8', True, CONVERTED, ''),
    Entry('mmseg', 'e.py', 'ViT', '16 16 16 16', False, REFUSED, 'a single stride'),
    Entry('mmpretrain', 'f.py', 'ResNet', '32', False, BROKEN, 'ImportError: no module (of that name)'),
    Entry('mmpretrain', 'g.py', 'ResNet', '64', False, WRONG, 'RuntimeError: shapes'),
]


@pytest.fixture
def retinanet() -> Config:
    return get_config('::'.join(RETINANET))


def test_find_configs():
    found = find_configs()
    assert {library for library, _ in found} == {'mmdet', 'mmseg', 'mmpretrain'}
    assert RETINANET in found
    assert not [path for _, path in found if '_base_' in path]


def test_a_wrong_idea_of_the_old_backbone_would_be_seen(monkeypatch, retinanet):
    check_old_backbone(retinanet)
    table = check_old_backbone.__globals__['old_pyramid'].__globals__['OLD_BACKBONES']
    monkeypatch.setitem(table, 'ResNet', lambda b: ([256, 512, 1024, 1024], [4, 8, 16, 32]))
    with pytest.raises(AssertionError, match=r'gives widths \(256, 512, 1024, 2048\), not .*1024, 1024'):
        check_old_backbone(retinanet)
    monkeypatch.setitem(table, 'ResNet', lambda b: ([256, 512, 1024, 2048], [4, 8, 16, 16]))
    with pytest.raises(AssertionError, match=r'gives strides \(4, 8, 16, 32\), not .*16, 16'):
        check_old_backbone(retinanet)


@pytest.mark.parametrize(
    ('address', 'changes'),
    [
        ('::'.join(RETINANET), {'model.neck.in_channels': [192, 384, 767]}),
        ('::'.join(RETINANET), {'model.backbone.out_indices': (0, 1, 2)}),
        ('mmseg::hrnet/fcn_hr18_4xb2-40k_cityscapes-512x1024.py', {'model.decode_head.in_channels': [96, 192, 384, 1]}),
        (
            'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
            {'model.auxiliary_head.in_channels': 768},
        ),
        ('mmpretrain::resnet/resnet50_8xb32_in1k.py', {'model.head.in_channels': 2048}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
@pytest.mark.filterwarnings('ignore:vigh-gla-.* does without')
def test_a_wrong_conversion_would_be_seen(address, changes):
    new = swap_backbone(get_config(address), 'vigh-gla-tiny')
    run_after_backbone(new)
    new.merge_from_dict(changes)
    with pytest.raises((RuntimeError, AssertionError)):
        run_after_backbone(new)


def test_measured_strides(retinanet):
    assert measured_strides(retinanet) == (4, 8, 16, 32)
    retinanet.model.backbone.update(dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1))
    assert measured_strides(retinanet) == (4, 8, 8, 8)
    retinanet.model.backbone = dict(type='mmpretrain.VisionTransformer')
    assert measured_strides(retinanet) == ()  # a vector
    retinanet.model.backbone = dict(type='NoSuchBackbone')
    assert measured_strides(retinanet) == ()


@pytest.mark.filterwarnings('ignore:vigh-gla-.* does without')
def test_a_neck_that_hands_other_widths_on_would_be_seen(retinanet):
    """It runs, but the heads behind it were made for the widths that it had."""
    new = swap_backbone(retinanet, 'vigh-gla-tiny')
    assert census._judge(new, retinanet) == (CONVERTED, '')
    new.model.neck.out_channels = 128
    widths = f'{[128] * 5} instead of {[256] * 5}'
    assert census._judge(new, retinanet) == (WRONG, f'heads get maps of widths {widths}')


@pytest.mark.filterwarnings('ignore:vigh-gla-.* does without')
def test_what_fails_unconverted_is_told_from_what_fails_converted(monkeypatch):
    """Of the same config, by a fault that only the converted one has, and by one that both have."""
    convert = census.swap_backbone

    def badly(cfg: Config, *args, **kwargs) -> Config:
        new = convert(cfg, *args, **kwargs)
        new.model.neck.in_channels = [1, 2, 3]
        return new

    with monkeypatch.context() as patch:
        patch.setattr(census, 'swap_backbone', badly)
        entry = census._examine(*RETINANET, 'vigh-gla-tiny')
    assert entry.outcome == WRONG and entry.reason == 'RuntimeError: Invalid channel dimensions'

    build = census.build
    monkeypatch.setattr(census, 'build', lambda cfg: build(cfg).no_such_part)
    entry = census._examine(*RETINANET, 'vigh-gla-tiny')
    assert entry.outcome == BROKEN and 'no_such_part' in entry.reason


def test_summary():
    columns = [list(column.cells) for column in summary(ENTRIES).columns]
    assert [column[0] for column in columns] == ['mmdet', '2', '0', '1', '50.0 %', '0', '0', '0', '2']
    assert [column[-1] for column in columns] == ['all', '3', '1', '1', '50.0 %', '3', '1', '1', '6']


def test_reasons():
    twice = Entry(
        'mmdet', 'h.py', 'Web', '8 16 32', False, REFUSED, 'model.backbone is a Web, whose forward; all of it'
    )
    rows = list(zip(*(column.cells for column in reasons([*ENTRIES, twice], most=3).columns)))
    assert rows == [
        ('2', REFUSED, 'yes', 'model.backbone whose forward'),
        ('1', NO_MODEL, 'no', 'a part of other configs'),
        ('1', REFUSED, 'no', 'a single stride'),
    ]
    (row,) = zip(*(column.cells for column in reasons(ENTRIES[-2:-1]).columns))
    assert row == ('1', BROKEN, 'yes', 'ImportError: no module')


def test_entries_are_read_as_they_were_written(tmp_path):
    path = tmp_path / 'census.csv'
    write_entries(path, ENTRIES)
    assert read_entries(path) == ENTRIES
    path.write_text(path.read_text() + 'mmseg,cut')
    assert read_entries(path) == ENTRIES
    path.write_text('library,config\n')
    with pytest.raises(ValueError, match='has columns library, config, and not those of a census'):
        read_entries(path)


@pytest.mark.slow
def test_take_census():
    wanted = [
        RETINANET,
        ('mmseg', 'pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'),
        ('mmpretrain', 'vision_transformer/vit-base-p16_64xb64_in1k-384px.py'),
        ('mmdet', 'common/lsj-200e_coco-detection.py'),
    ]
    found = list(take_census(wanted, 'vigh-gla-tiny'))
    assert [(entry.library, entry.config) for entry in found] == wanted
    outcomes = [(CONVERTED, False), (CONVERTED, True), (REFUSED, False), (NO_MODEL, False)]
    assert [(entry.outcome, entry.undilate) for entry in found] == outcomes
    assert [entry.strides for entry in found] == ['4 8 16 32', '4 8 8 8', '', '']
    late = list(take_census(wanted[:1], 'vigh-gla-tiny', limit=0.05))
    assert late[0].outcome == WRONG and late[0].reason == 'took longer than 0.05 s'


@pytest.mark.slow
def test_tool_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    out = tmp_path / 'census.csv'
    write_entries(out, ENTRIES[:1])
    for _ in range(2):
        monkeypatch.setattr(sys, 'argv', ['tools/census.py', '--sample', '2', '--out', str(out)])
        runpy.run_path(str(ROOT / 'tools/census.py'), run_name='__main__')
        assert len(read_entries(out)) == 3 and ENTRIES[0] in read_entries(out)
    first, second = capsys.readouterr().out.split('library')[:2]
    assert '/2' in first and 'share' in second
    out.write_text('library,config\n')
    with pytest.raises(SystemExit, match='--out: .*name another file'):
        runpy.run_path(str(ROOT / 'tools/census.py'), run_name='__main__')

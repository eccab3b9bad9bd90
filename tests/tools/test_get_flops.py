import re

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmvig.apis.flops import FORMS, bigla_flops, config_flops


@pytest.mark.parametrize(
    ('library', 'parts'),
    [
        ('mmdet', ['backbone', 'neck', 'rpn_head', 'roi_head']),
        ('mmseg', ['backbone', 'decode_head']),
        ('mmpretrain', ['backbone', 'head']),
    ],
)
def test_table(run_tool, library_file, library, parts):
    file = library_file(library)
    status, said = run_tool('get_flops.py', file, '--shape', 64, 96)
    assert status == 0 and 'one image of 64 x 96' in said
    rows = {row[0]: row for row in re.findall(r'│ (\S+(?: \S+)?) +│ (\w*) +│ +([\d.]+) │ +([\d.]+) │', said)}
    assert list(rows) == [*parts, 'whole model']
    cfg = Config.fromfile(file)
    init_default_scope(library)
    params = sum(parameter.numel() for parameter in MODELS.build(cfg.model).parameters())
    assert rows['whole model'][2] == f'{params / 1e6:.2f}'
    assert sum(float(rows[part][3]) for part in parts) == pytest.approx(float(rows['whole model'][3]), abs=0.03)
    assert float(rows['backbone'][3]) > 0


def test_heads_work_on_as_many_boxes_as_the_config_allows(library_file):
    counts, shape = config_flops(Config.fromfile(library_file('mmdet')), (128, 128))
    box = 16 * 7 * 7 * 16 + 16 * 16 + 16 * (11 + 4 * 10)
    mask = 16 * 16 * 9 * 14 * 14 + 16 * 16 * 28 * 28 + 16 * 10 * 28 * 28
    (roi_head,) = (part for part in counts.parts if part.name == 'roi_head')
    assert shape == (128, 128) and roi_head.flops == 20 * box + 5 * mask


def test_address(run_tool):
    status, said = run_tool('get_flops.py', 'mmpretrain::resnet/resnet18_8xb32_in1k.py')
    assert status == 0 and re.search(r'whole model +│ +│ +11.69 │ +1.81 │', said)  # as published


def test_square_and_options(run_tool, library_file):
    file = library_file('mmpretrain')
    _, default = run_tool('get_flops.py', file)
    _, square = run_tool('get_flops.py', file, '--shape', 224)
    _, deeper = run_tool('get_flops.py', file, '--cfg-options', 'model.backbone.depth=34')
    assert default == square and 'one image of 224 x 224' in square and deeper != default


def test_all(run_tool):
    status, said = run_tool('get_flops.py', '--all')
    assert status == 0
    heads, rule, *rows = [line.strip('| ').split(' | ') for line in said.splitlines()]
    assert heads == ['backbone', 'parameters (M)', 'GFLOPs at 224 x 224', 'GFLOPs at 800 x 1344'] and len(rule) == 4
    assert rows == [
        ['vig-gla-tiny', '5.6', '1.2', '25.0'],
        ['vig-gla-small', '22.2', '4.5', '96.0'],
        ['vig-gla-base', '88.3', '17.5', '376.0'],
        ['vigh-gla-tiny', '27.8', '4.5', '96.3'],
        ['vigh-gla-small', '49.3', '8.8', '187.5'],
        ['vigh-gla-base', '87.9', '15.6', '333.3'],
    ]


def test_form(run_tool, tmp_path):
    file = tmp_path / 'vigh.py'
    backbone = dict(type='mmvig.ViGH', arch='tiny', out_indices=(0,))
    model = dict(type='ImageClassifier', backbone=backbone, neck=dict(type='GlobalAveragePooling'))
    file.write_text(f"default_scope = 'mmpretrain'\nmodel = {model}\n")
    for form in FORMS:
        status, said = run_tool('get_flops.py', file, '--shape', 256, '--form', form)
        expected = 2 * bigla_flops((1, 64 * 64, 3, 16), (1, 64 * 64, 3, 32), form)  # two blocks
        assert status == 0 and f'Of these, {expected / 1e9:.3f} GFLOPs are those of bigla ({form}).' in said


@pytest.mark.parametrize(
    'arguments',
    [[], ['--all', '--shape', '64'], ['config.py', '--shape', '1', '2', '3'], ['config.py', '--shape', '0']],
)
def test_wrong_arguments(run_tool, arguments):
    assert run_tool('get_flops.py', *arguments)[0] == 2


def test_config_without_library(run_tool, toy_file):
    assert 'default_scope must be one of' in run_tool('get_flops.py', toy_file)[0]
    assert 'there is no file gone.py' in run_tool('get_flops.py', 'gone.py')[0]

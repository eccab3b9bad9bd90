import re

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope


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


def test_square_and_options(run_tool, library_file):
    file = library_file('mmpretrain')
    _, default = run_tool('get_flops.py', file)
    _, square = run_tool('get_flops.py', file, '--shape', 224)
    _, deeper = run_tool('get_flops.py', file, '--cfg-options', 'model.backbone.depth=34')
    assert default == square and 'one image of 224 x 224' in square and deeper != default


def test_all(run_tool):
    status, said = run_tool('get_flops.py', '--all', '--form', 'chunked')
    assert status == 0
    heads, rule, *rows = [line.strip('| ').split(' | ') for line in said.splitlines()]
    assert heads == ['backbone', 'parameters (M)', 'GFLOPs at 224 x 224', 'GFLOPs at 800 x 1344'] and len(rule) == 4
    assert len(rows) == 6 and ['vigh-gla-tiny', '27.8', '4.7', '100.2'] in rows


@pytest.mark.parametrize(
    'arguments',
    [[], ['--all', '--shape', '64'], ['config.py', '--shape', '1', '2', '3'], ['config.py', '--shape', '0']],
)
def test_wrong_arguments(run_tool, arguments):
    assert run_tool('get_flops.py', *arguments)[0] == 2


def test_config_without_library(run_tool, toy_file):
    assert 'default_scope must be one of' in run_tool('get_flops.py', toy_file)[0]
    assert 'there is no file gone.py' in run_tool('get_flops.py', 'gone.py')[0]

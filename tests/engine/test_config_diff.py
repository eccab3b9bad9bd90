import pytest
from mmengine.config import Config

from mmvig.engine.config_diff import compare, parse

SETTINGS = dict(
    model=dict(type='A', depths=[1, 2], ratio=-0.5, norm=None, classes=('x', "it's"), limits=(float('inf'),)),
    custom_keys={'backbone.norm': dict(decay_mult=0.0), 'head': dict(lr_mult=2)},
    hooks=[dict(type='B', interval=1), dict(type='C')],
    empty=[],
    nothing={},
)


def test_parse_reads_what_mmengine_writes():
    read = parse(Config(SETTINGS).pretty_text)
    assert read['model'] == dict(type='A', depths=[1, 2], ratio=-0.5, norm=None, classes=['x', "it's"], limits=['inf'])
    assert read['custom_keys'] == SETTINGS['custom_keys']
    assert read['hooks'] == SETTINGS['hooks'] and read['empty'] == [] and read['nothing'] == {}


def test_parse_executes_nothing(tmp_path):
    marker = tmp_path / 'executed'
    text = f'a = open({str(marker)!r}, "w")\nb = __import__("os")\nimport os\nc = dict(d=exit())\n'
    assert parse(text)['c'] == dict(d='exit()')
    assert not marker.exists()


def test_parse_of_something_else():
    with pytest.raises(ValueError, match='no dump of a config'):
        parse('model = <class "A">')


def test_compare():
    changed = Config(SETTINGS).copy()
    assert compare(parse(Config(SETTINGS).pretty_text), changed) == {}
    changed = Config({**SETTINGS, 'hooks': [dict(type='B', interval=2)], 'new': 1})
    changed.model = dict(SETTINGS['model'], depths=[1, 3], norm=dict(type='LN'))
    assert compare(parse(Config(SETTINGS).pretty_text), changed) == {
        'hooks.0.interval': ('1', '2'),
        'hooks.1.type': ("'C'", '(not set)'),
        'model.depths.1': ('2', '3'),
        'model.norm': ('None', '(not set)'),
        'model.norm.type': ('(not set)', "'LN'"),
        'new': ('(not set)', '1'),
    }

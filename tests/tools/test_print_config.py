import pytest
from mmengine.config import Config

RETINANET = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'


@pytest.fixture
def print_config(run_tool):
    """Runs tools/print_config.py: (exit status or message, standard output)."""
    return lambda *arguments: run_tool('print_config.py', *arguments)


def test_an_installed_config_with_another_backbone(print_config):
    """The output is a config; options are merged into the one with the new backbone."""
    status, said = print_config(
        RETINANET,
        '--backbone',
        'vigh-gla-tiny',
        '--cfg-options',
        'model.backbone.arch=small',
        'optim_wrapper.optimizer.lr=3e-4',
    )
    assert status == 0
    comments = [line for line in said.splitlines() if line.startswith('#')]
    assert "#   model.backbone.type: 'ResNet' -> 'mmvig.ViGH'" in comments
    assert '#   model.neck.in_channels.0: 256 -> 192' in comments
    assert comments[-1] == '# Note: vigh-gla-tiny does without model.backbone.frozen_stages.'
    cfg = Config.fromstring(said, '.py')
    assert cfg.model.backbone.arch == 'small' and cfg.optim_wrapper.optimizer.lr == 3e-4
    assert cfg.work_dir.endswith('retinanet_r50_fpn_1x_coco_vigh-gla-tiny')


def test_a_config_file(print_config, tmp_path):
    file = tmp_path / 'some.py'
    file.write_text("model = dict(type='A')\n")
    assert print_config(file) == (0, "launcher = 'none'\nmodel = dict(type='A')\nwork_dir = 'work_dirs/some'\n\n")


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['mmdet::retinanet/gone.py'], 'config: mmdet has no config retinanet/gone.py'),
        (['nobody::some/config.py'], 'config: nobody has no config some/config.py'),
        ([RETINANET, '--backbone', 'resnet50'], "--backbone: backbone='resnet50' is unknown; use one of vigh-gla-tiny"),
        ([RETINANET, '--undilate'], '--undilate: this is about exchanging the backbone; add --backbone.'),
        (
            ['mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py', '--backbone', 'vigh-gla-tiny'],
            '--backbone: model.backbone is dilated',
        ),
    ],
)
def test_what_cannot_be(print_config, arguments, message):
    status, said = print_config(*arguments)
    assert status.startswith(message) and said == ''

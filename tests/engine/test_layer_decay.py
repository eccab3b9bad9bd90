import pytest
import torch
from mmengine.hub import get_config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import mmvig  # noqa: F401  makes today's stack run OpenMMLab
from mmvig.engine.layer_decay import find_backbones

LR, DECAY, RATE = 0.1, 0.05, 0.5
VIG = dict(type='mmvig.ViG', arch=dict(embed_dims=16, depth=3, num_heads=2, act=True, drop_path_rate=0.0))
VIGH = dict(
    type='mmvig.ViGH',
    arch=dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), drop_path_rate=0.0),
)
WIDTHS = [8, 16, 24, 32]


def classifier(backbone: dict, width: int) -> dict:
    head = dict(type='LinearClsHead', num_classes=5, in_channels=width)
    return dict(type='ImageClassifier', backbone=backbone, neck=dict(type='GlobalAveragePooling'), head=head)


def detector() -> dict:
    model = get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py').model
    model.backbone = VIGH
    model.neck.update(in_channels=WIDTHS, out_channels=8)
    model.bbox_head.update(in_channels=8, feat_channels=8, stacked_convs=1)
    return model


def segmentor() -> dict:
    norm = dict(type='BN')
    head = dict(type='FCNHead', in_channels=32, in_index=3, channels=8, num_classes=5, num_convs=1, norm_cfg=norm)
    return dict(type='EncoderDecoder', backbone=VIGH, decode_head=head, train_cfg={}, test_cfg=dict(mode='whole'))


def teacher_and_student() -> dict:
    return dict(
        type='SemiBaseDetector',
        detector=detector(),
        semi_train_cfg=dict(freeze_teacher=True),
        semi_test_cfg=dict(predict_on='teacher'),
    )


def optimize(model: nn.Module, **paramwise_cfg) -> OptimWrapper:
    cfg = dict(
        type='OptimWrapper',
        constructor='mmvig.LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY),
        paramwise_cfg=paramwise_cfg,
    )
    return build_optim_wrapper(model, cfg)


def settings(model: nn.Module, **paramwise_cfg) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each trained parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = optimize(model, **paramwise_cfg).optimizer.param_groups
    return {names[p]: (group['lr'], group['weight_decay']) for group in groups for p in group['params']}


def build(library: str, cfg: dict) -> nn.Module:
    init_default_scope(library)
    return MODELS.build(cfg)


MODELS_OF_EACH_LIBRARY = [
    pytest.param('mmpretrain', classifier(VIG, 16), 'backbone.', id='classifier-vig'),
    pytest.param('mmpretrain', classifier(VIGH | dict(out_indices=3), 32), 'backbone.', id='classifier-vigh'),
    pytest.param('mmdet', detector, 'backbone.', id='detector'),
    pytest.param('mmdet', teacher_and_student, 'student.backbone.', id='teacher-student'),
    pytest.param('mmseg', segmentor, 'backbone.', id='segmentor'),
]


@pytest.mark.parametrize(('library', 'cfg', 'path'), MODELS_OF_EACH_LIBRARY)
def test_rates_and_decays(library, cfg, path):
    model = build(library, cfg() if callable(cfg) else cfg)
    given = settings(model, layer_decay_rate=RATE)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert given.keys() == trained.keys()
    backbone = find_backbones(model)[path]
    for name, (lr, decay) in given.items():
        expected = LR
        if name.startswith(path):
            depth, num_layers = backbone.get_layer_depth(name, path)
            expected = LR * RATE ** (num_layers - 1 - depth)
        assert lr == pytest.approx(expected), name
        assert decay == (DECAY if trained[name].dim() > 1 else 0), name
    assert any(not name.startswith(path) for name in given)


def test_the_numbers_of_a_backbone_of_three_blocks():
    """Stem and position embedding, three blocks, the last norm: five layers."""
    rates = settings(build('mmpretrain', classifier(VIG, 16)), layer_decay_rate=RATE)
    for layer, name in enumerate(
        ('stem.0.conv.weight', 'blocks.0.mixer.qkv.weight', 'blocks.1.mlp.fc1.weight', 'blocks.2.norm1.weight', 'norm2')
    ):
        lrs = {lr for full, (lr, _) in rates.items() if full.startswith(f'backbone.{name}')}
        assert lrs == {LR * RATE ** (4 - layer)}
    assert rates['backbone.pos_embed'] == (LR / 16, DECAY)  # decays, as in the published code
    assert rates['head.fc.weight'] == (LR, DECAY) and rates['head.fc.bias'] == (LR, 0)


def test_mmengine_multipliers_multiply_with_the_decay():
    model = build('mmpretrain', classifier(VIG, 16))
    custom_keys = dict(backbone=dict(lr_mult=0.1), pos_embed=dict(decay_mult=0.0), head=dict(decay_mult=1.0))
    rates = settings(model, layer_decay_rate=RATE, custom_keys=custom_keys)
    assert rates['backbone.blocks.2.mlp.fc1.weight'] == (pytest.approx(LR * 0.1 * RATE), DECAY)
    assert rates['backbone.blocks.2.norm1.weight'] == (pytest.approx(LR * 0.1 * RATE), 0)  # vectors stay free of decay
    assert rates['backbone.pos_embed'][1] == 0
    assert rates['head.fc.bias'] == (LR, DECAY)  # the config said so
    assert settings(model, layer_decay_rate=1, bias_decay_mult=0.5)['head.fc.bias'] == (LR, DECAY / 2)


def test_frozen_parameters_are_left_out():
    model = build('mmpretrain', classifier(VIG | dict(frozen_stages=1), 16))
    rates = settings(model, layer_decay_rate=RATE)
    assert not [name for name in rates if name.startswith(('backbone.stem', 'backbone.pos_embed', 'backbone.blocks.0'))]
    assert rates['backbone.blocks.1.mlp.fc1.weight'][0] == LR * RATE**2


def test_one_step_moves_each_layer_by_its_rate():
    """Adam's first step is as long as the learning rate, whatever the gradient."""
    model = build('mmpretrain', classifier(VIG, 16))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapper = optimize(model, layer_decay_rate=RATE)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    wrapper.step()
    for name, steps in (('backbone.stem.0.norm.bias', 4), ('backbone.norm2.weight', 0), ('head.fc.bias', 0)):
        moved = (before[name] - dict(model.named_parameters())[name]).mean().item()
        assert moved == pytest.approx(LR * RATE**steps, rel=1e-3)


def test_an_optimizer_without_weight_decay():
    model = build('mmpretrain', classifier(VIG, 16))
    cfg = dict(
        constructor='mmvig.LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='SGD', lr=LR),
        paramwise_cfg=dict(layer_decay_rate=RATE, custom_keys=dict(backbone=dict(lr_mult=0.1))),
    )
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    assert min(group['lr'] for group in groups) == pytest.approx(LR * 0.1 * RATE**4)
    assert {group['weight_decay'] for group in groups} == {0}


@pytest.mark.parametrize('rate', [0, -0.5, 1.5, '0.9', None])
def test_rate_out_of_range(rate):
    with pytest.raises(ValueError, match=f'layer_decay_rate={rate!r} must be a number above 0 and at most 1'):
        optimize(nn.Linear(2, 2), layer_decay_rate=rate)


def test_models_that_cannot():
    with pytest.raises(ValueError, match=r'Sequential has none, only \[.0.\]'):
        optimize(nn.Sequential(nn.Linear(2, 2)), layer_decay_rate=0.9)
    model = nn.ModuleDict(dict(backbone=nn.Linear(2, 2)))
    with pytest.raises(TypeError, match='backbone is a Linear, which has none'):
        optimize(model, layer_decay_rate=0.9)
    with pytest.raises(ValueError, match='needs an lr'):
        build_optim_wrapper(
            model,
            dict(
                constructor='mmvig.LayerDecayOptimWrapperConstructor',
                optimizer=dict(type='AdamW'),
                paramwise_cfg=dict(layer_decay_rate=0.9),
            ),
        )

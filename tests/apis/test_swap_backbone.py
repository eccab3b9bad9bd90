from copy import deepcopy

import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope

from mmvig.apis import swap_backbone
from mmvig.apis.census import check_old_backbone, run_after_backbone

pytestmark = pytest.mark.filterwarnings('ignore:vigh-gla-.* does without')

TINY = [96, 192, 384, 768]
RETINANET = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
PSPNET = 'mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'
DEEPLAB = 'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py'
MASK2FORMER = 'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py'
CONVNEXT = 'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py'
SOFT_TEACHER = 'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py'
RESNET = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'


def get(cfg: Config, key: str):
    for part in key.split('.'):
        cfg = cfg[int(part)] if isinstance(cfg, (list, tuple)) else cfg[part]
    return cfg


@pytest.mark.parametrize(
    ('address', 'widths', 'stages'),
    [
        (RETINANET, {'model.neck.in_channels': TINY[1:], 'model.neck.start_level': 0}, (1, 2, 3)),
        ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', {'model.neck.in_channels': TINY}, None),
        ('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', {'model.neck.in_channels': TINY}, None),
        ('mmdet::cascade_rcnn/cascade-mask-rcnn_x101-64x4d_fpn_1x_coco.py', {'model.neck.in_channels': TINY}, None),
        ('mmdet::libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py', {'model.neck.0.in_channels': TINY}, None),
        ('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', {'model.neck.in_channels': TINY[1:]}, (1, 2, 3)),
        ('mmdet::yolof/yolof_r50-c5_8xb8-1x_coco.py', {'model.neck.in_channels': 768}, (3,)),
        ('mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py', {'model.neck.in_channels': 768}, (3,)),
        ('mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', {'model.neck.in_channels': TINY[1:]}, (1, 2, 3)),
        (MASK2FORMER, {'model.panoptic_head.in_channels': TINY}, None),
        (SOFT_TEACHER, {'model.detector.neck.in_channels': TINY}, None),
        (
            'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py',
            {'model.neck.in_channels': TINY},
            None,
        ),
        (
            'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
            {'model.decode_head.in_channels': TINY, 'model.auxiliary_head.in_channels': 384},
            None,
        ),
        (
            'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
            {'model.decode_head.in_channels': TINY},
            None,
        ),
        ('mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py', {'model.neck.in_channels': TINY}, None),
        (
            'mmseg::hrnet/fcn_hr18_4xb2-40k_cityscapes-512x1024.py',
            {'model.decode_head.in_channels': TINY, 'model.decode_head.channels': 270},
            None,
        ),
        (
            'mmseg::fastfcn/fastfcn_r50-d32_jpu_psp_4xb2-80k_cityscapes-512x1024.py',
            {
                'model.neck.in_channels': (192, 384, 768),
                'model.decode_head.in_channels': 2048,
                'model.auxiliary_head.in_channels': 384,
            },
            (1, 2, 3),
        ),
        (RESNET, {'model.head.in_channels': 768, 'model.neck.type': 'GlobalAveragePooling'}, (3,)),
        (
            'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py',
            {'model.head.in_channels': 768, 'model.neck.type': 'GlobalAveragePooling'},
            (3,),
        ),
        ('mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py', {'model.head.in_channels': 768}, (3,)),
        ('mmpretrain::twins/twins-svt-small_8xb128_in1k.py', {'model.head.in_channels': 768}, (3,)),
        ('mmpretrain::davit/davit-tiny_4xb256_in1k.py', {'model.head.in_channels': 768}, (3,)),
        ('mmpretrain::edgenext/edgenext-xxsmall_8xb256_in1k.py', {'model.head.in_channels': 768}, (3,)),
        ('mmpretrain::hornet/hornet-tiny_8xb128_in1k.py', {'model.head.in_channels': 768}, (3,)),
        ('mmpretrain::riformer/riformer-s12_8xb128_in1k.py', {'model.head.in_channels': 768}, (3,)),
        ('mmpretrain::efficientnet/efficientnet-b0_8xb32_in1k.py', {'model.head.in_channels': 768}, (3,)),
        (
            'mmpretrain::tinyvit/tinyvit-21m-distill_8xb256_in1k-384px.py',
            {'model.head.in_channels': 768, 'model.neck.type': 'GlobalAveragePooling'},
            (3,),
        ),
        ('mmpretrain::resnet/resnet18_8xb16_cifar10.py', {'model.head.in_channels': 192}, (1,)),
        ('mmdet::yolox/yolox_s_8xb8-300e_coco.py', {'model.neck.in_channels': TINY[1:]}, (1, 2, 3)),
        (
            'mmpretrain::mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k.py',
            {'model.neck.in_channels': 768, 'model.head.type': 'ContrastiveHead'},
            (3,),
        ),
    ],
)
def test_conversion(address, widths, stages):
    """The old widths were known, and what follows the backbone takes the new ones."""
    cfg = get_config(address)
    new = swap_backbone(cfg, 'vigh-gla-tiny')
    backbone = (new.model.get('detector') or new.model).backbone
    assert backbone.type == 'mmvig.ViGH' and backbone.arch == 'tiny' and backbone.get('out_indices') == stages
    assert backbone.init_cfg.checkpoint.endswith('vig_h_t_82p8acc.pth')
    assert {key: get(new, key) for key in widths} == widths
    check_old_backbone(cfg)
    run_after_backbone(new)


@pytest.mark.parametrize(
    ('address', 'reason'),
    [
        ('mmdet::faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco.py', r'shared_head .*C4.* use the config with an FPN'),
        ('mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py', r'dilated: .*\(16,\)'),
        ('mmdet::detectors/detectors_htc-r50_1x_coco.py', 'output_img: the neck feeds the image'),
        ('mmdet::ssd/ssd300_coco.py', 'is an SSDNeck, which hands maps of the backbone on'),
        ('mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py', r'\[1024, 512, 256\] is not what the backbone gives it'),
        ('mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py', 'PIDNet, which gives something else in training'),
        (
            'mmseg::bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py',
            r'gives no maps of ascending strides among \(4, 8, 16, 32\)',
        ),
        (
            'mmpretrain::simmim/simmim_swin-base-w6_8xb256-amp-coslr-100e_in1k-192px.py',
            'forward takes more than images',
        ),
        ('mmpretrain::repmlp/repmlp-base_8xb64_in1k.py', 'is not in the table and cannot be measured'),
        ('mmdet::rtmdet/rtmdet_l_swin_b_p6_4xb16-100e_coco.py', r'strides \(8, 16, 32, 64\), and ViG-H none above 32'),
        (PSPNET, r'dilated: .*\(4, 8, 8, 8\).*--undilate'),
        ('mmseg::vit/vit_vit-b16_mln_upernet_8xb2-80k_ade20k-512x512.py', 'a single stride.*mmvig.ViG'),
        ('mmseg::swin/swin-tiny-patch4-window7_upernet_1xb8-20k_levir-256x256.py', 'in_channels=6'),
        ('mmpretrain::vision_transformer/vit-base-p16_64xb64_in1k-384px.py', 'a single stride'),
        ('mmpretrain::glip/glip-t_headless.py', 'default_scope is None'),
    ],
)
def test_refusal(address, reason):
    with pytest.raises(ValueError, match=reason):
        swap_backbone(get_config(address), 'vigh-gla-tiny')


def test_unknown_name():
    with pytest.raises(ValueError, match="'vigh-gla-huge' is unknown; use one of vigh-gla-tiny, vigh-gla-small, vigh-"):
        swap_backbone(get_config(RETINANET), 'vigh-gla-huge')


@pytest.mark.parametrize(
    ('key', 'value', 'reason'),
    [
        (
            'model.neck.in_channels',
            [256, 512, 1024, 1024],
            r'neck.in_channels=\[.*1024, 1024\] .* \[256, 512, 10',
        ),
        ('model.neck.in_channels', 2048, 'is one number, and the backbone gives 4 maps'),
        ('model.backbone.base_channels', 32, 'model.neck.in_channels=.*not what the backbone gives it'),
        ('model.backbone.out_indices', (0, 2, 1, 3), 'is not ascending'),
        ('model.data_preprocessor.mean', [0.0] * 6, 'mean has 6 values'),
        ('model.data_preprocessor', None, 'no data_preprocessor has a mean'),
        ('model.backbone.type', 'NoSuchNet', 'is a NoSuchNet, which is not registered'),
        ('model.backbone.type', 'timm.resnet', 'is a timm.resnet, of another library'),
        ('model.teacher_config', 'teacher.py', None),
        ('train_dataloader.dataset.pipeline', [dict(type='Normalize')], 'Normalize of its own'),
        ('default_scope', 'mmpose', "default_scope is 'mmpose'"),
    ],
)
def test_what_is_unlike_its_kind_is_refused(key, value, reason):
    cfg = get_config(RETINANET)
    cfg.merge_from_dict({key: value})
    if reason is None:
        swap_backbone(cfg, 'vigh-gla-tiny')  # with the normalisation of its student
        cfg.model.data_preprocessor.std = [1.0, 1.0, 1.0]
        reason = 'model.teacher_config sees the same images'
    with pytest.raises(ValueError, match=reason):
        swap_backbone(cfg, 'vigh-gla-tiny')


def test_the_given_config_stays_as_it_is():
    cfg = get_config(SOFT_TEACHER)
    before = deepcopy(cfg.to_dict())
    swap_backbone(cfg, 'vigh-gla-base')
    assert cfg.to_dict() == before


def test_arch_and_weights():
    new = swap_backbone(get_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'), 'vigh-gla-base')
    assert new.model.neck.in_channels == [128, 256, 512, 1024]
    assert new.model.backbone.init_cfg.checkpoint.endswith('vig_h_b_84p2acc.pth')
    new = swap_backbone(get_config(RETINANET), 'vigh-gla-small', pretrained=False)
    assert new.model.backbone == dict(type='mmvig.ViGH', arch='small', out_indices=(1, 2, 3))


def test_weights_of_the_old_model_are_not_loaded():
    cfg = get_config(RETINANET)
    cfg.load_from = 'https://example.com/retinanet.pth'
    cfg.model.init_cfg = dict(type='Pretrained', checkpoint='retinanet.pth')
    with pytest.warns(UserWarning, match='load_from, model.init_cfg'):
        new = swap_backbone(cfg, 'vigh-gla-tiny')
    assert new.load_from is None and 'init_cfg' not in new.model


def test_what_is_dropped_is_said():
    cfg = get_config('mmdet::dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py')
    with pytest.warns(UserWarning, match='does without model.backbone.dcn, model.backbone.frozen_stages'):
        assert 'dcn' not in swap_backbone(cfg, 'vigh-gla-tiny').model.backbone


@pytest.mark.parametrize(
    ('address', 'place', 'order'),
    [
        ('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', 'model.data_preprocessor', 'bgr_to_rgb'),
        (SOFT_TEACHER, 'model.data_preprocessor.data_preprocessor', 'bgr_to_rgb'),
        (SOFT_TEACHER, 'model.detector.data_preprocessor', 'bgr_to_rgb'),
        ('mmpretrain::regnet/regnetx-400mf_8xb128_in1k.py', 'data_preprocessor', 'to_rgb'),
        ('mmdet::yolox/yolox_s_8xb8-300e_coco.py', 'model.data_preprocessor', 'bgr_to_rgb'),  # which takes raw pixels
    ],
)
def test_images_are_normalised_as_imagenet(address, place, order):
    cfg = get_config(address)
    assert not get(cfg, place).get(order)
    part = get(swap_backbone(cfg, 'vigh-gla-tiny'), place)
    assert (part.mean, part.std, part[order]) == ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], True)


def test_sgd_becomes_adamw_at_the_same_length():
    cfg = get_config(RETINANET)
    new = swap_backbone(cfg, 'vigh-gla-tiny')
    assert new.optim_wrapper.optimizer == dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
    assert new.optim_wrapper.paramwise_cfg == dict(flat_decay_mult=0.0, bias_decay_mult=0.0, norm_decay_mult=0.0)
    assert new.param_scheduler == cfg.param_scheduler and new.train_cfg == cfg.train_cfg
    assert swap_backbone(cfg, 'vigh-gla-tiny', keep_optimizer=True).optim_wrapper == cfg.optim_wrapper


def test_the_end_of_a_schedule_scales_with_its_beginning():
    cfg = get_config(PSPNET)
    new = swap_backbone(cfg, 'vigh-gla-tiny', undilate=True)
    assert (cfg.optim_wrapper.optimizer.lr, cfg.param_scheduler[0].eta_min) == (0.01, 1e-4)
    assert new.optim_wrapper.optimizer.lr == 6e-5 and new.param_scheduler[0].eta_min == pytest.approx(6e-7)


def test_learning_rate_of_classifiers_scales_with_the_batch():
    assert swap_backbone(get_config(RESNET), 'vigh-gla-tiny').optim_wrapper.optimizer.lr == pytest.approx(4e-4)


def test_adamw_keeps_its_rates():
    cfg = get_config(MASK2FORMER)
    new = swap_backbone(cfg, 'vigh-gla-tiny').optim_wrapper
    assert new.optimizer == cfg.optim_wrapper.optimizer and new.clip_grad == cfg.optim_wrapper.clip_grad
    assert new.constructor == 'mmvig.LayerDecayOptimWrapperConstructor'
    assert new.paramwise_cfg.layer_decay_rate == 1.0
    assert set(new.paramwise_cfg.custom_keys) == {'backbone', 'query_embed', 'query_feat', 'level_embed'}


def test_layer_decay_of_another_backbone_is_dropped():
    cfg = get_config(CONVNEXT)
    with pytest.warns(UserWarning, match='layer-wise learning rates'):
        wrapper = swap_backbone(cfg, 'vigh-gla-tiny').optim_wrapper
    assert 'constructor' not in wrapper and wrapper.type == 'AmpOptimWrapper' and wrapper.optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ('address', 'stages', 'settings'),
    [
        (PSPNET, (2, 3), {'decode_head': (768, 1), 'auxiliary_head': (384, 0)}),
        (DEEPLAB, (0, 2, 3), {'decode_head': (768, 2), 'auxiliary_head': (384, 1)}),
    ],
)
def test_undilate(address, stages, settings):
    """Only the maps that heads read are given, and in_index follows."""
    new = swap_backbone(get_config(address), 'vigh-gla-tiny', undilate=True)
    assert new.model.backbone.out_indices == stages
    assert {name: (new.model[name].in_channels, new.model[name].in_index) for name in settings} == settings
    assert new.model.decode_head.get('c1_in_channels', 96) == 96


@pytest.mark.parametrize(
    ('address', 'head'),
    [
        ('mmseg::ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py', 'model.decode_head.1 is a OCRHead'),
        ('mmseg::psanet/psanet_r50-d8_4xb2-40k_cityscapes-512x1024.py', 'model.decode_head is a PSAHead'),
    ],
)
def test_heads_that_rely_on_dilated_maps(address, head):
    with pytest.raises(ValueError, match=f'undilate: {head}, which relies on the size'):
        swap_backbone(get_config(address), 'vigh-gla-tiny', undilate=True)


@pytest.mark.parametrize(('address', 'undilate'), [(RETINANET, False), (DEEPLAB, True), (RESNET, False)])
def test_every_parameter_of_the_backbone_is_trained(address, undilate):
    """On a real image; distributed training does not take a parameter without a gradient."""
    new = swap_backbone(get_config(address), 'vigh-gla-tiny', pretrained=False, undilate=undilate)
    new.model.backbone.arch = dict(embed_dims=(96, 192, 384, 768), depths=(1, 1, 1, 1), num_heads=(3, 6, 12, 24))
    new.model.backbone.arch.drop_path_rate = 0.0
    with DefaultScope.overwrite_default_scope(new.default_scope):
        model = MODELS.build({'data_preprocessor': new.get('data_preprocessor'), **new.model})
    model.backbone.train()
    out = model.eval()(torch.rand(1, 3, 96, 64))
    leaves = [out] if isinstance(out, torch.Tensor) else [x for maps in out for x in maps]
    if address == DEEPLAB:
        leaves.append(model.auxiliary_head(model.extract_feat(torch.rand(1, 3, 96, 64))))
    sum(x.float().square().sum() for x in leaves).backward()
    assert [name for name, p in model.backbone.named_parameters() if p.grad is None] == []

"""ViG-H in place of the backbone of any config whose backbone gives maps of strides among 4, 8, 16 and 32."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib import import_module
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

import torch
from mmengine.config import Config

from mmvig.apis.backbones import VIGH
from mmvig.apis.measure import SIDE, measure
from mmvig.apis.zoo import find_model
from mmvig.models.backbones import ViGH

__all__ = ['swap_backbone']

STRIDES = (4, 8, 16, 32)  # of ViG-H's stages
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # of ImageNet, RGB
# Learning rate and weight decay of the recipes in configs/; mmpretrain's at a batch of 512, by which it scales.
RECIPES = dict(mmdet=(1e-4, 0.05), mmseg=(6e-5, 0.01))
CLASSIFIER_LR = dict(tiny=8e-4, small=5e-4, base=5e-4)
# Parameters by whose names configs free them from decay, or which the old backbone alone has: vectors have none anyway.
OLD_PARAMETERS = (
    'absolute_pos_embed',
    'relative_position_bias_table',
    'pos_block',
    'downsample.1',
    'norm',
    'bn',
    'bias',
)
# Settings of the old backbone that stand for a decision about the model, rather than for its own architecture.
REPORTED = ('dcn', 'plugins', 'sac', 'dilations', 'frozen_stages')
POOLING = ('GlobalAveragePooling', 'GeneralizedMeanPooling')  # hand the backbone's widths on
SINGLE_STRIDE = (
    *('VisionTransformer', 'DistilledVisionTransformer', 'DeiT3', 'BEiT', 'BEiTViT', 'MAE', 'MAEViT', 'ViTEVA02'),
    *('ViTSAM', 'MoCoV3ViT', 'XCiT', 'T2T_ViT', 'TNT', 'RevVisionTransformer', 'MlpMixer', 'ConvMixer', 'Vig'),
)


class Pyramid(NamedTuple):
    """What a backbone puts out: one entry per map, and the stage of four that each comes from."""

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    stages: tuple[int, ...]


def swap_backbone(
    cfg: Config, backbone: str, *, pretrained: bool = True, keep_optimizer: bool = False, undilate: bool = False
) -> Config:
    """A copy of an mmdet, mmseg or mmpretrain config with ViG-H as its backbone.

    Widths follow along: every `in_channels` that read the old backbone is first compared with what that backbone gave.
    Images are normalised as ImageNet's, in RGB. Checkpoints of the old model are no longer loaded. What the old
    backbone was told and ViG-H is not (deformable convolutions, plugins, dilations, frozen stages) is warned about.

    Training switches to AdamW by the recipe of the library, at the schedule's length; a config that has AdamW keeps its
    learning rate, weight decay and rates by name. Vectors have no weight decay.

    Args:
        cfg: a config with `model`; a detector may lie inside another model as `model.detector`.
        backbone: a key of `VIGH`: 'vigh-gla-tiny', 'vigh-gla-small' or 'vigh-gla-base'.
        pretrained: start from the published ImageNet weights.
        keep_optimizer: leave the optimizer and its schedule as they are.
        undilate: take maps of strides 4 to 32 for an mmseg backbone dilated to stride 8 or 16, where each head works
            on maps of any size.

    Raises:
        ValueError: an unknown `backbone`, or a config that cannot be converted; the message says why.
    """
    if backbone not in VIGH:
        raise ValueError(f'backbone={backbone!r} is unknown; use one of {", ".join(VIGH)}')
    arch = VIGH[backbone]['arch']
    new = Config(deepcopy(cfg.to_dict()), cfg_text=cfg.text, filename=cfg.filename)
    path, model, scope = locate_model(new)
    old = model.backbone
    pyramid, pools = old_pyramid(old, scope, f'{path}.backbone')
    heads = dict(_heads(model, path))
    if undilate and scope == 'mmseg' and pyramid.strides != tuple(STRIDES[i] for i in pyramid.stages):
        _check_undilatable(model, heads)
    else:
        _check_strides(pyramid, scope, f'{path}.backbone')
    readers = _readers(model, path, heads, pyramid)
    dims = ViGH.arch_table[arch]['embed_dims']
    if (model.get('neck') or {}) and readers[0].part.get('type') == 'JPU':  # hands all maps but the last on
        mixed = 4 * readers[0].part.get('mid_channels', 512)
        passed = Pyramid((*pyramid.widths[:-1], mixed), pyramid.strides, pyramid.stages)
        for name, head in heads.items():
            _set_widths(_read(head, name, passed, is_neck=False), [*(dims[i] for i in pyramid.stages[:-1]), mixed])
    stages = _connect(readers, pyramid.stages, dims)

    model.backbone = dict(VIGH[backbone])
    if stages != (0, 1, 2, 3):
        model.backbone.out_indices = stages
    if old.get('with_cp'):
        model.backbone.with_cp = True
    if pretrained:
        weights = find_model(f'{backbone}_3rdparty_in1k').weights
        model.backbone.init_cfg = dict(type='Pretrained', checkpoint=weights)
    if pools:
        model.neck = dict(type='GlobalAveragePooling')
    dropped = [f'{path}.backbone.{key}' for key in REPORTED if _says_something(key, old.get(key))]
    dropped += _drop_checkpoints(new, path, model)
    _normalise(new, path, model, scope)
    if not keep_optimizer and new.get('optim_wrapper') is not None:
        dropped += _use_adamw(new, scope, arch)
    if dropped:
        warnings.warn(f'{backbone} does without {", ".join(dropped)}', stacklevel=2)
    return new


def locate_model(cfg: Config) -> tuple[str, dict, str]:
    """The path and the settings of the model with the backbone, and the library that it is of."""
    if not isinstance(cfg.get('model'), dict):
        raise ValueError('the config has no model')
    path, model = 'model', cfg.model
    while 'backbone' not in model and isinstance(model.get('detector'), dict):
        path, model = f'{path}.detector', model.detector
    if not isinstance(model.get('backbone'), dict):
        raise ValueError(f'{path} has no backbone setting')
    scope = cfg.get('default_scope') or model.get('_scope_')
    if scope not in ('mmdet', 'mmseg', 'mmpretrain'):
        raise ValueError(f"default_scope is {scope!r}, and the libraries are 'mmdet', 'mmseg' and 'mmpretrain'")
    return path, model, scope


# ------------------------------------------------------------------------------------------------- the old backbones


def _resnet(b: dict) -> tuple[list[int], list[int]]:
    expansion = b.get('expansion') or (1 if b['depth'] in (18, 34) else 4)
    widths = [b['base_channels'] * expansion * 2**i for i in range(b['num_stages'])]
    return widths, [4 * stride for stride in accumulate(b['strides'][: b['num_stages']], mul)]


def _regnet(b: dict) -> tuple[list[int], list[int]]:
    with torch.device('meta'):
        widths = b['cls'](arch=b['arch']).stage_widths
    return widths, [2 * stride for stride in accumulate(b['strides'], mul)]


def _arch(b: dict, table: str, key: str) -> Any:
    """A setting of one of mmpretrain's named architectures."""
    arch = b['arch']
    return (getattr(b['cls'], table)[arch.lower()] if isinstance(arch, str) else arch)[key]


def _swin(b: dict) -> tuple[list[int], list[int]]:
    dims = _arch(b, 'arch_zoo', 'embed_dims') if 'arch' in b else b['embed_dims']
    strides = b.get('strides', (b['patch_size'], 2, 2, 2))
    strides = list(accumulate(strides, mul))
    stages = 4 if 'arch' in b else len(b['depths'])
    return [dims * 2**i for i in range(stages)], [*strides, *(strides[-1] * 2**i for i in range(1, stages - 3))]


def _convnext(b: dict) -> tuple[list[int], list[int]]:
    return _arch(b, 'arch_settings', 'channels'), [b['stem_patch_size'] * 2**i for i in range(4)]


def _mixed(b: dict) -> tuple[list[int], list[int]]:
    return [b['embed_dims'] * heads for heads in b['num_heads']], list(accumulate(b['strides'], mul))


def _twins(b: dict) -> tuple[list[int], list[int]]:
    dims = _arch(b, 'arch_zoo', 'embed_dims') if 'arch' in b else b['embed_dims']
    return dims, list(accumulate(b.get('strides', (4, 2, 2, 2)), mul))


def _hrnet(b: dict) -> tuple[list[int], list[int]]:
    if b.get('extra'):
        return list(b['extra']['stage4']['num_channels']), list(STRIDES)
    return list(_arch(b, 'arch_zoo', 3)[-1]), list(STRIDES)


def _edgenext(b: dict) -> tuple[list[int], list[int]]:
    return _arch(b, 'arch_settings', 'channels'), list(STRIDES)


def _hornet(b: dict) -> tuple[list[int], list[int]]:
    return [_arch(b, 'arch_zoo', 'base_dim') * 2**i for i in range(4)], list(STRIDES)


def _davit(b: dict) -> tuple[list[int], list[int]]:
    return [_arch(b, 'arch_zoo', 'embed_dims') * 2**i for i in range(4)], list(STRIDES)


def _van(b: dict) -> tuple[list[int], list[int]]:
    return _arch(b, 'arch_zoo', 'embed_dims'), list(STRIDES)


def _mscan(b: dict) -> tuple[list[int], list[int]]:
    return b['embed_dims'], list(STRIDES)


def _poolformer(b: dict) -> tuple[list[int], list[int]]:
    """Positions 0, 2, 4 and 6 are the stages, those between them the downsampling."""
    dims = _arch(b, 'arch_settings', 'embed_dims')
    return [dims[(i + 1) // 2] for i in range(7)], [STRIDES[(i + 1) // 2] for i in range(7)]


# Type -> its settings (with the defaults of its class) -> widths and strides of everything that out_indices can name.
OLD_BACKBONES: dict[str, Callable[[dict], tuple[list[int], list[int]]]] = {
    **dict.fromkeys(('ResNet', 'ResNetV1c', 'ResNetV1d', 'ResNeXt', 'SEResNet', 'SEResNeXt'), _resnet),
    **dict.fromkeys(('ResNeSt', 'Res2Net', 'DetectoRS_ResNet', 'DetectoRS_ResNeXt'), _resnet),
    'RegNet': _regnet,
    **dict.fromkeys(('SwinTransformer', 'SwinTransformerV2'), _swin),
    'ConvNeXt': _convnext,
    **dict.fromkeys(('PyramidVisionTransformer', 'PyramidVisionTransformerV2', 'MixVisionTransformer'), _mixed),
    **dict.fromkeys(('PCPVT', 'SVT'), _twins),
    'HRNet': _hrnet,
    'VAN': _van,
    'MSCAN': _mscan,
    'EdgeNeXt': _edgenext,
    'HorNet': _hornet,
    'DaViT': _davit,
    **dict.fromkeys(('PoolFormer', 'RIFormer'), _poolformer),
}


def old_pyramid(backbone: dict, scope: str, path: str) -> tuple[Pyramid, bool]:
    """What the backbone gives, and whether it gives that pooled to vectors."""
    name = str(backbone.get('type'))
    library, _, kind = name.rpartition('.')
    if kind in SINGLE_STRIDE:
        raise ValueError(
            f'{path} is a {kind}, which has a single stride; ViG-H has a pyramid, and mmvig.ViG is the backbone of a '
            'single stride'
        )
    if 'type' not in backbone:
        raise ValueError(f'{path} has no type: the config is a part of others')
    if library not in ('', 'mmdet', 'mmseg', 'mmpretrain'):
        raise ValueError(f'{path} is a {name}, of another library than mmdet, mmseg and mmpretrain')
    registry = import_module(f'{library or backbone.get("_scope_", scope)}.registry').MODELS
    cls = registry.get(kind)
    if cls is None:
        raise ValueError(f'{path} is a {name}, which is not registered')
    b = {**_defaults(cls), **backbone, 'cls': cls}
    if b.get('in_channels', 3) != 3:
        raise ValueError(f'{path}.in_channels={b["in_channels"]}, and the published ViG-H takes images of 3 channels')
    if b.get('output_img'):
        raise ValueError(f'{path}.output_img: the neck feeds the image and its own output into copies of the backbone')
    pools = bool(b.get('gap_before_final_norm'))
    if kind not in OLD_BACKBONES:
        return _measured_pyramid(backbone, cls, scope, path), pools
    widths, strides = OLD_BACKBONES[kind](b)
    chosen = b.get('out_indices', range(len(widths)))
    chosen = [i % len(widths) if i < 0 else i for i in ([chosen] if isinstance(chosen, int) else chosen)]
    stage = [round(i * 3 / (len(widths) - 1)) if len(widths) == 7 else i for i in range(len(widths))]
    if len(widths) == 7 and any(i % 2 for i in chosen):
        raise ValueError(f'{path}.out_indices={tuple(chosen)} names positions of a {kind} that are no stages')
    pyramid = Pyramid(*(tuple(values[i] for i in chosen) for values in (widths, strides, stage)))
    return pyramid, pools


def _measured_pyramid(backbone: dict, cls: type, scope: str, path: str) -> Pyramid:
    """What a backbone gives that is not in the table: found out by running it without memory."""
    kind = cls.__name__
    if [*inspect.signature(cls.forward).parameters][2:]:
        raise ValueError(f'{path} is a {kind}, whose forward takes more than images')
    try:
        shapes, in_training = (measure(backbone, scope, training=training) for training in (False, True))
    except Exception as error:  # whatever a backbone of others raises
        raise ValueError(f'{path} is a {kind}, which is not in the table and cannot be measured: {error}') from error
    if shapes != in_training:
        raise ValueError(f'{path} is a {kind}, which gives something else in training')
    strides = tuple(SIDE // shape[2] for shape in shapes if len(shape) == 4)
    if len(strides) < len(shapes) or list(strides) != sorted(set(strides)) or not set(strides) <= set(STRIDES):
        raise ValueError(
            f'{path} is a {kind}, which gives no maps of ascending strides among {STRIDES}; their shapes are {shapes}'
        )
    return Pyramid(tuple(shape[1] for shape in shapes), strides, tuple(map(STRIDES.index, strides)))


def _defaults(cls: type) -> dict[str, Any]:
    """The defaults of a class's arguments, and of those that it hands on to its bases."""
    found = {}
    for base in reversed(cls.__mro__):
        if '__init__' in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            found |= {p.name: p.default for p in parameters if p.default is not p.empty}
    return found


def _check_strides(pyramid: Pyramid, scope: str, path: str) -> None:
    if max(pyramid.strides) > STRIDES[-1]:
        raise ValueError(f'{path} gives strides {pyramid.strides}, and ViG-H none above {STRIDES[-1]}')
    if pyramid.strides != tuple(STRIDES[i] for i in pyramid.stages):
        cure = '; undilate=True (--undilate) takes strides up to 32 where the heads allow it' * (scope == 'mmseg')
        raise ValueError(
            f'{path} is dilated: the strides of its maps are {pyramid.strides}, and those of the same stages of ViG-H '
            f'{tuple(STRIDES[i] for i in pyramid.stages)}{cure}'
        )
    if list(pyramid.stages) != sorted(set(pyramid.stages)):
        raise ValueError(f'{path}.out_indices is not ascending, as those of ViG-H are')


# ------------------------------------------------------------------------------------------- what reads the backbone

# Heads of mmseg that read several maps and resize them, so that each may have any size.
RESIZING = ('ANNHead', 'DepthwiseSeparableASPPHead', 'EncHead', 'FPNHead', 'SegformerHead', 'UPerHead')


def _heads(model: dict, path: str) -> Iterator[tuple[str, dict]]:
    """Path -> head, for all at the top of a model and for the first of an iterative head."""
    for key, value in model.items():
        if key == 'head' or key.endswith('_head'):
            parts = value if isinstance(value, (list, tuple)) else [value]
            for i, head in enumerate(parts):
                if isinstance(head, dict) and not str(head.get('type')).endswith('FusionHead'):
                    name = f'{path}.{key}' + (f'.{i}' if parts is value else '')
                    if 'kernel_generate_head' in head:
                        name, head = f'{name}.kernel_generate_head', head.kernel_generate_head
                    yield name, head


def _check_undilatable(model: dict, heads: dict[str, dict]) -> None:
    for path, head in heads.items():
        kind = str(head.get('type')).rpartition('.')[2]
        one_map = not isinstance(head.get('in_index', -1), (list, tuple))
        if kind in ('OCRHead', 'PSAHead') or not (one_map or kind in RESIZING):
            raise ValueError(
                f'undilate: {path} is a {kind}, which relies on the size of the dilated maps; heads of a single map '
                f'and {", ".join(RESIZING)} do not'
            )
    if model.get('neck') is not None:
        raise ValueError('undilate: the maps of this backbone go through a neck, which undilating does not know')


class Reader(NamedTuple):
    """A neck or head that reads the backbone, and which of its maps."""

    part: dict
    path: str
    indices: list[int]


def _readers(model: dict, path: str, heads: dict[str, dict], old: Pyramid) -> list[Reader]:
    """All that reads the backbone, each found to expect the widths that the old one gives."""
    if (model.get('roi_head') or {}).get('shared_head'):
        raise ValueError(
            f'{path}.roi_head.shared_head is a stage of the old backbone (C4); use the config with an FPN instead'
        )
    neck, where = model.get('neck'), f'{path}.neck'
    if isinstance(neck, (list, tuple)):
        neck, where = neck[0], f'{where}.0'
    kind = str((neck or {}).get('type')).rpartition('.')[2]
    if kind == 'SSDNeck':
        raise ValueError(f'{where} is an SSDNeck, which hands maps of the backbone on to a head made for their widths')
    if kind == 'RFP':
        raise ValueError(f'{where} is an RFP, which feeds its output into copies of a DetectoRS_ResNet')
    if neck is not None and kind not in POOLING:
        return [_read(neck, where, old, is_neck=True)]
    if 'rpn_head' in model or 'roi_head' in model:
        raise ValueError(
            f'{path} has no neck (C4 or DC5): its RPN reads a stage of the backbone; use the config with an FPN instead'
        )
    if not heads:
        raise ValueError(f'{path} has neither a neck nor a head that reads the backbone')
    return [_read(head, name, old, is_neck=False) for name, head in heads.items()]


def _read(part: dict, path: str, old: Pyramid, *, is_neck: bool) -> Reader:
    if 'in_channels' not in part:
        raise ValueError(f'{path} ({part.get("type")}) reads the backbone and names no in_channels to change')
    given, count = part['in_channels'], len(old.widths)
    several = isinstance(given, (list, tuple))
    index = None if is_neck else part.get('in_index')
    if several:
        chosen = range(count) if index is None else index
    else:
        chosen = [-1 if index is None else index]
        if is_neck and count > 1 and part['type'] != 'CTResNetNeck':  # which reads the last map
            raise ValueError(f'{path}.in_channels={given} is one number, and the backbone gives {count} maps')
    if isinstance(chosen, int) or any(not -count <= i < count for i in chosen):
        raise ValueError(f'{path}.in_index={index} does not choose among the {count} maps of the backbone')
    indices = [i % count for i in chosen]
    expected = [old.widths[i] for i in indices]
    if list(given if several else [given]) != expected:
        raise ValueError(
            f'{path}.in_channels={given} is not what the backbone gives it, {expected if several else expected[0]}'
        )
    strides = part.get('feature_strides', part.get('strides'))
    if several and isinstance(strides, (list, tuple)) and list(strides) != [old.strides[i] for i in indices]:
        raise ValueError(f'{path}: its strides {list(strides)} are not those of the backbone, {list(old.strides)}')
    if part.get('c1_in_channels') and part['c1_in_channels'] != old.widths[0]:
        raise ValueError(
            f'{path}.c1_in_channels={part["c1_in_channels"]} is not the width of the first map, {old.widths[0]}'
        )
    return Reader(part, path, indices)


def _set_widths(reader: Reader, widths: list[int]) -> None:
    part = reader.part
    chosen = [widths[i] for i in reader.indices]
    several = isinstance(part.in_channels, (list, tuple))
    part.in_channels = type(part.in_channels)(chosen) if several else chosen[0]
    if part.get('c1_in_channels'):
        part.c1_in_channels = widths[0]


def _connect(readers: list[Reader], stages: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, ...]:
    """Sets the widths of the readers, and returns the stages that any of them needs.

    A map that nothing reads would leave its norm without a gradient, which distributed training does not take.
    """
    for part, _, indices in readers:
        if part.get('start_level') and part.get('end_level', -1) == -1 and part['type'] != 'JPU':
            del indices[: part.start_level]
            part.start_level = 0
    used = {i for reader in readers for i in reader.indices}
    used |= {0 for reader in readers if reader.part.get('c1_in_channels')}
    place = {old: new for new, old in enumerate(sorted(used))}
    for reader in readers:
        part, _, indices = reader
        _set_widths(reader, [dims[stage] for stage in stages])
        if isinstance(part.get('in_index'), (list, tuple)):
            part.in_index = [place[i] for i in indices]
        elif part.get('in_index', -1) >= 0:
            part.in_index = place[indices[0]]
    return tuple(stages[i] for i in sorted(used))


# ------------------------------------------------------------------------------------------------- all around the model


def _says_something(key: str, value: Any) -> bool:
    if key == 'dilations':
        return value is not None and set(value) != {1}
    return value is not None and value != -1


def _drop_checkpoints(cfg: Config, path: str, model: dict) -> list[str]:
    """Removes weights of the whole old model, and the backbone's where mmseg's old style puts them."""
    dropped = []
    if cfg.get('load_from'):
        cfg.load_from = None
        dropped.append('load_from')
    for name, part in {'model': cfg.model, path: model}.items():
        part.pop('pretrained', None)
        init = part.get('init_cfg')
        if isinstance(init, dict) and init.get('type') == 'Pretrained':
            del part['init_cfg']
            dropped.append(f'{name}.init_cfg')
    return dropped


def _normalise(cfg: Config, path: str, model: dict, scope: str) -> None:
    """Sets mean, standard deviation and the order of colours in every data preprocessor that normalises."""
    places = {'data_preprocessor': cfg, 'model.data_preprocessor': cfg.model, f'{path}.data_preprocessor': model}
    found, changed = False, False
    for name, parent in places.items():
        part = parent.get('data_preprocessor')
        while isinstance(part, dict) and 'mean' not in part and isinstance(part.get('data_preprocessor'), dict):
            part, name = part.data_preprocessor, f'{name}.data_preprocessor'
        if not isinstance(part, dict) or part.get('mean') is None:
            continue
        if len(part.mean) != 3:
            raise ValueError(f'{name}.mean has {len(part.mean)} values: images of 3 channels are what ViG-H takes')
        kind = str(part.get('type') or ('Cls' if scope == 'mmpretrain' else 'Det')).rpartition('.')[2]
        order = 'to_rgb' if kind.startswith(('Cls', 'SelfSup', 'ReID')) else 'bgr_to_rgb'
        wanted = {'mean': MEAN, 'std': STD, order: True}
        found = True
        before = {key: list(value) if isinstance(value, tuple) else value for key, value in part.items()}
        changed |= any(before.get(key) != value for key, value in wanted.items())
        part.pop('rgb_to_bgr', None)
        part.update(wanted)
    if not found:  # raw pixels are what the old backbone saw
        part = next((parent.data_preprocessor for parent in places.values() if parent.get('data_preprocessor')), None)
        if part is None or scope == 'mmpretrain':
            raise ValueError('no data_preprocessor has a mean, so that how images are normalised is not known')
        part.update(mean=MEAN, std=STD, bgr_to_rgb=True)
        changed = True
    others = [key for key in ('reid', 'teacher_config', 'teacher_backbone') if {**cfg.model, **model}.get(key)]
    if changed and others:
        raise ValueError(f'model.{others[0]} sees the same images as the backbone, with a normalisation of its own')
    if 'Normalize' in set(_types([cfg.get(f'{mode}_dataloader') for mode in ('train', 'val', 'test')])):
        raise ValueError('a pipeline has a Normalize of its own, before the data preprocessor; take it out')


def _types(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield str(node.get('type'))
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ():
        yield from _types(child)


def _use_adamw(cfg: Config, scope: str, arch: str) -> list[str]:
    wrapper = cfg.optim_wrapper
    dropped = []
    optimizer, paramwise = wrapper.get('optimizer') or {}, wrapper.get('paramwise_cfg') or {}
    if optimizer.get('type') != 'AdamW':
        if scope == 'mmpretrain':
            batch = (cfg.get('auto_scale_lr') or {}).get('base_batch_size', 1024)
            lr, decay = CLASSIFIER_LR[arch] * batch / 512, 0.05
        else:
            lr, decay = RECIPES[scope]
        schedulers = cfg.get('param_scheduler') or []
        for scheduler in [schedulers] if isinstance(schedulers, dict) else schedulers:
            if scheduler.get('eta_min') and 'Momentum' not in scheduler['type']:
                scheduler['eta_min'] *= lr / optimizer['lr']
        wrapper.optimizer = dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=decay)
    custom_keys = {
        key: value
        for key, value in (paramwise.get('custom_keys') or {}).items()
        if not key.startswith('backbone.') and key.strip('.') not in OLD_PARAMETERS
    }
    kept = {'bypass_duplicate': True} if paramwise.get('bypass_duplicate') else {}
    if wrapper.pop('constructor', None):
        dropped.append('the layer-wise learning rates of optim_wrapper.constructor')
    if custom_keys:  # MMEngine's own constructor would let these keys off the rule for vectors
        wrapper.constructor = 'mmvig.LayerDecayOptimWrapperConstructor'
        wrapper.paramwise_cfg = dict(layer_decay_rate=1.0, custom_keys=custom_keys, **kept)
    else:
        wrapper.paramwise_cfg = dict(flat_decay_mult=0.0, bias_decay_mult=0.0, norm_decay_mult=0.0, **kept)
    return dropped

"""Models without memory, on the meta device, and what shapes their backbones give."""

import inspect
from ast import literal_eval
from contextlib import nullcontext
from functools import cache
from importlib import import_module

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ['SIDE', 'build', 'build_part', 'measure']

SIDE = 384  # of a square image: it has all strides, and no map is smaller than a window of Swin
# Settings that change no shape, and that would load a file or run operators which know no meta device.
WITHOUT_EFFECT = ('init_cfg', 'pretrained', 'dcn', 'stage_with_dcn', 'plugins', 'sac', 'stage_with_sac')


def build(cfg: Config) -> nn.Module:
    """The model of a config, in eval mode."""
    model = dict(cfg.model)
    if 'teacher_ckpt' in model:  # which mmdet downloads while building
        model['teacher_ckpt'] = None
    if cfg.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return build_part(model, cfg.default_scope)


def build_part(settings: dict, scope: str) -> nn.Module:
    """A part of a model of the library `scope`, in eval mode."""
    import_module(f'{scope}.utils').register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope(scope), torch.device('meta'), _Uninitialised():
        model = MODELS.build(settings)
    model.eval()  # which returns nothing in OpenMMLab's ResNets
    return model


class _Uninitialised(TorchFunctionMode):
    """Spares drawing weights that are not there; drop path rates, which backbones read off a tensor, are drawn."""

    draws = ('normal_', 'uniform_', 'erfinv_', 'mul_', 'add_', 'clamp_', 'fill_', 'zero_')

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.linspace:
            return func(*args, **{'device': 'cpu', **(kwargs or {})})
        if getattr(func, '__name__', '') in self.draws and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def measure(backbone: dict, scope: str, training: bool = False) -> list[tuple[int, ...]]:
    """The shapes of what a backbone gives for images of `SIDE` pixels a side, before they are pooled if it does that.

    Ours runs for real, on the CPU: on the meta device an operator of our own would be no proof.

    Raises:
        Exception: whatever the backbone raises.
    """
    settings = {key: value for key, value in backbone.items() if key not in WITHOUT_EFFECT}
    return _measure(scope, repr(settings), training)


@cache
def _measure(scope: str, settings: str, training: bool) -> list[tuple[int, ...]]:
    settings = literal_eval(settings)
    ours = settings['type'].startswith('mmvig.')
    if ours:
        backbone = MODELS.build(settings)
    else:
        cls = import_module(f'{scope}.registry').MODELS.get(settings['type'])
        if 'gap_before_final_norm' in inspect.signature(cls.__init__).parameters:
            settings['gap_before_final_norm'] = False
        backbone = build_part(settings, scope)
    with torch.no_grad(), nullcontext() if ours else torch.device('meta'):
        backbone = revert_sync_batchnorm(backbone)  # which trains on GPUs alone
        backbone.train(training)
        maps = backbone(torch.zeros(1 + training, 3, SIDE, SIDE))  # two images, or a norm has one value to work on
    return [(1, *x.shape[1:]) for x in ([maps] if isinstance(maps, Tensor) else maps)]

"""A stand-in for mmcv's compiled operators where mmcv comes without them.

OpenMMLab builds no mmcv wheels for torch newer than 2.4; mmcv-lite, or an mmcv installed without a compiler, then lacks
the extension module `mmcv._ext` that mmdet imports, and so does onedl-mmcv as pip builds it by default. The stand-in
computes the operators of the usual detectors with torchvision (`mmvig.compat.torchvision_ops`). It is found last, so a
real extension always goes before it.
"""

import importlib.util
import sys
from functools import wraps
from types import ModuleType
from typing import NoReturn

from mmvig.compat.change import Change
from mmvig.compat.imports import StandIn, after_import, distribution_version, installed

__all__ = ['CURE', 'apply', 'has_real_extension']

NAME = 'mmcv._ext'
CURE = (
    'build mmcv where there is a C++ (and CUDA) compiler: pip uninstall mmcv-lite; pip install "setuptools<81" wheel; '
    'pip install --no-build-isolation mmcv==2.1.0. Or change to the maintained forks (onedl-mmengine, onedl-mmcv, '
    'onedl-mmdetection and so on), whose documentation names the index of ready wheels'
)
if fork := distribution_version('onedl-mmcv'):
    CURE = (
        'build onedl-mmcv where there is a C++ (and CUDA) compiler, with torch in its sight: pip install wheel; '
        'pip install --no-build-isolation --no-cache-dir --no-deps --force-reinstall --no-binary onedl-mmcv '
        f'onedl-mmcv=={fork}. Its documentation names the index of ready wheels'
    )


def apply() -> Change | None:
    """Serve the stand-in, where mmcv is there and its extension is not."""
    if not installed('mmcv') or has_real_extension():
        return None
    sys.meta_path.append(StandIn(NAME, _fill))
    after_import('mmcv.ops.nms', _widen)
    return Change(
        name='mmcv operators',
        cause='the installed mmcv has no compiled operators (mmcv._ext)',
        action='served over torchvision: nms, soft-nms, RoIAlign, RoIPool, sigmoid focal loss, deformable convolution '
        '(v1, v2) and multi-scale deformable attention, on CPU and CUDA; every other operator raises when it is called',
        cure=CURE,
    )


def has_real_extension() -> bool:
    """Whether an installed mmcv brings its compiled module, found without importing either."""
    mmcv = importlib.util.find_spec('mmcv')
    finders = (finder for finder in sys.meta_path if not isinstance(finder, StandIn))
    return any(finder.find_spec(NAME, mmcv.submodule_search_locations) for finder in finders)


def _fill(module: ModuleType) -> None:
    from mmvig.compat import torchvision_ops  # imports torch and torchvision, hence only once mmcv.ops is wanted

    vars(module).update({name: getattr(torchvision_ops, name) for name in torchvision_ops.__all__})
    module.__getattr__ = _refuse


def _widen(nms_module: ModuleType) -> None:
    """Have `batched_nms` work in float32 on half-precision boxes.

    It moves the boxes of each class to a place of their own, which half precision cannot tell apart or even express.
    The compiled operator raises on such boxes; the stand-in takes them, and must not be wrong.
    """
    import torch

    stock = nms_module.batched_nms

    @wraps(stock)
    def batched_nms(boxes, scores, idxs, nms_cfg, class_agnostic=False):
        wide = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (boxes, scores))
        dets, keep = stock(*wide, idxs, nms_cfg, class_agnostic)
        return dets.to(torch.promote_types(boxes.dtype, scores.dtype)), keep

    nms_module.batched_nms = batched_nms


def _refuse(name: str):
    """A function that raises: mmcv.ops asks for the names of all operators at import, long before a call."""
    if name.startswith('__'):
        raise AttributeError(f'module {NAME!r} has no attribute {name!r}')

    def operator(*args, **kwargs) -> NoReturn:
        raise NotImplementedError(
            f'{name!r} is a compiled operator of mmcv, and the installed mmcv has none; '
            f'the stand-in that mmvig serves over torchvision does not compute it. To have it, {CURE}'
        )

    return operator

"""Parameters and FLOPs, part by part, of the models of configs and of the six backbones.

A FLOP is a multiply-add, as in the tables of the papers and of OpenMMLab: products of matrices and convolutions count,
elementwise work, norms, pooling and sampling do not. PyTorch's FlopCounterMode counts (two operations a multiply-add,
halved here): it sees the operators that run, so that it needs no tracing, which detectors do not survive, and takes the
meta device. `bigla` is one operator to it, counted by `bigla_flops`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision  # noqa: F401  registers its operators
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from bigla import api, bigla, chunked, composed
from mmvig.apis.backbones import BACKBONES
from mmvig.engine.settings import SetupError
from mmvig.models.layers import block

__all__ = ['FORMS', 'FORMULAS', 'Flops', 'Part', 'bigla_flops', 'config_flops', 'count_flops', 'zoo_flops']

FORMS = ('recurrence', 'chunked')
SHAPES = dict(mmdet=(800, 1344), mmpretrain=(224, 224), mmseg=(512, 512))
# Operators that PyTorch's counter does not know: shapes in, two operations a multiply-add out, as is its way.
FORMULAS = {
    torch.ops.aten.baddbmm_: lambda x, a, b, *, out_shape, **_: 2 * math.prod(out_shape) * a[-1],
    torch.ops.torchvision.deform_conv2d: lambda x, weight, *_, out_shape: (
        2 * math.prod(out_shape) * math.prod(weight[1:])
    ),
}


def bigla_flops(q_shape: tuple[int, ...], v_shape: tuple[int, ...], form: str = 'recurrence') -> int:
    """Multiply-adds of one call of `bigla`.

    'recurrence' counts its equation, whatever computes it: in each direction a token adds k v^T to the state (K V) and
    multiplies q by it (K V), so 4 B L nh K V in all. The decay of the state is elementwise work.

    'chunked' counts the matrix products that the implementation of that name carries out on chunks of C tokens, M of
    them: scores at every level of its tree (log2(C) M C^2 K), scores times values (M C^2 V), what the chunks add to the
    states and read from them (4 M C K V), and the scans over the chunks.

    Args:
        q_shape: (B, L, nh, K).
        v_shape: (B, L, nh, V).
        form: one of `FORMS`.

    Raises:
        ValueError: another form.
    """
    (B, L, nh, K), V = q_shape, v_shape[-1]
    if form == 'recurrence':
        return 4 * B * L * nh * K * V
    if form != 'chunked':
        raise ValueError(f'form must be one of {FORMS}, got {form!r}')
    if L == 0:
        return 0
    bits = min(chunked.MAX_BITS, math.ceil(math.log2(L)))
    C = 2**bits
    chunks = math.ceil(L / C)
    groups = math.ceil(chunks / chunked.GROUP)
    a_group = math.ceil(chunks / groups)
    M = a_group * groups * B * nh
    within = M * C * C * (bits * K + V)
    if a_group * groups == 1:
        return within
    scans = groups * a_group**2 + (groups**2 if groups > 1 else 0)
    return within + 4 * M * C * K * V + 2 * scans * B * nh * K * V


@dataclass(frozen=True)
class Part:
    """A direct child of a model; `flops` are those of its modules, of whatever was called through them."""

    name: str
    type: str
    params: int
    flops: int


@dataclass(frozen=True)
class Flops:
    """What one run of a model takes; `parts` sum up to `params` and `flops`, of which `bigla` are the operator's.

    `traffic` counts the elements that the operators with FLOPs (attention as one of them) read and write, each once:
    what has to pass through memory, elementwise work and norms being fused into these operators.
    """

    parts: tuple[Part, ...]
    bigla: int
    traffic: int

    @property
    def params(self) -> int:
        return sum(part.params for part in self.parts)

    @property
    def flops(self) -> int:
        return sum(part.flops for part in self.parts)


@torch.library.custom_op('mmvig::bigla', mutates_args=())
def _operator(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float) -> Tensor:
    return bigla(q, k, v, g_fwd, g_bwd, scale=scale)


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float) -> Tensor:
    return v.new_empty(v.shape)


def _block(
    x: Tensor, *tensors: Tensor | None, scale: None, branch_scale: None, next_norm_weight: Tensor | None, **options: Any
) -> Tensor | tuple[Tensor, None]:
    """`bigla.block`, without stochastic depth, by its parts: the counter sees their products, and BiGLA as one."""
    mixer = composed.MixerTensors(x, *tensors[:12])
    order = 'num_heads', 'act', 'eps', 'head_eps', 'inner'
    y = composed.block(_operator, mixer, *tensors[12:], scale, branch_scale, *(options[name] for name in order))
    return y if next_norm_weight is None else (y, None)


def count_flops(model: nn.Module, run: Callable[[], Any], form: str = 'recurrence') -> Flops:
    """Counts while `run` puts something through `model`, on any device, the meta device included.

    Args:
        model: its direct children are the parts; what runs outside of their forwards is '(elsewhere)'.
        run: calls the model, in the mode that it is in, without gradients.
        form: how `bigla` counts, one of `FORMS`.
    """
    operator = torch.ops.mmvig.bigla
    formulas = {**FORMULAS, operator: lambda q, k, v, *_, out_shape, **__: 2 * bigla_flops(q, v, form)}
    counter, traffic = FlopCounterMode(display=False, custom_mapping=formulas), _Traffic(formulas)
    flops = Counter()
    fused_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # operators that the counter does not know
    try:
        with (
            patch.object(block, 'bigla_block', _block),
            patch.object(api, '_choose', lambda impl, *_: impl or 'chunked'),  # PyTorch's operators, on a GPU, too
            _attributing(model, counter.get_total_flops, flops),
            sdpa_kernel(SDPBackend.MATH),
            torch.no_grad(),
            traffic,
            counter,
            _FusedAttention(traffic),
        ):
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused_attention)
    flops['(elsewhere)'] = counter.get_total_flops() - flops.total()
    parts, left = [], set(model.parameters())  # a parameter that parts share counts to the first
    for name, part in [*model.named_children(), ('(elsewhere)', model)]:
        own = left.intersection(part.parameters())
        left -= own
        parts.append(Part(name, type(part).__name__, sum(map(Tensor.numel, own)), flops[name] // 2))
    return Flops(
        tuple(part for part in parts if part.params or part.flops),
        counter.get_flop_counts()['Global'].get(operator, 0) // 2,
        traffic.elements,
    )


class _Traffic(TorchDispatchMode):
    """Sums up the elements of the tensors that operators with FLOPs, those in `formulas` included, take and return."""

    def __init__(self, formulas: dict) -> None:
        super().__init__()
        self.counted = {*flop_registry, *formulas}
        self.elements = 0
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in self.counted and not self.paused:
            self.add(args, kwargs, out)
        return out

    def add(self, *trees: Any) -> None:
        self.elements += sum(leaf.numel() for leaf in tree_leaves(trees) if isinstance(leaf, Tensor))


class _FusedAttention(TorchFunctionMode):
    """Counts the traffic of attention as that of one operator, whose scores stay out of memory."""

    def __init__(self, traffic: _Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.traffic.paused = True
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            self.traffic.paused = False
        self.traffic.add(args, kwargs, out)
        return out


@contextmanager
def _attributing(model: nn.Module, total: Callable[[], int], flops: Counter) -> Iterator[None]:
    """Adds to `flops[part]` what `total` grows by while a forward of any of the part's modules is the outermost one.

    Hooks would not do: detectors call `head.forward(...)`, and heads call their layers from other methods.
    """
    busy = False

    def attributed(forward: Callable, name: str) -> Callable:
        @wraps(forward)
        def wrapped(*args, **kwargs):
            nonlocal busy
            if busy:
                return forward(*args, **kwargs)
            busy, before = True, total()
            try:
                return forward(*args, **kwargs)
            finally:
                busy = False
                flops[name] += total() - before

        return wrapped

    parts = {module: name for name, child in model.named_children() for module in child.modules()}
    with ExitStack() as patches:
        for module, name in parts.items():
            patches.enter_context(patch.object(module, 'forward', attributed(module.forward, name)))
        yield


def config_flops(
    cfg: Config, shape: tuple[int, int] | None = None, form: str = 'recurrence'
) -> tuple[Flops, tuple[int, int]]:
    """Counts the model of a config, with fresh weights, on one image on the CPU; nothing is read or downloaded.

    Detectors predict, with the score threshold of two-stage ones at 0: that fresh weights, too, find as many objects as
    the config allows (mostly 100), on which the mask head then works, of its proposals (mostly 1000).

    Args:
        cfg: its `default_scope` chooses the library: mmdet, mmseg (the whole image at once) or mmpretrain.
        shape: height and width of the image in pixels; by default those of `SHAPES`.
        form: how `bigla` counts, one of `FORMS`.

    Returns:
        The count and the shape that it is for.

    Raises:
        SetupError: another `default_scope`.
    """
    scope = cfg.get('default_scope')
    if scope not in SHAPES:
        raise SetupError(f'config: default_scope must be one of {list(SHAPES)}, got {scope!r}.')
    shape = shape or SHAPES[scope]
    init_default_scope(scope)
    settings = deepcopy(cfg.model)
    if 'rcnn' in (settings.get('test_cfg') or {}):
        settings.test_cfg.rcnn.score_thr = 0.0
    if 'data_preprocessor' in cfg:
        settings.setdefault('data_preprocessor', cfg.data_preprocessor)
    torch.manual_seed(0)
    model = MODELS.build(settings).eval()
    image = torch.randn(1, 3, *shape)
    sizes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), shape)
    if scope == 'mmdet':
        from mmdet.structures import DetDataSample

        sample = DetDataSample(metainfo=dict(sizes, img_id=0, scale_factor=(1.0, 1.0)))
        run = partial(model, image, [sample], mode='predict')
    elif scope == 'mmseg':
        run = partial(model.encode_decode, image, [sizes])
    else:
        run = partial(model, image, mode='tensor')
    return count_flops(model, run, form), shape


def zoo_flops(*shapes: tuple[int, int], form: str = 'recurrence') -> dict[str, list[Flops]]:
    """Counts the six backbones, by name, on one image of each shape (height, width), on the meta device: in no time."""
    counts = {}
    with torch.device('meta'):
        for name, settings in BACKBONES.items():
            if settings['type'] in ('mmvig.ViG', 'mmvig.ViGH'):
                backbone = MODELS.build(settings).eval()
                images = [torch.empty(1, 3, *shape) for shape in shapes]
                counts[name] = [count_flops(backbone, partial(backbone, image), form) for image in images]
    return counts

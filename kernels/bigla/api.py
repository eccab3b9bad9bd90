"""The public operator: contract, validation, choice of an implementation.

Shapes are written in one alphabet, here and in every implementation: `B` batch, `L` tokens in row-major image order,
`nh` heads, `K` key width and `V` value width of one head. Tensors are token-major, `(B, L, nh, K)`.
"""

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunked, reference

__all__ = ['bigla', 'debug']

_IMPLS = ('triton', 'chunked', 'reference')
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_debug = os.environ.get('BIGLA_DEBUG', '0') == '1'


def bigla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor,
    g_bwd: Tensor,
    *,
    scale: float | None = None,
    gate_logits: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Bidirectional gated linear attention (arXiv 2405.18425, section 3.2), per sample and head::

        S_t = diag(exp g_fwd_t) S_{t-1} + k_t v_t^T      S_0     = 0
        R_t = diag(exp g_bwd_t) R_{t+1} + k_t v_t^T      R_{L+1} = 0
        o_t = scale / 2 * (q_t S_t + q_t R_t)

    The current token enters both states undecayed. Inputs may have any strides and are never written. Sums are
    accumulated in float32, or in float64 where an input is float64, whatever autocast says.

    Args:
        q: Queries (B, L, nh, K); float16, bfloat16, float32 or float64. nh, K and V are at least 1; B and L may be 0.
        k: Keys (B, L, nh, K), of q's dtype.
        v: Values (B, L, nh, V), of q's dtype.
        g_fwd: Log decays of the forward direction (B, L, nh, K), every entry in [-inf, 0]; q's dtype, float32 or
            float64. A positive or NaN entry is an error under :func:`debug` and undefined otherwise.
        g_bwd: Log decays of the backward direction, like g_fwd and of its dtype.
        scale: Factor on the scores; ``K ** -0.5`` when None.
        gate_logits: g_fwd and g_bwd are ViG's gate logits x, any finite number, and the log decays are
            ``logsigmoid(x) / 16`` in float32 or wider.
        impl: ``'triton'`` (NVIDIA GPUs from Ampere on, float32 and narrower, K and V up to 256), ``'chunked'`` (matrix
            products over chunks, any device), ``'reference'`` (one token a step, the oracle) or None, which takes the
            first of these that serves the arguments. One that is named is used or raises.

    Returns:
        o (B, L, nh, V), of v's dtype.

    Raises:
        TypeError: An argument is no tensor, scale no number, or dtypes do not go together.
        ValueError: Shapes or devices do not agree, impl is unknown or does not serve the arguments, or (under
            :func:`debug`) a gate is out of range.

    Warns:
        UserWarning: Once, where impl is None and a GPU runs ``'chunked'`` because ``'triton'`` does not serve it.
    """
    _validate(q, k, v, g_fwd, g_bwd, scale)
    if impl is not None and impl not in _IMPLS:
        raise ValueError(f'impl must be None or one of {_IMPLS}, got {impl!r}')
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if _debug:
        _check_gates(gate_logits, g_fwd=g_fwd, g_bwd=g_bwd)
    if q.shape[1] == 0:
        return v * sum(x.sum() for x in (q, k, g_fwd, g_bwd)).to(v.dtype)  # empty, and differentiable in all five
    if impl is None:
        impl = 'triton' if q.is_cuda and _triton_serves(q, k, v, g_fwd, g_bwd) else 'chunked'
    elif impl == 'triton' and (reason := _unserved(q, k, v, g_fwd, g_bwd)):
        raise ValueError(f"impl='triton' cannot serve these arguments: {reason}; impl='chunked' can")
    if impl == 'triton':
        from . import triton

        return triton.bigla(q, k, v, g_fwd, g_bwd, scale, gate_logits=gate_logits)
    if gate_logits:
        dtype = torch.promote_types(g_fwd.dtype, torch.float32)
        g_fwd, g_bwd = (F.logsigmoid(x.to(dtype)) / 16 for x in (g_fwd, g_bwd))
    return (chunked if impl == 'chunked' else reference).bigla(q, k, v, g_fwd, g_bwd, scale)


@contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Check every gate's value inside the block, or with ``enabled=False`` stop doing so.

    The environment variable ``BIGLA_DEBUG=1``, read at import, has the same effect on a whole process. The check reads
    all gates and waits for the device: it is for finding a fault, not for training.
    """
    global _debug
    before, _debug = _debug, enabled
    try:
        yield
    finally:
        _debug = before


def _unserved(*args: Tensor) -> str | None:
    """Why the Triton kernels do not take these arguments; None where they do."""
    try:
        from . import triton  # only here, where a GPU asks for it: the import takes a quarter of a second
    except ImportError as error:
        return f'Triton cannot be imported ({error})'
    return triton.unsupported(*args)


def _triton_serves(*args: Tensor) -> bool:
    reason = _unserved(*args)
    if reason and not torch.compiler.is_compiling():
        _warn_once(reason)
    return reason is None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f'bigla runs on this GPU without its Triton kernels, slowly: {reason}', stacklevel=4)


def _validate(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float | None) -> None:
    args = {'q': q, 'k': k, 'v': v, 'g_fwd': g_fwd, 'g_bwd': g_bwd}
    for name, x in args.items():
        if not isinstance(x, Tensor):
            raise TypeError(f'{name} must be a torch.Tensor, got {type(x).__name__}')
        if x.ndim != 4:
            width = 'V' if name == 'v' else 'K'
            raise ValueError(f'{name} must have 4 dimensions (B, L, nh, {width}), got shape {tuple(x.shape)}')
        if x.dtype not in _DTYPES:
            raise TypeError(f'{name} must be float16, bfloat16, float32 or float64, got {x.dtype}')
        if x.device != q.device:
            raise ValueError(f'{name} is on {x.device}, but q is on {q.device}: move them to one device')
        if name == 'v' and x.shape[:3] != q.shape[:3]:
            raise ValueError(f"v must share q's B, L, nh = {tuple(q.shape[:3])}, got shape {tuple(x.shape)}")
        if name != 'v' and x.shape != q.shape:
            raise ValueError(f"{name} must have q's shape (B, L, nh, K) = {tuple(q.shape)}, got {tuple(x.shape)}")
        if min(x.shape[2:]) < 1:
            raise ValueError(f'{name} must have nh and width of at least 1, got shape {tuple(x.shape)}')
    for name in ('k', 'v'):
        if args[name].dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {args[name].dtype}: cast it")
    if g_fwd.dtype not in (q.dtype, torch.float32, torch.float64):
        raise TypeError(f"g_fwd must have q's dtype {q.dtype}, float32 or float64, got {g_fwd.dtype}: cast it")
    if g_bwd.dtype != g_fwd.dtype:
        raise TypeError(f"g_bwd must have g_fwd's dtype {g_fwd.dtype}, got {g_bwd.dtype}: cast it")
    if scale is not None and not isinstance(scale, Real):
        raise TypeError(f'scale must be None or a number, got {type(scale).__name__}')


def _check_gates(logits: bool, **gates: Tensor) -> None:
    for name, g in gates.items():
        wrong = ~g.isfinite() if logits else ~(g <= 0)  # true for NaN either way
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            wanted = 'a gate logit, every entry finite' if logits else 'a log decay, every entry <= 0'
            cure = '' if logits else '; for gate logits, pass gate_logits=True'
            raise ValueError(
                f'{name} must be {wanted}: {int(wrong.sum())} of {g.numel()} are not, the first '
                f'is {g[at].item()} at (B, L, nh, K) index {at}{cure}'
            )

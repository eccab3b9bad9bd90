"""Where a step's time goes, kernel by kernel, and how far each is from the floor that memory and arithmetic set."""

import ast
import json
import math
import tempfile
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiling
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmvig.apis.subjects import Subject
from mmvig.apis.timing import Limits

__all__ = ['CATEGORIES', 'Kernel', 'by_category', 'category', 'kernels_of_trace', 'profile']

# The first that has one of its words in the name of the kernel or of its operator.
CATEGORIES = {
    'gated MLP': ('mlp', 'swiglu'),
    'bigla': ('bigla', 'gla_'),
    'attention': ('flash', 'fmha', 'attention', 'sdpa'),
    'copy': ('memcpy', 'memset', 'copy_', 'aten::contiguous', 'aten::clone', 'aten::cat', 'aten::fill_', 'aten::zero_'),
    'convolution': ('conv', 'cudnn', 'dgrad', 'wgrad', 'implicit_gemm'),
    'matrix product': (
        'gemm',
        'aten::mm',
        'aten::addmm',
        'aten::bmm',
        'aten::baddbmm',
        'aten::linear',
        'nvjet',
        'cutlass',
    ),
    'norm': ('norm',),
    'optimiser': ('optimizer', 'multi_tensor', '_foreach'),
    'elementwise': ('',),
}
WRITES_ONLY = ('aten::copy_', 'aten::fill_', 'aten::zero_')  # do not read what they change
ALLOCATES = ('aten::empty', 'aten::empty_strided', 'aten::empty_like', 'aten::new_empty', 'aten::resize_')
UNRECORDED = object()  # an argument that the profiler leaves out: None, a string or a default
DTYPES = {
    'float': torch.float32,
    'double': torch.float64,
    'c10::Half': torch.float16,
    'c10::BFloat16': torch.bfloat16,
    'int': torch.int32,
    'long int': torch.int64,
    'unsigned char': torch.uint8,
    'bool': torch.bool,
}


@dataclass(frozen=True)
class Kernel:
    """One kernel (on a CPU, operator) launched by one operator, over one step.

    `ms` is its time, `share` that of all kernels. `floor_ms` is the part that falls to it of its operator's floor, the
    longer of: inputs and outputs, each once, at the rate of a copy; FLOPs at that of a matrix product. None where the
    operator's tensors are not known. Elementwise operators that a fused kernel would not need count with their own.
    """

    name: str
    operator: str
    category: str
    calls: float
    ms: float
    share: float
    floor_ms: float | None


def category(kernel: str, operator: str) -> str:
    """One of `CATEGORIES`, by the names that libraries give to kernels and PyTorch to operators."""
    names = f'{operator} {kernel}'.lower()
    return next(name for name, words in CATEGORIES.items() if any(word in names for word in words))


def profile(subject: Subject, mode: str | None, limits: Limits, steps: int = 5) -> list[Kernel]:
    """Runs `steps` steps under PyTorch's profiler, after three without it, and returns the longest kernel first.

    Args:
        subject: what to run, and where.
        mode: of torch.compile, for its backbone; None: as it is.
        limits: of the device, in the subject's precision.
        steps: more give steadier means.
    """
    gpu = subject.device.type == 'cuda'
    for _ in range(3):
        subject.reset()
        subject.step(mode)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with _one_by_one(), profiling(activities=activities, record_shapes=True, acc_events=True) as profiler:
        for _ in range(steps):
            subject.reset()
            subject.step(mode)
        if gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'trace.json')
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())['traceEvents']
    return kernels_of_trace(events, steps, limits)


def _one_by_one() -> AbstractContextManager:
    """Without kernels of ours being launched while others are at work, whose times would be theirs, too."""
    if find_spec('triton') is None:
        return nullcontext()
    from bigla.triton.launch import one_by_one

    return one_by_one()


def kernels_of_trace(events: list[dict], steps: int, limits: Limits) -> list[Kernel]:
    """The kernels of a Chrome trace of `steps` steps; where it has none, of a CPU, operators with their own time."""
    operators = {event['args']['External id']: event for event in events if event.get('cat') == 'cpu_op'}
    launched = [event for event in events if event.get('cat') in ('kernel', 'gpu_memcpy', 'gpu_memset')]
    callers, own = _nesting(operators)
    if launched:
        times = [(event['name'], event['args'].get('External id'), event['dur']) for event in launched]
    else:
        times = [(operators[key]['name'], key, time) for key, time in own.items()]

    groups, totals = defaultdict(list), defaultdict(float)
    for name, key, microseconds in times:
        operator = operators.get(key)
        groups[name, operator['name'] if operator else '(other)'].append((key, microseconds))
        totals[key] += microseconds
    floor = cache(partial(_floor, limits=limits))
    floors = {}
    for key in totals.keys() & operators.keys():
        chain = [key]  # cuDNN's own operators do not say what they return, those that call them do
        while launched and chain[-1] in callers and len(chain) < 3:
            chain.append(callers[chain[-1]])
        floors[key] = floor(tuple(_call(operators[key]) for key in chain))
    if not launched:
        floors = _without_callees(floors, callers)
    everything = sum(totals.values()) or 1.0
    kernels = []
    for (name, operator), calls in groups.items():
        microseconds = sum(time for _, time in calls)
        parts = [floors[key] * time / (totals[key] or 1.0) for key, time in calls if floors.get(key) is not None]
        kernels.append(
            Kernel(
                name,
                operator,
                category(name, operator),
                len(calls) / steps,
                microseconds / 1e3 / steps,
                microseconds / everything,
                sum(parts) * 1e3 / steps if len(parts) == len(calls) else None,
            )
        )
    return sorted(kernels, key=lambda kernel: -kernel.ms)


def by_category(kernels: list[Kernel]) -> list[Kernel]:
    """One sum a category, the longest first; kernels without a floor are left out of `floor_ms`."""
    groups = defaultdict(list)
    for kernel in kernels:
        groups[kernel.category].append(kernel)
    sums = []
    for name, group in groups.items():
        known = [kernel.floor_ms for kernel in group if kernel.floor_ms is not None]
        calls, ms, share = (sum(getattr(kernel, key) for kernel in group) for key in ('calls', 'ms', 'share'))
        sums.append(Kernel('', '', name, calls, ms, share, sum(known) if known else None))
    return sorted(sums, key=lambda kernel: -kernel.ms)


def _nesting(operators: dict[int, dict]) -> tuple[dict[int, int], dict[int, float]]:
    """Which operator called each one, and each one's microseconds without those of the operators that it calls."""
    callers, own, stack = {}, {}, []
    for key, event in sorted(operators.items(), key=lambda item: (item[1]['tid'], item[1]['ts'], -item[1]['dur'])):
        while stack and (stack[-1][1] != event['tid'] or event['ts'] >= stack[-1][2]):
            stack.pop()
        if stack:
            callers[key] = stack[-1][0]
            own[callers[key]] -= event['dur']
        own[key] = event['dur']
        stack.append((key, event['tid'], event['ts'] + event['dur']))
    return callers, {key: max(time, 0.0) for key, time in own.items()}


def _without_callees(floors: dict[int, float | None], callers: dict[int, int]) -> dict[int, float | None]:
    """Each operator's floor less those of what it calls, in whose own floors its work counts already."""
    inside, left = defaultdict(float), {}
    for key in sorted(floors, reverse=True):  # callees have higher numbers
        floor, callees = floors[key], inside[key]
        left[key] = None if floor is None else max(floor - callees, 0.0)
        if key in callers:
            inside[callers[key]] += max(floor or 0.0, callees)
    return left


def _call(event: dict) -> tuple:
    """An operator's name and arguments: (type, dimensions, strides, value) each."""
    args = event['args']
    lists = (args.get(key, ()) for key in ('Input type', 'Input Dims', 'Input Strides', 'Concrete Inputs'))
    return event['name'], tuple((kind, str(dims), str(strides), value) for kind, dims, strides, value in zip(*lists))


def _floor(chain: tuple, limits: Limits) -> float | None:
    """Seconds below which no kernel carries a call out; None where no tensor of it is known.

    Args:
        chain: the call, then its callers, which are asked where it cannot be: see `_call`.
        limits: of the device.
    """
    for name, arguments in chain:
        inputs = [_argument(*argument) for argument in arguments]
        outcome = _on_meta(name, inputs)
        if outcome is not None:
            out, flops, changes = outcome
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            if name in ALLOCATES or (not changes and made and all(_shares(leaf, inputs) for leaf in made)):
                return 0.0  # memory as it was found, or a view
            # What is changed in place is read as one of the inputs, and written; `out` is one of the inputs.
            in_place = name.endswith('_') and name not in WRITES_ONLY
            written = [leaf for leaf in made if in_place or not _shares(leaf, inputs)]
            return max((_bytes(inputs) + _bytes(written)) / limits.copy, flops / limits.matmul)
        if '::' not in name:
            break
    name, arguments = chain[0]
    if not name.startswith('triton_'):
        return None
    return _bytes([_argument(*argument) for argument in arguments]) / limits.copy  # what it writes is among them


def _argument(kind: str, dims: str, strides: str, value: str) -> Any:
    """A tensor (or a list of them) on the meta device, the value, or UNRECORDED."""
    dims, strides = ast.literal_eval(dims), ast.literal_eval(strides)
    if kind in DTYPES:
        return torch.empty_strided(dims, strides, dtype=DTYPES[kind], device='meta')
    if kind == 'TensorList':
        return [torch.empty_strided(*pair, device='meta') for pair in zip(dims, strides)]
    if not value:
        return UNRECORDED
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):  # the name of something
        return value


def _bytes(values: list) -> int:
    """Of all tensors, elements that were expanded to many counting once."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return sum(
        tensor.element_size() * math.prod(n for n, stride in zip(tensor.shape, tensor.stride()) if stride)
        for tensor in tensors
        if tensor.numel()
    )


def _shares(tensor: Tensor, inputs: list) -> bool:
    storages = [leaf.untyped_storage()._cdata for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return tensor.untyped_storage()._cdata in storages


def _on_meta(name: str, inputs: list) -> tuple[Any, int, bool] | None:
    """What the operator of this name returns for these arguments, its FLOPs, and whether it changes any of them.

    None where it cannot be called.
    """
    namespace, _, operator = name.partition('::')
    packet = getattr(getattr(torch.ops, namespace), operator, None) if operator else None
    if packet is None:
        return None
    for overload in packet.overloads():
        function = getattr(packet, overload)
        parameters = function._schema.arguments
        if len(parameters) != len(inputs):
            continue
        values = [p.default_value if value is UNRECORDED else value for value, p in zip(inputs, parameters)]
        positional = [value for value, parameter in zip(values, parameters) if not parameter.kwarg_only]
        named = {parameter.name: value for value, parameter in zip(values, parameters) if parameter.kwarg_only}
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                out = function(*positional, **named)
            return out, counter.get_total_flops(), function._schema.is_mutable
        except Exception:  # arguments of another overload, or an operator without a meta kernel
            continue
    return None

"""Times and limits of a device, and the state of the machine that they belong to."""

import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import torch

__all__ = ['Limits', 'clocks', 'environment', 'percentiles', 'sample', 'states']

FLUSH_BYTES = 256 << 20  # written before each timed step: more than any cache holds


@dataclass(frozen=True)
class Limits:
    """What a device was measured to do: bytes read and written a second in a copy, operations a second in a product."""

    copy: float
    matmul: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> 'Limits':
        """Times a copy of a large buffer and a product of square matrices of `dtype`, on random numbers."""
        bytes_, n = (1 << 30, 8192) if device.type == 'cuda' else (1 << 26, 1024)
        source = torch.randn(bytes_ // 4, device=device)
        target = torch.empty_like(source)
        copy = median(sample(lambda: target.copy_(source), seconds, device))
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        matmul = median(sample(lambda: torch.mm(a, b), seconds, device))
        return cls(2 * bytes_ / (copy / 1e3), 2 * n**3 / (matmul / 1e3))


def sample(
    step: Callable[[], object], seconds: float, device: torch.device, reset: Callable[[], object] = lambda: None
) -> list[float]:
    """Milliseconds of each of some steps, 5 to 1000, that together take about `seconds`.

    On a GPU each is the time between two events around the step. The steps are queued without waiting for one another,
    so that a GPU which is slower than the queue is timed alone, and each finds its inputs in memory, not in a cache.

    Args:
        step: called for a few times before it is timed; whatever it has to compile, it should have compiled.
        seconds: a target; a slow step takes longer.
        device: of `step`.
        reset: called before each step, untimed.
    """
    if device.type != 'cuda':
        times = []
        for _ in range(_count(_seconds(step, reset, lambda: None), seconds)):
            times.append(1e3 * _seconds(step, reset, lambda: None))
        return times
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    wait = torch.cuda.synchronize
    _seconds(step, reset, wait)
    count = _count(_seconds(step, reset, wait), seconds)
    for _ in range(min(count, 3)):
        reset()
        step()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        reset()
        flush.zero_()
        start.record()
        step()
        end.record()
    wait()
    return [start.elapsed_time(end) for start, end in events]


def _seconds(step: Callable, reset: Callable, wait: Callable) -> float:
    reset()
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def _count(one: float, seconds: float) -> int:
    return int(min(max(seconds / one, 5), 1000))


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th."""
    deciles = quantiles(times, n=10, method='inclusive')
    return deciles[1], deciles[4], deciles[7]


def environment(device: torch.device) -> str:
    """The machine and versions that a table of times belongs to."""
    versions = f'torch {torch.__version__}, Python {platform.python_version()}'
    if device.type == 'cuda':
        import triton

        return f'{torch.cuda.get_device_name(device)}, triton {triton.__version__}, {versions}'
    return f'{_processor()}, {torch.get_num_threads()} threads, {versions}'


def states() -> dict[str, str]:
    """What decides on the speed of a GPU beside the model: TF32, cuDNN, attention kernels."""
    cuda = torch.backends.cuda
    attention = [name for name in ('flash', 'cudnn', 'mem_efficient', 'math') if getattr(cuda, f'{name}_sdp_enabled')()]
    return {
        'TF32 in matrix products': str(cuda.matmul.allow_tf32),
        'TF32 in convolutions': str(torch.backends.cudnn.allow_tf32),
        'float32 matmul precision': torch.get_float32_matmul_precision(),
        'reduced bf16 reductions': str(cuda.matmul.allow_bf16_reduced_precision_reduction),
        'cuDNN': f'{torch.backends.cudnn.version()}, benchmark={torch.backends.cudnn.benchmark}, '
        f'deterministic={torch.backends.cudnn.deterministic}',
        'attention kernels allowed': ', '.join(attention),
    }


def clocks() -> str:
    """Clocks, power, temperature and driver as nvidia-smi reports them now; it changes nothing."""
    if not shutil.which('nvidia-smi'):
        return 'unknown: there is no nvidia-smi'
    fields = 'clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,driver_version'
    command = ['nvidia-smi', f'--query-gpu={fields}', '--format=csv,noheader']
    query = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if query.returncode:
        return f'unknown: {query.stdout.strip() or query.stderr.strip()}'
    values = query.stdout.strip().splitlines()[torch.cuda.current_device()].split(', ')
    return ', '.join(f'{name} {value}' for name, value in zip(fields.split(','), values))


def _processor() -> str:
    try:
        with open('/proc/cpuinfo') as lines:
            return next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):  # not Linux, or a processor without a name
        return platform.processor() or platform.machine()

"""Launches of Triton kernels, in less of the host's time than Triton takes for them.

A block of ViG trains by some thirty small kernels, and where the host is slow, or small images leave the GPU little to
do, their launches decide. At each of them Triton 3.6 looks up what may have changed since the last one, and asks the
driver about each pointer. Here a launch asks for what makes it the same compiled kernel, which is called directly.

On Hopper and later a kernel is launched while the one in front of it is at work ("programmatic dependent launch"), and
waits for it in `begin`.
"""

import functools
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from .primitives import INTERPRETED, KNOWN

if KNOWN:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.language.target_info import cuda_capability_geq
ENVIRONMENT = threading.RLock()
WITHOUT_WGMMA = dict.fromkeys(('DISABLE_MMA_V3', 'DISABLE_MMA_V5'), '1')  # multiply by what all GPUs have
UNOPTIMIZED = {'DISABLE_LLVM_OPT': '1'}
OVERLAPS = tl.constexpr(KNOWN and not INTERPRETED)  # whether kernels wait in `begin`


@triton.jit
def begin(EARLY: tl.constexpr):
    """What a kernel does before it touches memory: it waits for the kernels in front of it.

    One that reads before it waits what is older than the kernel in front of it, as `hopper.bigla_out` does, relies on
    that one's own wait.

    EARLY: the next one may come as soon as all programs of this one have begun, otherwise when they have left. What
    comes early takes the places that get free first, and where it finds places for all of its programs, some
    multiprocessors have more of them than others: this costs the gradients' kernels more than coming early saves.
    """
    if OVERLAPS:  # noqa: SIM102 -- what is named below is there with it alone
        if cuda_capability_geq(9):
            gdc_wait()
            if EARLY:
                gdc_launch_dependents()


def kernel(
    fn: Callable | None = None, *, do_not_specialize: tuple[str, ...] = (), jit: Callable[..., Any] = triton.jit,
    wgmma: bool = True,
) -> Any:  # fmt: skip
    """Like `jit`, Triton's or Gluon's, for kernels whose constants come last and are given by name.

    These tell all of a tensor descriptor but its dtype. Without `wgmma` dots of many rows are done like those of few.
    """
    if fn is None:
        return functools.partial(kernel, do_not_specialize=do_not_specialize, jit=jit, wgmma=wgmma)
    jitted = jit(fn, do_not_specialize=do_not_specialize)
    return jitted if INTERPRETED or not KNOWN else Kernel(jitted, wgmma)


@contextmanager
def compiled_with(switches: dict[str, str]) -> Iterator[None]:
    """What Triton compiles in here heeds `switches`, variables of the environment, and ours one after the other.

    It has nothing else for this: what others than ours compile meanwhile heeds them, too, and is slower.
    """
    with ENVIRONMENT:  # or the second of two threads would find the first one's, and leave them there
        before = {name: os.environ.get(name) for name in switches}
        os.environ.update(switches)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def loses_bits(ptx: str) -> bool:
    """Whether LLVM made a product of 64 bits of a shift whose upper bits are to be dropped.

    Its vectorizer pairs `x & 28`, by which a thread finds its row, with `y << 1`, its column, as the shifts
    (x << 28, y << 1) in one register of 64 bits, whose lower half nobody reads; its NVPTX backend (of Triton 3.6) makes
    `mul.wide` of that, and the bits of x that leave the lower half spoil the upper one. A thread's number x has ten
    bits, which shifts by 22 keep, and no constant of ours is larger.
    """
    return any(int(n) >> 23 for n in re.findall(r'm(?:ul|ad)\.wide\.[us]32\s+%rd\d+, %r\d+, (\d+)', ptx))


@functools.lru_cache(maxsize=1 << 14, typed=True)  # 1 and 1.0 are one key otherwise
def traits(x: Any) -> Any:
    """What Triton makes a kernel of its own for: of an integer, if it is 1, divisible by 16, or wider than 32 bits."""
    if isinstance(x, int):
        return x == 1, x % 16 == 0, x.bit_length() > 31
    return tuple(map(traits, x)) if isinstance(x, tuple) else type(x)


def describer(args: tuple, general: list[bool]) -> Callable[..., tuple[tuple, tuple]]:
    """A function of a kernel's arguments that gives their traits, and the arguments with addresses for tensors.

    What is a tensor, a descriptor, a tuple of tensors or none of them is so in all launches with the same constants. So
    this is written out for them, as Triton does it, too, where a loop would ask each.

    Args:
        args: Of the first launch.
        general: Whether an integer's value is no reason for a kernel of its own.
    """
    names = [f'a{i}' for i in range(len(args))]
    lines, described, values = [], [], []
    for name, x, same in zip(names, args, general):
        tensors = [name] if isinstance(x, Tensor) else []
        if isinstance(x, tuple) and isinstance(x[0], Tensor):
            tensors = [f'{name}_{j}' for j in range(len(x))]
            lines.append(f'{", ".join(tensors)}, = {name}')
        for tensor in tensors:
            lines.append(f'p{tensor} = {tensor}.data_ptr()')
            described += f'{tensor}.dtype', f'p{tensor} % 16'
        if isinstance(x, Tensor):
            values.append(f'p{name}')
        elif isinstance(x, TensorDescriptor):  # whose address 16 divides
            described.append(f'{name}.base.dtype')
            values.append(name)
        elif tensors:
            values.append(f'({", ".join(f"p{tensor}" for tensor in tensors)},)')
        else:
            described.append(f'{name}.bit_length() > 31' if same else f'traits({name})')
            values.append(name)
    lines.append(f'return ({", ".join(described)},), ({", ".join(values)},)')
    space = {'traits': traits}
    exec(f'def describe({", ".join(names)}):\n' + '\n'.join(f'    {line}' for line in lines), space)
    return space['describe']


class Kernel:
    """A kernel, launched as ``kernel[grid](*arguments, **constants_and_options)``."""

    overlapping = True  # whether it may be launched while another one is at work

    def __init__(self, jitted: triton.JITFunction, wgmma: bool = True) -> None:
        functools.update_wrapper(self, jitted.fn)
        self.jitted, self.wgmma = jitted, wgmma
        self.variants: dict[tuple, tuple[Callable, dict[tuple, tuple | bool]]] = {}  # by constants and options

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        given = tuple(constants.items())
        if given not in self.variants:
            self.variants[given] = describer(args, [p.do_not_specialize for p in self.jitted.params]), {}
        describe, ready = self.variants[given]
        active = driver.active
        device = active.get_current_device()
        described, values = describe(*args)
        key = device, described
        hooks = triton.knobs.runtime
        direct = ready.get(key)
        if direct is None:
            self.compile(device, grid, *args, **constants)
        if not direct or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            compiled = self.jitted.run(*args, grid=grid, warmup=False, **constants)
            ready[key] = callable_directly(compiled) and (
                compiled.run,
                compiled,
                tuple(constants[p.name] for p in self.jitted.params if p.is_constexpr),
                'griddepcontrol.wait' in compiled.asm['ptx'],
            )
            return
        run, compiled, rest, waits = direct
        x, y = grid if len(grid) == 2 else (grid[0], 1)
        stream = active.get_current_stream(device)
        # Behind the function: no scratch memory; behind the metadata: nothing for hooks, of which there are none.
        run.launch(
            x, y, 1, stream, compiled.function, run.launch_cooperative_grid, waits and self.overlapping, None, None,
            compiled.packed_metadata, None, None, None, *values, *rest,
        )  # fmt: skip

    def compile(self, device: int, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Leave a kernel for these arguments with Triton, without LLVM's optimizations where these make it wrong."""
        with compiled_with({} if self.wgmma else WITHOUT_WGMMA):
            compiled = self.jitted.run(*args, grid=grid, warmup=True, **constants)
            if compiled is not None and loses_bits(compiled.asm['ptx']):
                kernels = self.jitted.device_caches[device][0]
                for key in [key for key, kernel in kernels.items() if kernel is compiled]:
                    del kernels[key]
                with compiled_with(UNOPTIMIZED):
                    compiled = self.jitted.run(*args, grid=grid, warmup=True, **constants)
                if loses_bits(compiled.asm['ptx']):
                    raise RuntimeError(f"LLVM compiles {self.__name__} wrong: use impl='chunked', and report this")


@contextmanager
def one_by_one() -> Iterator[None]:
    """Kernels launched in here begin when those in front are done, so that a profiler can tell their times apart."""
    before, Kernel.overlapping = Kernel.overlapping, False
    try:
        yield
    finally:
        Kernel.overlapping = before


def callable_directly(compiled: Any) -> bool:
    """Whether this is a kernel that needs no scratch memory; tests compile without launching, and get none."""
    metadata = getattr(compiled, 'metadata', None)
    return metadata is not None and not metadata.global_scratch_size and not metadata.profile_scratch_size

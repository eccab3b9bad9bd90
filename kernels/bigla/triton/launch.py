"""Launches of Triton kernels, in less of the host's time than Triton takes for them.

A block of ViG trains by some thirty small kernels, and where the host is slow, or small images leave the GPU little to
do, their launches decide. Triton 3.6 takes 40 us for a launch with thirty arguments: it looks up what may have changed
since the last one, and asks the driver about each pointer. What makes two launches the same compiled kernel can be had
for a quarter of that, and what Triton compiled is then called directly.
"""

import functools
from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor
from triton.runtime.driver import driver

from .primitives import INTERPRETED

# Whose compiled kernels are called directly, with the arguments that they take there.
KNOWN = triton.__version__.startswith('3.6.')


def kernel(fn: Callable | None = None, *, do_not_specialize: tuple[str, ...] = ()) -> Any:
    """Like `triton.jit`, for kernels whose constants come last and are given by name."""
    if fn is None:
        return functools.partial(kernel, do_not_specialize=do_not_specialize)
    jitted = triton.jit(fn, do_not_specialize=do_not_specialize)
    return jitted if INTERPRETED or not KNOWN else Kernel(jitted)


@functools.lru_cache(maxsize=1 << 14, typed=True)  # 1 and 1.0 are one key otherwise
def traits(x: Any) -> Any:
    """What Triton makes a kernel of its own for: of an integer, if it is 1, divisible by 16, or wider than 32 bits."""
    if isinstance(x, int):
        return x == 1, x % 16 == 0, x.bit_length() > 31
    return tuple(map(traits, x)) if isinstance(x, tuple) else type(x)


class Kernel:
    """A kernel, launched as ``kernel[grid](*arguments, **constants_and_options)``."""

    def __init__(self, jitted: triton.JITFunction) -> None:
        functools.update_wrapper(self, jitted.fn)
        self.jitted = jitted
        self.constants = [p.name for p in jitted.params if p.is_constexpr]
        self.general = [p.do_not_specialize for p in jitted.params]
        self.ready: dict[tuple, tuple] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        active = driver.active
        device = active.get_current_device()
        key: list[Any] = [device]
        values = self.describe(args, key)
        key = (*key, *constants.items())
        ready = self.ready.get(key)
        hooks = triton.knobs.runtime
        if ready is None or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            compiled = self.jitted.run(*args, grid=grid, warmup=False, **constants)
            self.remember(key, compiled, constants)
            return
        run, function, cooperative, dependent, metadata, rest = ready
        x, y = grid if len(grid) == 2 else (grid[0], 1)
        stream = active.get_current_stream(device)
        # Behind the function: no scratch memory; behind the metadata: nothing for hooks, of which there are none.
        run(x, y, 1, stream, function, cooperative, dependent, None, None, metadata, None, None, None, *values, *rest)

    def describe(self, args: tuple, key: list[Any]) -> list[Any]:
        """`args` with addresses for tensors; what Triton would compile for is put into `key`."""
        values = []
        for general, x in zip(self.general, args):
            if isinstance(x, Tensor):
                address = x.data_ptr()
                key += x.dtype, address % 16 == 0
                values.append(address)
            elif isinstance(x, tuple) and isinstance(x[0], Tensor):
                addresses = tuple([y.data_ptr() for y in x])
                key += [y.dtype for y in x]
                key += [address % 16 == 0 for address in addresses]
                values.append(addresses)
            else:
                key.append(x.bit_length() > 31 if general else traits(x))
                values.append(x)
        return values

    def remember(self, key: tuple, compiled: Any, constants: dict[str, Any]) -> None:
        metadata = getattr(compiled, 'metadata', None)
        if metadata is None or metadata.global_scratch_size or metadata.profile_scratch_size:
            return
        run = compiled.run
        rest = tuple(constants[name] for name in self.constants)
        self.ready[key] = (
            run.launch, compiled.function, run.launch_cooperative_grid, run.launch_pdl, compiled.packed_metadata, rest
        )  # fmt: skip

"""Launches around Triton's own: which of them are the same compiled kernel, and what it is called with."""

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip('triton')

from bigla.triton import launch  # noqa: E402

PARAMS = [('x', False, False), ('pair', False, False), ('s', False, False), ('n', False, True), ('f', False, False)]
PARAMS += [('d', False, False), ('BLOCK', True, False)]


class Jitted:
    """Stands for what `triton.jit` makes; counts what it compiles and what it launches."""

    fn = staticmethod(lambda: None)
    params = [SimpleNamespace(name=n, is_constexpr=c, do_not_specialize=g) for n, c, g in PARAMS]

    def __init__(self, scratch: int = 0, ptx: str = '') -> None:
        self.compiled, self.launched, self.called, self.scratch, self.asm = 0, 0, [], scratch, dict(ptx=ptx)
        self.device_caches = {0: ({},), 1: ({},)}

    def run(self, *args, warmup, **constants):
        self.compiled += warmup
        self.launched += not warmup
        metadata = SimpleNamespace(global_scratch_size=self.scratch, profile_scratch_size=0)
        runner = SimpleNamespace(launch=lambda *args: self.called.append(args), launch_cooperative_grid=False)
        return SimpleNamespace(
            metadata=metadata, run=runner, function='function', packed_metadata='packed', asm=self.asm
        )


@pytest.fixture
def driver(monkeypatch):
    state = SimpleNamespace(device=0)
    active = SimpleNamespace(
        get_current_device=lambda: state.device, get_current_stream=lambda device: f'stream {device}'
    )
    monkeypatch.setattr(launch, 'driver', SimpleNamespace(active=active))
    return state


X = torch.zeros(64)


def descriptor(x):
    gluon = pytest.importorskip('triton.experimental.gluon.nvidia.hopper')
    layout = pytest.importorskip('triton.experimental.gluon.language').NVMMASharedLayout(32, 8 * x.itemsize, 2)
    return gluon.TensorDescriptor.from_tensor(x.view(-1, 8), [8, 8], layout)


D, HALF, ELSEWHERE = (descriptor(x) for x in (X, X.half(), X[16:]))


def arguments(x=X, pair=(X, X), s=(160, 32, 3), n=7, f=0.5, d=D):
    return x, pair, s, n, f, d


@pytest.mark.parametrize('fails', [False, True])
def test_without_wgmma(fails, driver, monkeypatch):
    """Triton is told while it compiles, and what the environment said before is there afterwards."""
    monkeypatch.setenv('DISABLE_MMA_V3', '0')
    monkeypatch.delenv('DISABLE_MMA_V5', raising=False)
    seen = []

    class Told(Jitted):
        def run(self, *args, **options):
            seen.append([os.environ.get(name) for name in ('DISABLE_MMA_V3', 'DISABLE_MMA_V5')])
            if fails:
                raise RuntimeError('no')
            return super().run(*args, **options)

    for wgmma in (False, True):
        with pytest.raises(RuntimeError) if fails else nullcontext():
            launch.Kernel(Told(), wgmma)[1,](*arguments(), BLOCK=32)
        assert os.environ['DISABLE_MMA_V3'] == '0' and 'DISABLE_MMA_V5' not in os.environ
    assert seen[:: 1 if fails else 2] == [['1', '1'], ['0', None]]  # each second time it only launches


def test_what_loses_bits_is_compiled_again(driver):
    """A factor that leaves 32 bits; that of an offset, or of 32 bits, does not."""
    wrong = 'mul.wide.u32 \t%rd19, %r1, 268435456;'
    assert launch.loses_bits(wrong)
    assert launch.loses_bits('mad.wide.u32 %rd19, %r1, 8388608, %rd2;')
    for right in (
        'mul.wide.u32 %rd1, %r1, 4194304;',
        'mul.wide.u32 %rd1, %r1, %r2;',
        'mul.lo.s32 %r1, %r2, 268435456;',
    ):
        assert not launch.loses_bits(right)
    seen = []

    class Wrong(Jitted):
        def run(self, *args, warmup, **options):
            if warmup:
                optimized = 'DISABLE_LLVM_OPT' not in os.environ
                kernel = super().run(*args, warmup=True, **options)
                kernel.asm = dict(ptx=wrong if optimized else '')
                seen.append((optimized, os.environ.get('DISABLE_MMA_V3')))
                self.device_caches[0][0][optimized] = kernel
            [kernel] = self.device_caches[0][0].values()
            return kernel

    jitted = Wrong()
    kernel = launch.Kernel(jitted, wgmma=False)
    for _ in range(2):
        kernel[5,](*arguments(), BLOCK=32)
    assert seen == [(True, '1'), (False, '1')] and list(jitted.device_caches[0][0]) == [False]
    assert len(jitted.called) == 1 and 'DISABLE_LLVM_OPT' not in os.environ


def test_the_second_launch_is_direct(driver):
    jitted = Jitted()
    kernel = launch.Kernel(jitted)
    for grid in ((5,), (6, 2)):
        kernel[grid](*arguments(n=grid[0]), BLOCK=32, num_warps=4)
    head = (6, 2, 1, 'stream 0', 'function', False, False, None, None, 'packed', None, None, None)
    address = X.data_ptr()
    assert jitted.compiled == 1
    assert jitted.called == [(*head, address, (address, address), (160, 32, 3), 6, 0.5, D, 32)]


@pytest.mark.parametrize('waits', [True, False])
def test_kernels_that_wait_are_launched_early(waits, driver):
    """Unless they are to be told apart."""
    jitted = Jitted(ptx='griddepcontrol.wait;' if waits else 'ret;')
    kernel = launch.Kernel(jitted)
    for _ in range(2):
        kernel[5,](*arguments(), BLOCK=32)
    with launch.one_by_one():
        kernel[5,](*arguments(), BLOCK=32)
    kernel[5,](*arguments(), BLOCK=32)
    assert [args[6] for args in jitted.called] == [waits, False, waits]


@pytest.mark.parametrize(
    'change',
    [
        dict(x=X[1:]),  # at an address that 16 does not divide
        dict(x=X.half()),
        dict(pair=(X, X.half())),
        dict(pair=(X, X[1:])),
        dict(s=(160, 1, 3)),
        dict(s=(160, 33, 3)),
        dict(s=(160, 2**31, 3)),
        dict(n=2**31),
        dict(f=1),
        dict(d=HALF),
        dict(BLOCK=64),
        dict(num_warps=8),
        dict(device=1),
    ],
    ids=str,
)
def test_a_kernel_of_its_own(change, driver):
    jitted = Jitted()
    kernel = launch.Kernel(jitted)
    options = dict(BLOCK=32, num_warps=4)
    kernel[5,](*arguments(f=1.0), **options)
    driver.device = change.pop('device', 0)
    options |= {name: change.pop(name) for name in list(change) if name in options}
    for _ in range(2):
        kernel[5,](*arguments(**{'f': 1.0, **change}), **options)
    assert jitted.compiled == 2 and len(jitted.called) == 1


@pytest.mark.parametrize(
    'change',
    [dict(x=X[16:]), dict(s=(16, 48, 5)), dict(n=1), dict(n=16), dict(f=2.0), dict(d=ELSEWHERE)],
    ids=str,
)
def test_the_same_kernel(change, driver):
    jitted = Jitted()
    kernel = launch.Kernel(jitted)
    for more in ({}, change):
        kernel[5,](*arguments(**more), BLOCK=32)
    assert jitted.compiled == 1 and len(jitted.called) == 1


def test_triton_launches_what_needs_more(driver, monkeypatch):
    """Scratch memory; hooks of a profiler, which are to be called; what was not compiled to be launched."""
    jitted = Jitted(scratch=128)
    kernel = launch.Kernel(jitted)
    for _ in range(2):
        kernel[5,](*arguments(), BLOCK=32)
    assert jitted.launched == 2 and not jitted.called
    jitted = Jitted()
    kernel = launch.Kernel(jitted)
    for calls in ([], [print]):
        monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, 'calls', calls)
        kernel[5,](*arguments(), BLOCK=32)
    assert jitted.launched == 2 and not jitted.called
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, 'calls', [])
    run = jitted.run

    def only_compiled(*args, warmup, **options):
        return run(*args, warmup=True, **options) if warmup else None

    monkeypatch.setattr(jitted, 'run', only_compiled)
    kernel[5,](*arguments(x=X.half()), BLOCK=32)
    kernel[5,](*arguments(x=X.half()), BLOCK=32)
    assert not jitted.called


def test_another_triton_is_left_alone(monkeypatch):
    def kernel(x, BLOCK: triton.language.constexpr):
        pass

    assert isinstance(launch.kernel(kernel), launch.Kernel) == launch.KNOWN
    monkeypatch.setattr(launch, 'KNOWN', False)
    assert isinstance(launch.kernel(kernel), triton.JITFunction)


def test_without_gluon():
    """Versions of Triton that lack it have all kernels but Hopper's."""
    hide = "import sys, triton; sys.modules['triton.experimental'] = None; triton.__version__ = '3.5.1'"
    code = f'{hide}; import bigla.triton; print("bigla.triton.hopper" in sys.modules)'
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == 'False', done.stderr

"""Inputs and measures that the tests of every implementation share."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from bigla import (
    add_norm,
    add_pos_embed,
    bigla,
    block,
    conv_norm,
    gated_mlp,
    norm_depthwise_conv,
    residual_mlp,
    token_mixer,
)

FEW = 8  # B * L * nh
NAMES = ('q', 'k', 'v', 'g_fwd', 'g_bwd')

# Log decays from standard normal and uniform draws n, u. 'model' is what a ViG makes of its gate logits; 'shut' has
# channels that forget everything at some steps, 'open' channels that forget nothing but for one step in fifty.
GATES = {
    'model': lambda n, u: F.logsigmoid(2 * n) / 16,
    'weak': lambda n, u: F.logsigmoid(n + 8) / 16,
    'zero': lambda n, u: 0 * n,
    'strong': lambda n, u: -50 * u,
    'constant': lambda n, u: 0 * n - 50,
    'mixed': lambda n, u: torch.where(u < 0.05, -50.0, F.logsigmoid(2 * n) / 16),
    'open': lambda n, u: torch.where(u < 0.02, -1e4, 0 * n),
    'shut': lambda n, u: torch.where(u < 0.05, -torch.inf, F.logsigmoid(n) / 16),
}


@pytest.fixture
def without_hopper(monkeypatch) -> Callable[[], None]:
    """Called, has the operator and the mixer done by the kernels that all GPUs have."""

    def without_hopper() -> None:
        monkeypatch.setattr('bigla.triton.primitives.hopper_takes', lambda *_: False)

    return without_hopper


@pytest.fixture(params=['few chunks', 'many chunks'])
def regime(request, without_hopper, monkeypatch) -> str:
    """Hard chunks are done by the output kernel, or by one of their own."""
    without_hopper()
    monkeypatch.setattr('bigla.triton.forward.FEW', 10**9 if request.param == 'few chunks' else 0)
    return request.param


@pytest.fixture
def long_chunks(monkeypatch) -> None:
    """Of 64 tokens, however few there are, of any dtype and with any Triton, by its kernels; of the forward alone."""
    from bigla.triton import forward, primitives

    def longer_chunk(C, q, *_):
        return primitives.LONG[primitives.block(q.shape[-1])].C, False

    monkeypatch.setattr(forward, 'longer_chunk', longer_chunk)


@pytest.fixture
def hopper() -> None:
    """A GPU that Hopper's kernels are for, and the version of Triton that they are written in."""
    from bigla.triton import primitives

    if not (primitives.KNOWN and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)):
        pytest.skip('needs an H100 or H200, and Triton 3.6')


@pytest.fixture
def hopper_chunks(hopper, monkeypatch) -> None:
    """Chunks of 64 tokens, by Hopper's kernels, of all sequences of more than 32."""
    from bigla.triton import primitives

    monkeypatch.setattr(primitives, 'SHORT_ON_HOPPER', dict.fromkeys(primitives.LONG, 32))
    monkeypatch.setattr(primitives, 'WHOLE', {})


@pytest.fixture
def whole_sequences(hopper, monkeypatch) -> None:
    """Short sequences without gradients, however few, are done by one program each, and nothing else can do them."""
    from bigla.triton import forward, primitives

    monkeypatch.setattr(primitives, 'WHOLE_FROM', 1)
    monkeypatch.setattr(forward, 'states', None)
    monkeypatch.setattr(forward, 'out_kernel', None)


@pytest.fixture(params=['walk', 'scan'])
def states(request, without_hopper, monkeypatch) -> str:
    """Those of few chunks are made by programs that walk, however few of them, or by a scan."""
    without_hopper()
    monkeypatch.setattr('bigla.triton.forward.WALKERS', 0 if request.param == 'walk' else 10**9)
    return request.param


@pytest.fixture(params=GATES)
def gates(request) -> str:
    return request.param


@pytest.fixture
def make_inputs() -> Callable[..., list[Tensor]]:
    """`make(B, L, nh, K, V)` gives q, k, v, g_fwd, g_bwd as leaves that require gradients."""

    def make(B=2, L=65, nh=2, K=5, V=7, *, gates='model', dtype=torch.float64, seed=0) -> list[Tensor]:
        rng = torch.Generator().manual_seed(seed)

        def draw(width: int, sample=torch.randn) -> Tensor:
            return sample(B, L, nh, width, generator=rng, dtype=torch.float64)

        inputs = [draw(K), draw(K), draw(V)] + [GATES[gates](draw(K), draw(K, torch.rand)) for _ in range(2)]
        return [x.to(dtype).requires_grad_() for x in inputs]

    return make


@pytest.fixture
def make_mixer() -> Callable[..., list[Tensor]]:
    """`make(B, L, dims, num_heads, rank)` gives the seven tensors of `bigla_mixer` as leaves that require gradients."""

    def make(B=2, L=5, dims=24, num_heads=2, rank=3, *, dtype=torch.float32, seed=0) -> list[Tensor]:
        rng = torch.Generator().manual_seed(seed)
        V = dims // num_heads
        shapes = (B, L, 3 * dims + rank), (B, L, dims), (dims, rank), (dims,), (dims,), (V,), (V,)
        tensors = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
        return [x.to(dtype).requires_grad_() for x in tensors]

    return make


def convolved(C: int, D: int, side: int, H: int, W: int, image: bool = False) -> list[Tensor]:
    """The five tensors of `conv_norm` for two grids; those of an image are a view of (B, C, H, W)."""
    x = torch.randn(2, C, H, W).permute(0, 2, 3, 1) if image else torch.randn(2, H, W, C)
    return [x, torch.randn(D, C, side, side) / (side * C**0.5), *(torch.randn(D) for _ in range(3))]


def half_block_tensors(*shape: int, H: int, bias: bool = False, scale: bool = False) -> list[Tensor | None]:
    """The tensors of `residual_mlp`, without those factors that a branch may have."""
    C = shape[-1]
    vectors = torch.randn(C), torch.randn(C) if bias else None
    matrices = torch.randn(2 * H, C) / C**0.5, torch.randn(C, H) / H**0.5
    return [*torch.randn(2, *shape), *vectors, *matrices, *([torch.rand(shape[0])] if scale else [])]


def first_half_tensors(*shape: int, num_heads: int, rank: int, bias: bool = False) -> list[Tensor | None]:
    """The tensors of `token_mixer`."""
    C = shape[-1]
    vectors = torch.randn(C), torch.randn(C) if bias else None
    matrices = [torch.randn(rows, C) / C**0.5 for rows in (2 * C, C, rank)]
    ends = torch.randn(C, rank) / rank**0.5, *torch.randn(2, C), *torch.randn(2, C // num_heads)
    return [torch.randn(shape), *vectors, torch.randn(C, 1, 3, 3) / 3, *matrices, *ends, torch.randn(C, C) / C**0.5]


def block_tensors(*shape: int, num_heads: int, rank: int, H: int, bias: bool = False) -> list[Tensor | None]:
    """The tensors of `block` without factors."""
    halves = (
        first_half_tensors(*shape, num_heads=num_heads, rank=rank, bias=bias),
        half_block_tensors(*shape, H=H, bias=bias),
    )
    return [*halves[0], *halves[1][2:]]


# What the fused functions around the mixer are tested on: the function, its tensors, its options.
PARTS = {
    'rms': (add_norm, lambda: [torch.randn(2, 3, 37, 96), torch.randn(2, 3, 37, 96), torch.randn(96)], {}),
    'layer': (add_norm, lambda: [*torch.randn(2, 5, 40), *torch.randn(2, 40)], {}),
    'layer alone': (add_norm, lambda: [torch.randn(300, 17), None, *torch.randn(2, 17)], {}),
    'mlp': (gated_mlp, lambda: [torch.randn(2, 75, 48), torch.randn(256, 48), torch.randn(48, 128)], {}),
    'odd mlp': (gated_mlp, lambda: [torch.randn(3, 11), torch.randn(14, 11), torch.randn(11, 7)], {}),
    'half block': (residual_mlp, lambda: half_block_tensors(3, 75, 96, H=80, bias=True), {}),
    'odd half block': (residual_mlp, lambda: half_block_tensors(2, 5, 11, H=7), {}),
    'wide half block': (residual_mlp, lambda: half_block_tensors(2, 9, 300, H=40), {}),
    'first half': (
        token_mixer,
        lambda: first_half_tensors(2, 7, 9, 64, num_heads=2, rank=16, bias=True),
        dict(num_heads=2),
    ),
    'odd first half': (
        token_mixer,
        lambda: first_half_tensors(1, 5, 3, 42, num_heads=3, rank=5),
        dict(num_heads=3, act=True),
    ),
    'block': (
        block,
        lambda: block_tensors(2, 7, 9, 64, num_heads=2, rank=16, H=48, bias=True),
        dict(num_heads=2, act=True),
    ),
    'odd block': (block, lambda: block_tensors(1, 5, 3, 42, num_heads=3, rank=5, H=11), dict(num_heads=3)),
    'layer conv': (
        norm_depthwise_conv,
        lambda: [torch.randn(2, 7, 9, 40), *torch.randn(2, 40), torch.randn(40, 1, 3, 3) / 3],
        dict(act=True),
    ),
    'rms conv': (
        norm_depthwise_conv,
        lambda: [torch.randn(1, 5, 4, 9), torch.randn(9), None, torch.randn(9, 1, 3, 3) / 3],
        {},
    ),
    'image': (conv_norm, lambda: convolved(3, 24, 9, 31, 41, True), dict(stride=8, act='silu')),
    'grid': (conv_norm, lambda: convolved(48, 96, 3, 10, 7), dict(stride=2, act='gelu')),
    'one channel': (conv_norm, lambda: convolved(1, 8, 3, 9, 9), dict(stride=1)),
    'wide grid': (conv_norm, lambda: convolved(6, 140, 3, 5, 8), dict(stride=2)),
}


@pytest.fixture
def grids() -> Callable[..., list[Tensor]]:
    return convolved


@pytest.fixture
def half_block() -> Callable[..., list[Tensor | None]]:
    return half_block_tensors


@pytest.fixture
def whole_block() -> Callable[..., list[Tensor | None]]:
    return block_tensors


@pytest.fixture
def first_half() -> Callable[..., list[Tensor | None]]:
    return first_half_tensors


@pytest.fixture(params=PARTS)
def part(request) -> tuple[Callable, list[Tensor | None]]:
    """A fused function, `fn(*tensors, impl=...)` giving a tuple, and its tensors in float32."""
    fn, make, options = PARTS[request.param]
    torch.manual_seed(0)

    def call(*tensors: Tensor | None, impl: str | None = None, **more) -> tuple[Tensor, ...]:
        out = fn(*tensors, **options, **more, impl=impl)
        return out if isinstance(out, tuple) else (out,)

    call.name = fn.__name__
    return call, make()


@pytest.fixture
def derive() -> Callable[..., list[Tensor]]:
    """`derive(fn, tensors)` gives the results and the gradients of all tensors under fixed gradients of the results."""

    def derive(fn: Callable, tensors: list[Tensor | None]) -> list[Tensor]:
        tensors = [x if x is None else x.detach().requires_grad_() for x in tensors]
        out = fn(*tensors)
        rng = torch.Generator().manual_seed(1)
        grads = [torch.randn(y.shape, generator=rng, dtype=torch.float64).to(y) for y in out]
        return [*(y.detach() for y in out), *torch.autograd.grad(out, [x for x in tensors if x is not None], grads)]

    return derive


@pytest.fixture
def decay_grads() -> Callable[..., None]:
    """`decay_grads(M, C, R, dtype, device)` checks gradients of the low-rank decay of M tokens; the same bits twice."""
    from bigla.triton.decay import launch_decay_grad
    from bigla.triton.sums import Sums

    def check(M: int, C: int, R: int, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        dx, rows = torch.randn(M, C, device=device).to(dtype), torch.randn(M, 2 * R + 9, device=device).to(dtype)
        weight, low = torch.randn(C, R, device=device) / C**0.5, rows[:, :R]
        found = []
        for _ in range(2):
            dlow = torch.empty_like(rows)[:, R : 2 * R]
            with Sums() as sums:
                found.append((dlow, *launch_decay_grad(sums, dx, low, weight, dlow)))
        assert all(a.equal(b) for a, b in zip(*found))
        dx, low, weight = dx.double(), low.double(), weight.to(dtype).double()
        for got, want in zip(found[0], (dx @ weight, dx.t() @ low, dx.sum(0)), strict=True):
            assert (got.double() - want).norm() <= (2.0**-8 if got.dtype == dtype else 1e-4) * want.norm()

    return check


@pytest.fixture
def casts(derive) -> Callable[[str, str], None]:
    """`casts(impl, device)` checks that `add_norm` casts its sum when the norm is made, gradients and all."""

    def check(impl: str, device: str) -> None:
        torch.manual_seed(0)
        x, branch, *vectors = (t.to(device) for t in (*torch.randn(2, 300, 40), *torch.randn(2, 40)))
        for tensors in ([x, None, *vectors], [x, branch, *vectors], [x, None, vectors[0], None]):
            total, y = add_norm(*tensors, sum_dtype=torch.float16, impl=impl)
            want = add_norm(*tensors, impl=impl)
            assert total.dtype == torch.float16 and total.equal(want[0].half())
            torch.testing.assert_close(y, want[1])  # two kernels compiled apart may differ in the last bit

            def at_once(*t: Tensor | None) -> tuple[Tensor, ...]:
                return add_norm(*t, sum_dtype=torch.float16, impl=impl)

            def one_by_one(*t: Tensor | None) -> tuple[Tensor, ...]:
                total, y = add_norm(*t, impl='reference')
                return total.half(), y

            for a, b in zip(derive(at_once, tensors), derive(one_by_one, tensors), strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
            for i in range(2):  # of which nobody uses the other one
                t = [t if t is None else t.clone().requires_grad_() for t in tensors]
                mine, theirs = (
                    torch.autograd.grad(fn(*t)[i].float().square().sum(), t[0])[0] for fn in (at_once, one_by_one)
                )
                torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)

    return check


@pytest.fixture
def embeds(derive) -> Callable[[str], None]:
    """`embeds(device)` checks `add_pos_embed` by Triton: the bits and gradients of a plain sum, and the norm of it."""

    def plain(x: Tensor, pos_embed: Tensor) -> tuple[Tensor]:
        return (x + pos_embed,)

    def check(device: str) -> None:
        torch.manual_seed(0)
        shapes = (3, 7, 43, 40), (1, 7, 43, 40), (40,), (40,)
        x, pos_embed, weight, bias = (torch.randn(shape).to(device).requires_grad_() for shape in shapes)
        single, half = torch.float32, torch.float16
        dtypes = (single, single, half), (half, single, single), (half, half, half)
        for B, some, (stream, own, inner) in itertools.product((1, 3), (bias, None), dtypes):
            tensors = [x[:B].to(stream), pos_embed.to(own)]
            embed = partial(add_pos_embed, norm_weight=weight, norm_bias=some, eps=1e-3, inner=inner, impl='triton')
            total, normed = embed(*tensors)
            assert total.requires_grad and not normed.requires_grad and normed.dtype == inner
            want = add_norm(total, None, weight, some, eps=1e-3, dtype=inner, impl='triton')[1]
            torch.testing.assert_close(normed, want)  # two kernels compiled apart may differ in the last bit
            got, want = derive(lambda *t, embed=embed: embed(*t)[:1], tensors), derive(plain, tensors)
            assert all(a.dtype == b.dtype and a.equal(b) for a, b in zip(got, want, strict=True))

    return check


@pytest.fixture
def run() -> Callable[..., list[Tensor]]:
    """`run(fn, inputs)` gives the output and the gradients of the five inputs under one fixed output gradient.

    `positive` takes its absolute value.
    """

    def run(fn: Callable[..., Tensor], inputs: list[Tensor], positive: bool = False) -> list[Tensor]:
        out = fn(*inputs)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        grad = grad.abs() if positive else grad
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    return run


@pytest.fixture
def errors() -> Callable[..., dict[str, float]]:
    """`errors(got, want)` gives relative Frobenius errors, output and gradients, by name."""

    def errors(got: list[Tensor], want: list[Tensor]) -> dict[str, float]:
        names = ('o', *(f'd{name}' for name in NAMES))
        tiny = torch.finfo(torch.float64).tiny
        return {
            name: ((a.double() - b.double()).norm() / b.double().norm().clamp_min(tiny)).item()
            for name, a, b in zip(names, got, want, strict=True)
        }

    return errors


@pytest.fixture
def check_budget(run, errors) -> Callable[..., None]:
    """`check_budget(fn, inputs)`: no error beyond twice another implementation's in the same precision, and a band.

    Errors are those of the output and of every gradient against float64; the band is `roundings` of the output's dtype.
    `peer` is the other implementation, `oracle` the one that is exact in float64: the recurrence, or 'chunked', which
    equals it, where the recurrence would take too long. Of up to `FEW` tokens and heads one sum of products can be all
    there is, with no other to average: the band then is of its terms, not of what they leave where they cancel.
    """

    def check(fn: Callable[..., Tensor], inputs: list[Tensor], roundings=1, peer='chunked', oracle='reference') -> None:
        got = run(fn, inputs)
        assert all(x.isfinite().all() for x in got)
        doubles = [x.detach().double().requires_grad_() for x in inputs]
        exact = run(lambda *x: bigla(*x, impl=oracle), doubles)
        allowed = errors(run(lambda *x: bigla(*x, impl=peer), inputs), exact)
        mine = errors(got, exact)
        band = dict.fromkeys(mine, roundings * torch.finfo(got[0].dtype).eps / 2)
        if 0 < got[0][..., 0].numel() <= FEW:
            # A gate is an exponent, not a factor: it keeps its sign, and every term is positive.
            terms = run(lambda *x: bigla(*(y.abs() for y in x[:3]), *x[3:], impl=oracle), doubles, positive=True)
            tiny = torch.finfo(torch.float64).tiny
            for name, whole, left in zip(band, terms, exact, strict=True):
                band[name] *= max(1.0, (whole.norm() / left.norm().clamp_min(tiny)).item())
        worst = {name: (mine[name], allowed[name]) for name in mine if mine[name] > 2 * allowed[name] + band[name]}
        assert not worst, worst

    return check


LAYOUTS = ('contiguous', 'packed', 'head-major', 'every other column', 'odd offset')


@pytest.fixture
def draw_case(make_inputs) -> Callable[..., tuple[list[Tensor], str]]:
    """`draw_case(data, max_length, dtypes)` draws inputs by Hypothesis, in views of any layout; and which gates."""

    def draw(data, max_length: int, dtypes: tuple[torch.dtype, ...]) -> tuple[list[Tensor], str]:
        def pick(strategy, name):
            return data.draw(strategy, label=name)

        B = pick(st.sampled_from([0, 1, 1, 2, 3]), 'B')
        L = pick(st.one_of(st.integers(1, 40), st.integers(1, max_length)), 'L')
        nh, K, V = pick(st.integers(1, 3), 'nh'), pick(st.integers(1, 33), 'K'), pick(st.integers(1, 33), 'V')
        gates, dtype = pick(st.sampled_from(list(GATES)), 'gates'), pick(st.sampled_from(dtypes), 'dtype')
        layout, seed = pick(st.sampled_from(LAYOUTS), 'layout'), pick(st.integers(0, 2**31), 'seed')
        inputs = [x.detach() for x in make_inputs(B, L, nh, K, V, gates=gates, dtype=dtype, seed=seed)]
        if layout == 'packed':
            inputs = list(torch.cat(inputs, -1).split([K, K, V, K, K], -1))
        elif layout == 'head-major':
            inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        elif layout == 'every other column':
            inputs = [x.repeat_interleave(2, -1)[..., ::2] for x in inputs]
        elif layout == 'odd offset':
            inputs = [F.pad(x, (1, 2))[..., 1:-2] for x in inputs]
        return [x.requires_grad_() for x in inputs], gates

    return draw

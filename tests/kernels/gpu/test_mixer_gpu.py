"""The fused functions of a block on a GPU: accuracy, the same bits every time, how PyTorch takes them."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bigla import add_norm, bigla_mixer, block, conv_norm, depthwise_conv, gated_mlp, residual_mlp
from bigla.triton.launch import KNOWN
from bigla.triton.mlp import Half, launch_mlp_grad, launch_projected_mlp, launch_swiglu
from bigla.triton.norm import Norm
from bigla.triton.stem import launch_conv_weight_grad, out_side
from bigla.triton.sums import Sums

if KNOWN:
    from bigla.triton import hopper

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _fused_however_few(monkeypatch):
    monkeypatch.setattr('bigla.triton.mlp.FEWEST', 0)
    if KNOWN:
        monkeypatch.setattr('bigla.triton.hopper.FEWEST', dict.fromkeys(hopper.FEWEST, 0))


on_hopper = pytest.mark.skipif(
    not (KNOWN and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)),
    reason='needs an H100 or H200, and Triton 3.6',
)


@pytest.fixture
def by_both(monkeypatch):
    """`by_both(launcher, what, run)` gives what `run` does by Hopper's launcher, and by the other kernels."""

    def both(launcher, what, run):
        with monkeypatch.context() as patch:
            patch.setattr(hopper, launcher, None)
            with pytest.raises(TypeError):  # it is what runs below
                run()
            patch.setitem(hopper.FEWEST, what, 10**9)
            peer = run()
        return run(), peer

    return both


DTYPES = pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=['fp32', 'fp16', 'bf16'])
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def gradients(fn, args):
    y = fn(*args)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, args, dy)]


def check(fn, args, dtype, roundings=1):
    """Error against float64 at most twice that of PyTorch's own operators in the same precision plus `roundings`."""
    wide = [x.detach().double().requires_grad_() for x in args]
    want = gradients(lambda *x: fn(*x, impl='reference'), wide)
    got, peer = (gradients(lambda *x, impl=impl: fn(*x, impl=impl), args) for impl in ('triton', 'chunked'))
    for i, (a, b, c) in enumerate(zip(got, peer, want, strict=True)):
        assert a.isfinite().all()
        size = c.norm().clamp_min(torch.finfo(torch.float64).tiny)  # one token has no gradient of its decays
        mine, theirs = ((x.double() - c).norm() / size for x in (a, b))
        assert mine <= 2 * theirs + roundings * ROUNDING[dtype], (i, mine, theirs)


def on_gpu(tensors, dtype):
    """The first tensor or two in `dtype`, parameters in float32."""
    return [x.detach().to('cuda', dtype if x.ndim > 2 else None).requires_grad_() for x in tensors]


@DTYPES
@pytest.mark.parametrize('act', [False, True])
@pytest.mark.parametrize('shape', [(2, 14, 14, 192), (1, 200, 336, 96), (3, 5, 7, 70), (1, 1, 1, 3)])
def test_conv(shape, act, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, device='cuda', dtype=dtype, requires_grad=True)
    weight = torch.randn(shape[-1], 1, 3, 3, device='cuda', requires_grad=True)
    check(lambda *a, impl: depthwise_conv(*a, act=act, impl=impl), [x, weight], dtype, 2)


@DTYPES
@pytest.mark.parametrize('act', [False, True])
@pytest.mark.parametrize(
    'B, L, dims, num_heads', [(2, 1, 192, 3), (4, 196, 192, 3), (2, 1000, 96, 3), (3, 49, 768, 24), (1, 130, 36, 3)]
)
def test_mixer(B, L, dims, num_heads, act, dtype, make_mixer):
    args = on_gpu(make_mixer(B, L, dims, num_heads, 16), dtype)
    check(lambda *a, impl: bigla_mixer(*a, num_heads=num_heads, act=act, impl=impl), args, dtype, 2)


@pytest.mark.parametrize('L', [100, 1000])
@pytest.mark.parametrize('dims', [192, 96])
def test_long_chunks(dims, L, hopper_chunks, make_mixer, monkeypatch):
    """With gradients; their gates are made of the low-rank decay."""
    args = on_gpu(make_mixer(2, L, dims, 3, 16), torch.bfloat16)
    check(lambda *a, impl: bigla_mixer(*a, num_heads=3, impl=impl), args, torch.bfloat16, 2)
    monkeypatch.setattr('bigla.triton.hopper.launch_bigla_grad', None)
    with pytest.raises(TypeError, match='NoneType'):  # it was what ran
        gradients(lambda *a: bigla_mixer(*a, num_heads=3, impl='triton'), args)


@DTYPES
def test_parts(part, dtype, derive):
    """As `check`, for the norms, the MLP and the strided convolutions; parameters in float32."""
    fn, tensors = part
    tensors = [x if x is None else x.to('cuda', dtype if i < 2 and x.ndim > 1 else None) for i, x in enumerate(tensors)]
    wide = [x if x is None else x.double() for x in tensors]
    want = derive(lambda *x: fn(*x, impl='reference'), wide)
    got, peer = (derive(lambda *x, impl=impl: fn(*x, impl=impl), tensors) for impl in ('triton', 'chunked'))
    # The operator's products in float32 are three of tf32: see `test_random_cases_gpu`. The low rank's gradient, which
    # `bigla_mixer` makes a part of a packed one, is nothing but those of gates.
    roundings = 2 + 19 * (fn.name in ('token_mixer', 'block') and dtype == torch.float32)
    for i, (a, b, c) in enumerate(zip(got, peer, want, strict=True)):
        assert a.isfinite().all()
        mine, theirs = ((x.double() - c).norm() / c.norm() for x in (a, b))
        assert mine <= 2 * theirs + roundings * ROUNDING[dtype], (i, mine, theirs)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
@pytest.mark.parametrize('M, C, R', [(1, 36, 3), (32768, 192, 16), (134400, 96, 16), (8401, 384, 16), (3000, 768, 16)])
def test_gradients_of_the_decay(M, C, R, dtype, decay_grads):
    decay_grads(M, C, R, dtype, 'cuda')


def test_a_sum_of_another_type(casts):
    casts('triton', 'cuda')


def test_a_position_embedding(embeds):
    embeds('cuda')


@pytest.mark.parametrize('bias', [True, False], ids=['LayerNorm', 'RMSNorm'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
@pytest.mark.parametrize('C, fewest', [(64, 0), (96, 0), (192, 0), (256, 0), (384, 0), (192, 10**9)])
def test_half_a_block(C, fewest, dtype, bias, half_block, derive, monkeypatch):
    """As `check`, with samples dropped, in the float32 stream that autocast leaves; compiled, too."""
    monkeypatch.setattr('bigla.triton.mlp.FEWEST', fewest)
    x, branch, *parameters, scale = half_block(3, 700, C, H=256, bias=bias, scale=True)
    scale[1] = 0
    factors = scale.flip(0)
    tensors = [None if t is None else t.cuda() for t in (x, branch.to(dtype), *parameters)]

    def run(impl):
        return lambda *t: (residual_mlp(*t, scale.to(t[0]), factors.to(t[0]), eps=1e-5, inner=dtype, impl=impl),)

    want = derive(run('reference'), [None if t is None else t.double() for t in tensors])
    got, peer = (derive(run(impl), tensors) for impl in ('triton', 'chunked'))
    for i, (a, b, c) in enumerate(zip(got, peer, want, strict=True)):
        mine, theirs = ((t.double() - c).norm() / c.norm() for t in (a, b))
        assert mine <= 2 * theirs + 2 * ROUNDING[dtype], (i, mine, theirs)
    torch._dynamo.reset()
    for a, b in zip(derive(torch.compile(run('triton'), fullgraph=True, dynamic=True), tensors), got, strict=True):
        assert a.equal(b)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['fp32', 'bf16'])
def test_nothing_at_all(dtype, derive, make_mixer, half_block):
    """An empty batch, where products of half precision are PyTorch's own for CUDA."""
    args = [x.detach().cuda() for x in make_mixer(0, 5)]
    args[:2] = (x.to(dtype) for x in args[:2])
    x, branch, *parameters = (None if t is None else t.cuda() for t in half_block(0, 7, 32, H=48, bias=True))
    for fn, tensors in (
        (lambda *t: (bigla_mixer(*t, num_heads=2, impl='triton'),), args),
        (lambda *t: (gated_mlp(*t, impl='triton'),), [x.to(dtype), *parameters[2:4]]),
        (lambda *t: (residual_mlp(*t, inner=dtype, impl='triton'),), [x, branch.to(dtype), *parameters]),
    ):
        assert all(g.isfinite().all() for g in derive(fn, tensors))


def parts(x, branch, image, taps, more_taps, fc1, fc2, *vectors):
    """What surrounds the mixer at the sizes of ViG-T, thousands of tokens; both convolutions of its stem."""
    x = residual_mlp(x, branch, vectors[1], vectors[2], fc1, fc2, inner=torch.bfloat16)
    x, y = add_norm(x, branch, vectors[0], dtype=torch.bfloat16)
    y = gated_mlp(y, fc1, fc2)
    z = conv_norm(image, taps, *vectors[3:], stride=8, act='silu', inner=torch.bfloat16)
    z = conv_norm(z, more_taps, *vectors[:3], stride=2)
    return add_norm(x, y, vectors[1], vectors[2], dtype=torch.bfloat16)[1].sum() + z.sum(), x, y


def test_a_thousand_launches_of_the_parts(derive):
    """The same bits: the products go by Hopper's wgmma."""
    torch.manual_seed(0)
    shapes = (4000, 192), (4000, 192), (2, 320, 328, 3), (96, 3, 9, 9), (192, 96, 3, 3), (1024, 192), (192, 512)
    shapes += *[(192,)] * 3, *[(96,)] * 3
    tensors = [torch.randn(s, device='cuda') / (s[-1] if len(s) == 2 else 1) ** 0.5 for s in shapes]
    tensors[1] = tensors[1].bfloat16()
    want = derive(parts, tensors)
    differ = torch.zeros(len(want), dtype=torch.int64, device='cuda')
    for _ in range(1000):
        differ += torch.stack([(a != b).any() for a, b in zip(derive(parts, tensors), want)])
    assert not differ.any(), differ


@pytest.mark.parametrize('bias', [True, False], ids=['LayerNorm', 'RMSNorm'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
@pytest.mark.parametrize(
    'C, num_heads, act, fewest', [(96, 3, False, 0), (192, 3, True, 0), (192, 3, True, 10**9), (768, 24, False, 0)]
)
def test_block(C, num_heads, act, fewest, dtype, bias, whole_block, derive, monkeypatch):
    """As `check`, in the float32 stream that autocast leaves, samples dropped; again, and compiled: the same bits.

    With and without Hopper's kernels.
    """
    if KNOWN:
        monkeypatch.setattr('bigla.triton.hopper.FEWEST', dict.fromkeys(hopper.FEWEST, fewest))
    torch.manual_seed(0)
    tensors = whole_block(3, 31, 42, C, num_heads=num_heads, rank=16, H=C * 8 // 3 // 32 * 32, bias=bias)
    tensors = [None if t is None else t.cuda() for t in tensors]
    factors = dict(scale=torch.tensor([2.0, 0.0, 2.0]).cuda(), branch_scale=torch.tensor([2.0, 2.0, 0.0]).cuda())

    def run(impl):
        options = dict(num_heads=num_heads, act=act, inner=dtype, impl=impl)
        return lambda *t: (block(*t, **{name: f.to(t[0]) for name, f in factors.items()}, **options),)

    want = derive(run('reference'), [None if t is None else t.double() for t in tensors])
    got, peer = (derive(run(impl), tensors) for impl in ('triton', 'chunked'))
    for i, (a, b, c) in enumerate(zip(got, peer, want, strict=True)):
        mine, theirs = ((t.double() - c).norm() / c.norm() for t in (a, b))
        # In the gradient of the low-rank decay's weight those of gates cancel, and what is left of the rounding of
        # states shows: an error of 0.116 for the peer's 0.053.
        most = 2.5 if i == 6 + bias else 2
        assert mine <= most * theirs + 2 * ROUNDING[dtype], (i, mine, theirs)
    for _ in range(20):
        assert all(a.equal(b) for a, b in zip(derive(run('triton'), tensors), got, strict=True))
    torch._dynamo.reset()
    for a, b in zip(derive(torch.compile(run('triton'), fullgraph=True, dynamic=True), tensors), got, strict=True):
        assert a.equal(b)


@pytest.mark.parametrize('bias', [True, False], ids=['LayerNorm', 'RMSNorm'])
def test_blocks_in_turn(bias, whole_block, derive):
    """Two, of which the first makes the norm of the second: as `check`; compiled and recomputed the same bits."""
    torch.manual_seed(0)
    tensors = whole_block(2, 24, 33, 192, num_heads=3, rank=16, H=512, bias=bias)
    tensors = [None if t is None else t.cuda() for t in tensors]

    def run(impl):
        options = dict(num_heads=3, act=True, inner=torch.bfloat16, impl=impl)

        def in_turn(x, *parameters):
            following = dict(zip(('next_norm_weight', 'next_norm_bias'), parameters[:2]))
            y, normed = block(x, *parameters, **options, **following)
            return (block(y, *parameters, **options, normed=normed),)

        return in_turn

    def recomputed(*t):
        return checkpoint(run('triton'), *t, use_reentrant=False)

    want = derive(run('reference'), [None if t is None else t.double() for t in tensors])
    got, peer = (derive(run(impl), tensors) for impl in ('triton', 'chunked'))
    for i, (a, b, c) in enumerate(zip(got, peer, want, strict=True)):
        mine, theirs = ((t.double() - c).norm() / c.norm() for t in (a, b))
        most = 2.5 if i == 6 + bias else 2  # as in `test_block`
        assert mine <= most * theirs + 2 * ROUNDING[torch.bfloat16], (i, mine, theirs)
    torch._dynamo.reset()
    for fn in (torch.compile(run('triton'), fullgraph=True), recomputed):
        assert all(a.equal(b) for a, b in zip(derive(fn, tensors), got, strict=True))


def end_of_a_block(B, L, C, H, dtype, stream, bias, scale, branch_scale):
    """z, the projection and the rest of what `launch_projected_mlp` takes."""
    torch.manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, device='cuda') / shape[-1] ** 0.5

    x, z = (C**0.5 * normal(B, L, C) for _ in range(2))
    vectors = 1 + normal(C), normal(C) if bias else None
    factors = (torch.rand(B, device='cuda').to(stream) if some else None for some in (scale, branch_scale))
    fc1, fc2 = normal(2 * H, C).to(dtype), normal(C, H).to(dtype)
    return z.to(dtype), normal(C, C).to(dtype), Half(x.to(stream), None, *vectors, fc1, fc2, *factors)


@on_hopper
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
@pytest.mark.parametrize(
    'B, L, C, H, stream, bias, scale, branch_scale',
    [
        (1, 1, 192, 512, None, False, False, False),  # one token of 128 that a program takes at a time
        (1, 64, 8, 8, torch.float32, True, True, True),  # as narrow as it gets
        (3, 65, 64, 32, torch.float32, False, True, False),
        (2, 127, 40, 104, None, True, False, True),
        (1, 129, 128, 64, torch.float32, True, False, False),
        (5, 9001, 192, 512, torch.float32, True, True, True),  # programs that take some tiles each
        (5, 9001, 160, 520, None, False, True, True),
        (2, 67200, 96, 256, torch.float32, False, False, False),
    ],
)
def test_end_of_a_block(B, L, C, H, stream, bias, scale, branch_scale, dtype, by_both):
    """Hopper's kernel against float64 and against the kernels of its parts; twenty times the same bits.

    The next block's norm, too, which asks for no other bits of what it is made of.
    """
    z, proj, t = end_of_a_block(B, L, C, H, dtype, stream or dtype, bias, scale, branch_scale)
    following = Norm(t.norm_weight.flip(0), t.norm_bias)
    (got, normed), (peer, _) = by_both(
        'launch_block_end', 'block_end', lambda: launch_projected_mlp(z, proj, t, 1e-5, following)
    )
    want = add_norm(got, None, *following, eps=1e-5, dtype=torch.float64, impl='reference')[1]
    assert normed.dtype == dtype and (normed.double() - want).norm() <= 1.1 * ROUNDING[dtype] * want.norm()
    x, _, *vectors, fc1, fc2, scale, branch_scale = (None if v is None else v.double() for v in t)
    branch = z.double() @ proj.double().t()
    want = residual_mlp(x, branch, *vectors, fc1, fc2, scale, branch_scale, eps=1e-5, impl='reference')
    mine, theirs = ((y.double() - want).norm() / want.norm() for y in (got, peer))
    assert got.dtype == peer.dtype and mine <= 1.2 * theirs + ROUNDING[dtype] / 2, (mine, theirs)
    for _ in range(20):
        y, n = launch_projected_mlp(z, proj, t, 1e-5, following)
        assert y.equal(got) and n.equal(normed)
    assert launch_projected_mlp(z, proj, t, 1e-5)[0].equal(got)


@on_hopper
@pytest.mark.parametrize('bias', [True, False], ids=['LayerNorm', 'RMSNorm'])
def test_a_thousand_ends_of_a_block(bias):
    """Programs whose warps wait for each other at barriers of their own: no run differs, none hangs."""
    options = torch.bfloat16, torch.float32, bias, False, False
    some = [end_of_a_block(B, L, 192, 512, *options) for B, L in ((3, 50), (9, 4000))]
    following = Norm(some[0][2].norm_weight, some[0][2].norm_bias)
    want = [launch_projected_mlp(*args, 1e-5, following) for args in some]
    differ = torch.zeros(4, dtype=torch.int64, device='cuda')
    for _ in range(1000):
        got = [launch_projected_mlp(*args, 1e-5, following) for args in some]
        differ += torch.stack([(a != b).any() for x, y in zip(got, want) for a, b in zip(x, y)])
    assert not differ.any(), differ


@on_hopper
@pytest.mark.parametrize('scaled', [False, True], ids=['', 'scaled'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
@pytest.mark.parametrize(
    'M, C, H', [(1, 8, 8), (66, 40, 104), (4096, 192, 512), (8400, 384, 1024), (35000, 384, 1024), (2700, 512, 1376)]
)
def test_swiglu(M, C, H, dtype, scaled, by_both):
    """Hopper's kernel against float64 and against the other one; twenty times the same bits."""
    torch.manual_seed(0)
    x, fc1 = torch.randn(M, C, device='cuda').to(dtype), torch.randn(2 * H, C, device='cuda').div(C**0.5).to(dtype)
    scale = torch.rand(2 - M % 2, device='cuda') if scaled else None
    got, peer = by_both('launch_resident_swiglu', 'swiglu', lambda: launch_swiglu(x, fc1, scale=scale)[0])
    a, b = (x.double() @ fc1.double().t()).chunk(2, -1)
    want = torch.nn.functional.silu(a) * b
    if scaled:
        want *= scale.double().repeat_interleave(M // len(scale))[:, None]
    mine, theirs = ((u.double() - want).norm() / want.norm() for u in (got, peer))
    assert mine <= 1.1 * theirs, (mine, theirs)
    assert all(launch_swiglu(x, fc1, scale=scale)[0].equal(got) for _ in range(20))


@on_hopper
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
@pytest.mark.parametrize('M, C, H', [(1, 192, 512), (63, 8, 32), (129, 40, 96), (45005, 192, 512), (134400, 96, 256)])
def test_gradient_of_the_mlp(M, C, H, dtype, by_both):
    """Hopper's kernel and the weights' gradients against float64 and against the other kernels; the same bits."""
    torch.manual_seed(0)
    dy, x, fc1, fc2 = (torch.randn(s, device='cuda') for s in ((M, C), (M, C), (2 * H, C), (C, H)))
    tensors = [t.to(dtype) for t in (dy, x, fc1 / C**0.5, fc2 / H**0.5)]
    got, peer = by_both('launch_mlp_grad', 'mlp_grad', lambda: launch_mlp_grad(*tensors))
    dy, *leaves = (t.double().requires_grad_() for t in tensors)
    want = torch.autograd.grad(gated_mlp(*leaves, impl='reference'), leaves, dy)
    for a, b, c in zip(got, peer, want, strict=True):
        mine, theirs = ((t.double() - c).norm() / c.norm() for t in (a, b))
        assert a.dtype == b.dtype and mine <= 1.1 * theirs, (mine, theirs)
    for _ in range(20):
        assert all(a.equal(b) for a, b in zip(launch_mlp_grad(*tensors), got, strict=True))


@on_hopper
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
@pytest.mark.parametrize('M, C, H', [(1, 8, 32), (66, 40, 96), (4097, 192, 512), (8400, 384, 1024), (2700, 512, 1376)])
def test_gradient_of_swiglu(M, C, H, dtype, by_both):
    """Hopper's kernel, from a rounded du, against float64 and against the other one; twenty times the same bits."""
    torch.manual_seed(0)
    shapes = (M, C), (2 * H, C), (M, C), (C, H)
    x, fc1, dy, fc2 = (torch.randn(s, device='cuda').div(s[1] ** 0.5 if i % 2 else 1) for i, s in enumerate(shapes))
    tensors = [t.to(dtype) for t in (x, fc1, dy, fc2)]
    got, peer = by_both('launch_resident_swiglu', 'swiglu_grad', lambda: launch_swiglu(*tensors))
    x, fc1, dy, fc2 = (t.double() for t in tensors)
    h = (x @ fc1.t()).requires_grad_()
    a, b = h.chunk(2, -1)
    u = torch.nn.functional.silu(a) * b
    (dh,) = torch.autograd.grad(u, h, dy @ fc2)
    for mine, theirs, want in zip(got, peer, (u.detach(), dh), strict=True):
        mine, theirs = ((t.double() - want).norm() / want.norm() for t in (mine, theirs))
        assert mine <= 1.1 * theirs + ROUNDING[dtype] / 4, (mine, theirs)
    for _ in range(20):
        assert all(a.equal(b) for a, b in zip(launch_swiglu(*tensors), got, strict=True))


@on_hopper
def test_a_thousand_times_swiglu():
    torch.manual_seed(0)
    some = []
    for M, C, H in ((100, 192, 512), (17000, 384, 1024)):
        shapes = (M, C), (2 * H, C), (M, C), (C, H)
        some.append([torch.randn(s, device='cuda').div(s[1] ** 0.5).bfloat16() for s in shapes])
    every = [(args, n, launch_swiglu(*args[:n])) for args in some for n in (2, 4)]
    differ = torch.zeros(2, dtype=torch.int64, device='cuda')
    for _ in range(1000):
        for args, n, want in every:
            differ += torch.stack([(a != b).any() for a, b in zip(launch_swiglu(*args[:n]), want)])
    assert not differ.any(), differ


@on_hopper
def test_a_thousand_gradients_of_the_mlp():
    some = []
    for M in (100, 36000):
        torch.manual_seed(0)
        shapes = (M, 192), (M, 192), (1024, 192), (192, 512)
        some.append([torch.randn(s, device='cuda').div(s[1] ** 0.5).bfloat16() for s in shapes])
    want = [hopper.launch_mlp_grad(*args) for args in some]
    differ = torch.zeros(6, dtype=torch.int64, device='cuda')
    for _ in range(1000):
        got = (hopper.launch_mlp_grad(*args) for args in some)
        differ += torch.stack([(a != b).any() for x, y in zip(got, want) for a, b in zip(x, y)])
    assert not differ.any(), differ


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=['fp32', 'fp16', 'bf16'])
@pytest.mark.parametrize(
    'B, H, W, C, D, side, stride', [(3, 497, 531, 3, 96, 9, 8), (2, 165, 270, 3, 48, 3, 2), (1, 33, 41, 1, 8, 3, 1)]
)
def test_gradient_of_an_images_weights(B, H, W, C, D, side, stride, dtype):
    """Against float64, of an image that rounds to itself; twenty times the same bits."""
    torch.manual_seed(0)
    image = torch.randn(B, C, H, W, device='cuda').to(dtype).float()
    dp = torch.randn(B, out_side(H, side, stride), out_side(W, side, stride), D, device='cuda').to(dtype)

    def run():
        with Sums() as sums:
            return launch_conv_weight_grad(sums, dp, image.permute(0, 2, 3, 1), side, stride)

    got, (far, near) = run(), (t.double() for t in (dp.permute(0, 3, 1, 2), image))
    want = torch.nn.grad.conv2d_weight(near, (D, C, side, side), far, stride, padding=1)
    assert (got - want).norm() <= 1e-4 * want.norm()
    assert all(run().equal(got) for _ in range(20))


def test_compile_the_parts(part, derive):
    fn, tensors = part
    tensors = [x if x is None else x.cuda() for x in tensors]
    torch._dynamo.reset()
    for dynamic in (False, True):
        compiled = torch.compile(lambda *x: fn(*x, impl='triton'), fullgraph=True, dynamic=dynamic)
        for a, b in zip(derive(compiled, tensors), derive(lambda *x: fn(*x, impl='triton'), tensors)):
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b)


def mix(x, weight, *args):
    local = depthwise_conv(x, weight, act=True)
    return bigla_mixer(args[0], args[1] + local.flatten(1, 2), *args[2:], num_heads=3, act=True)


@pytest.fixture
def mixed(make_mixer):
    """`mixed(dims, H, W)` gives the tensors of `mix`."""

    def mixed(dims, H, W):
        torch.manual_seed(0)
        x, weight = torch.randn(2, H, W, dims), torch.randn(dims, 1, 3, 3).requires_grad_()
        return [*on_gpu([x], torch.bfloat16), weight.detach().cuda().requires_grad_()] + on_gpu(
            make_mixer(2, H * W, dims, 3, 16), torch.bfloat16
        )

    return mixed


@pytest.fixture
def inputs(mixed):
    return mixed(192, 20, 30)


@torch.no_grad()
@pytest.mark.parametrize('dims, L', [(192, 196), (192, 600), (96, 196), (96, 600)])
def test_a_thousand_launches_without_gradients(dims, L, mixed, without_hopper):
    """The same bits, and but for roundings those of the kernels that all GPUs have."""
    inputs = [x.detach() for x in mixed(dims, 1, L)]
    got = mix(*inputs)
    differ = torch.zeros((), dtype=torch.int64, device='cuda')
    for _ in range(1000):
        differ += (mix(*inputs) != got).any()
    assert differ == 0
    without_hopper()
    assert (got.double() - mix(*inputs).double()).norm() <= 2 * ROUNDING[torch.bfloat16] * got.double().norm()


@pytest.mark.parametrize('dims, L', [(192, 600), (192, 196), (96, 600), (96, 196)])
def test_a_thousand_launches_give_the_same_bits(dims, L, mixed):
    inputs = mixed(dims, 1, L)
    want = gradients(mix, inputs)
    differ = torch.zeros(len(want), dtype=torch.int64, device='cuda')
    for _ in range(1000):
        differ += torch.stack([(a != b).any() for a, b in zip(gradients(mix, inputs), want)])
    assert not differ.any(), differ


@pytest.mark.parametrize('dynamic', [False, True])
def test_compile(dynamic, inputs):
    compiled = torch.compile(mix, fullgraph=True, dynamic=dynamic)
    for a, b in zip(gradients(compiled, inputs), gradients(mix, inputs)):
        assert (a.double() - b.double()).norm() <= ROUNDING[torch.bfloat16] * b.double().norm()


def test_cuda_graph(inputs):
    want = gradients(mix, inputs)
    dy = torch.randn(want[0].shape, generator=torch.Generator().manual_seed(1)).to(want[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(mix(*inputs), inputs, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mix(*inputs)
        got = [y, *torch.autograd.grad(y, inputs, dy)]
    for x in got:
        x.detach().fill_(torch.nan)
    graph.replay()
    assert all(a.equal(b) for a, b in zip(got, want))


def test_second_derivative(inputs):
    (dx,) = torch.autograd.grad(mix(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="impl='chunked'"):
        dx.sum().backward()

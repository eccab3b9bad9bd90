"""The Triton kernels, run by Triton's interpreter on the CPU: values, gradients, how PyTorch takes them.

`test_triton_interpreter.py` runs this file in a process of its own, for which TRITON_INTERPRET=1 is set before triton
is imported. The interpreter's bfloat16 is wrong (dots of bit patterns, truncating casts), so that dtype is left to the
GPU's tests.
"""

import os
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bigla.triton as kernels
from bigla import add_norm, add_pos_embed, bigla, bigla_mixer, block, depthwise_conv, norm_depthwise_conv, residual_mlp
from bigla.triton import backward, forward, merge, mlp, primitives, stem, sums
from bigla.triton.primitives import Gates

# More than one where log2(e) g, which is rounded, is large.
ROUNDINGS = {'strong': 5, 'constant': 50}


needs_compiler = pytest.mark.skipif(not (shutil.which('c++') or shutil.which('g++')), reason='Inductor compiles C++')


def change_config(monkeypatch, **changes):
    for module in (forward, backward):
        monkeypatch.setattr(module, 'config', lambda *args: primitives.config(*args)._replace(**changes))


@pytest.fixture(autouse=True)
def _fused_however_few(monkeypatch):
    monkeypatch.setattr(mlp, 'FEWEST', 0)


@pytest.fixture(autouse=True)
def _short_scan(monkeypatch):
    """The interpreter takes as long for a step that is masked out."""
    change_config(monkeypatch, scan_ahead=2)


def ours(q, k, v, g_fwd, g_bwd, **kwargs):
    assert kernels.unsupported(q, k, v, g_fwd, g_bwd) is None
    return kernels.bigla(q, k, v, g_fwd, g_bwd, q.shape[-1] ** -0.5, **kwargs)


@pytest.fixture
def check(check_budget):
    return lambda inputs, roundings=1: check_budget(ours, inputs, roundings)


@pytest.mark.parametrize(
    'B, L, nh, K, V',
    [
        (2, 1, 3, 16, 16),
        (1, 16, 2, 4, 8),
        (2, 33, 1, 7, 5),
        (1, 63, 1, 16, 32),
        (1, 40, 1, 32, 64),
        (1, 20, 1, 130, 66),
    ],
)
def test_shapes(B, L, nh, K, V, make_inputs, check):
    check(make_inputs(B, L, nh, K, V, dtype=torch.float32))


@pytest.mark.parametrize('L', [16, 50])
def test_gates(L, gates, make_inputs, check):
    """One chunk and several, none hard, some, all. A rounding of g is |g| of e^g."""
    check(make_inputs(1, L, 2, 16, 8, gates=gates, dtype=torch.float32), ROUNDINGS.get(gates, 1))


@pytest.mark.parametrize('B, L, nh, K, V, gates', [(2, 65, 1, 7, 5, 'model'), (1, 40, 2, 32, 66, 'mixed')])
def test_walk(B, L, nh, K, V, gates, make_inputs, check, monkeypatch):
    """States of all chunks by one program for each direction and 64 columns, without a scan."""
    monkeypatch.setattr(forward, 'WALKERS', 0)
    monkeypatch.setattr(forward, 'scan', None)
    check(make_inputs(B, L, nh, K, V, gates=gates, dtype=torch.float32))


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('segment', [3, 100])
def test_scan(segment, grad):
    """In one piece, and in two segments of three chunks and one of one."""
    B, NT, nh, K, V = 2, 7, 2, 5, 20
    state, total = torch.randn(B, NT, nh, 2, K, V), -torch.rand(B, NT, nh, 2, K)
    got = state.clone()
    cfg = primitives.TABLE[torch.float32][16]._replace(scan_block=32, scan_ahead=2, scan_segment=segment)
    forward.scan(got, total, B, NT, nh, K, V, cfg, grad)
    for d in range(2):
        x = torch.zeros(B, nh, K, V)
        for c in range(NT) if (d == 0) != grad else reversed(range(NT)):
            torch.testing.assert_close(got[:, c, :, d], x)
            x = total[:, c, :, d].exp2().unsqueeze(-1) * x + state[:, c, :, d]


@pytest.mark.parametrize('gate_dtype', [torch.float16, torch.float32])
def test_half(gate_dtype, make_inputs, check):
    inputs = make_inputs(1, 40, 1, 16, 32, dtype=torch.float16)
    check(inputs[:3] + [x.detach().to(gate_dtype).requires_grad_() for x in inputs[3:]])


@pytest.fixture
def fast_float32(monkeypatch):
    """Hard chunks alone are exact in float32, too, so that the fast kernels show more than float16's digits."""
    for module in (forward, backward):
        monkeypatch.setattr(module, 'precision', lambda dtype: ('ieee', -160.0))


@pytest.mark.parametrize(
    'B, L, nh, K, V', [(2, 1, 3, 16, 16), (2, 33, 1, 7, 5), (1, 40, 1, 32, 64), (1, 20, 1, 20, 130)]
)
def test_fast_kernels(B, L, nh, K, V, fast_float32, make_inputs, check):
    check(make_inputs(B, L, nh, K, V, dtype=torch.float32), 5)


def test_long_chunks(fast_float32, regime, long_chunks, make_inputs):
    """Three of them, the first sample's hard: without gradients, and without what these would need."""
    inputs = [x.detach() for x in make_inputs(2, 130, 1, 16, 16, dtype=torch.float32)]
    for g in inputs[3:]:
        g[0] -= 4
    got, *kept = torch.ops.bigla.bigla(*inputs, 0.25, False, 16, False, False)
    assert not any(x.numel() for x in kept)
    want = bigla(*(x.double() for x in inputs), impl='chunked')
    assert (got - want).norm() < 1e-6 * want.norm()


@pytest.mark.parametrize('L', [16, 48])
def test_fast_kernels_leave_hard_chunks(L, fast_float32, regime, make_inputs, check):
    inputs = make_inputs(2, L, 2, 16, 8, gates='model', dtype=torch.float32)
    for g in inputs[3:]:
        g.data[0] -= 8
    hard = forward.launch_forward(*inputs[:3], Gates(*inputs[3:], False), 0.25, 16, L <= 16)[3][:-1].view(2, -1)
    assert hard[0].all() and not hard[1].any()
    check(inputs, 5)


def test_gate_logits(make_inputs, run, errors):
    inputs = make_inputs(1, 37, 2, 16, 16, gates='zero', dtype=torch.float32)
    inputs[3:] = [(6 * torch.randn_like(x)).requires_grad_() for x in inputs[3:]]

    def outside(q, k, v, *logits):
        return bigla(q, k, v, *(F.logsigmoid(x) / 16 for x in logits), impl='chunked')

    got = run(lambda *x: ours(*x, gate_logits=True), inputs)
    worst = errors(got, run(outside, [x.detach().double().requires_grad_() for x in inputs]))
    assert max(worst.values()) < 1e-6, worst


@pytest.mark.parametrize('layout', ['packed', 'head-major', 'every other column', 'expanded'])
def test_strides(layout, make_inputs, run):
    inputs = make_inputs(2, 19, 2, 16, 16, dtype=torch.float32)
    views = [x.detach() for x in inputs]
    if layout == 'packed':
        views = list(torch.cat(views, -1).split(16, -1))
    elif layout == 'head-major':
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]
    elif layout == 'every other column':
        views = [x.repeat_interleave(2, -1)[..., ::2] for x in views]
    else:
        views = [x[:1, :, :1].expand_as(x) for x in views]
        inputs = [x.contiguous().requires_grad_() for x in views]
    before = [x.clone() for x in views]
    views = [x.requires_grad_() for x in views]
    assert layout == 'every other column' or all(x.stride(-1) == 1 for x in views)
    for a, b in zip(run(ours, views), run(ours, inputs)):
        assert a.equal(b)
    assert all(a.equal(b) for a, b in zip(views, before)), 'an input was written'


@pytest.mark.parametrize('gates', ['model', 'strong'])
@pytest.mark.parametrize('L', [9, 41])
def test_every_element_is_written(L, gates, make_inputs, run):
    inputs = make_inputs(1, L, 1, 5, 7, gates=gates, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(1).isnan()
        got = run(ours, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in got)


def test_repeated_and_retained(make_inputs, run):
    inputs = make_inputs(1, 35, 1, 16, 16, gates='mixed', dtype=torch.float32)
    assert all(a.equal(b) for a, b in zip(run(ours, inputs), run(ours, inputs)))
    out = ours(*inputs).sum()
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    assert all(a.equal(b) for a, b in zip(first, torch.autograd.grad(out, inputs)))


@pytest.mark.parametrize('shape', [(0, 5, 2, 16, 16), (2, 0, 2, 16, 16)])
def test_empty(shape, make_inputs, run):
    inputs = make_inputs(*shape, dtype=torch.float32)
    assert [x.shape for x in run(ours, inputs)] == [inputs[2].shape, *(x.shape for x in inputs)]
    args = *(x.detach() for x in inputs), 0.25, False, 16, False, False
    torch.library.opcheck(torch.ops.bigla.bigla, args, test_utils='test_faketensor')


@pytest.mark.parametrize('one', [False, True])
def test_opcheck(one, make_inputs):
    q, k, v, g_fwd, g_bwd = make_inputs(1, 15, 1, 8, 8, dtype=torch.float32)
    args = 0.25, False, 16, one, True
    torch.library.opcheck(torch.ops.bigla.bigla, (q, k, v, g_fwd, g_bwd, *args))
    tensors = [x.detach() for x in (q, k, v, g_fwd, g_bwd)]
    torch.library.opcheck(torch.ops.bigla.bigla, (*tensors, *args[:-1], False))
    do, *saved = torch.ops.bigla.bigla(*tensors, *args)
    torch.library.opcheck(torch.ops.bigla.bigla_backward, (do, *tensors, *saved, *args))


@pytest.mark.parametrize('grad', [False, True])
def test_export_of_any_length(grad, make_inputs):
    """Nothing is asked of a length that is left open: neither what holds it nor what it holds many of."""

    class Model(torch.nn.Module):
        def forward(self, *inputs):
            return ours(*inputs)

    inputs = tuple(x.detach().requires_grad_(grad) for x in make_inputs(2, 300, 3, 16, 16, dtype=torch.bfloat16))
    L = torch.export.Dim('L', min=64, max=200_000)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(Model(), inputs, dynamic_shapes=(tuple({1: L} for _ in range(5)),), strict=True)
    assert [node.target for node in program.graph.nodes].count(torch.ops.bigla.bigla.default) == 1


def test_compile(make_inputs, run):
    """Whole graphs, one for every length."""
    step = torch.compile(lambda *x: ours(*x).sin(), fullgraph=True, backend='aot_eager', dynamic=True)
    for L in (50, 70):
        inputs = make_inputs(1, L, 1, 16, 16, dtype=torch.float32)
        for a, b in zip(run(step, inputs), run(lambda *x: ours(*x).sin(), inputs)):
            assert a.equal(b)


def test_compile_the_public_operator(make_inputs):
    inputs = make_inputs(1, 20, 1, 16, 16, dtype=torch.float32)
    compiled = torch.compile(bigla, fullgraph=True, backend='aot_eager')
    for kwargs in ({'impl': 'triton'}, {'impl': 'triton', 'gate_logits': True}, {}):
        torch.testing.assert_close(compiled(*inputs, **kwargs), bigla(*inputs, **kwargs))


def test_export(make_inputs):
    class Model(torch.nn.Module):
        def forward(self, *inputs):
            return 2 * ours(*inputs)

    def inputs(L):
        return tuple(x.detach() for x in make_inputs(1, L, 1, 16, 16, dtype=torch.float32))

    L = torch.export.Dim('L', min=2, max=100_000)
    program = torch.export.export(Model(), inputs(50), dynamic_shapes=(tuple({1: L} for _ in range(5)),))
    assert program.module()(*inputs(80)).equal(Model()(*inputs(80)))


def test_autocast_changes_nothing(make_inputs, run):
    inputs = make_inputs(1, 20, 1, 16, 16, dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        got = run(ours, inputs)
    assert all(a.equal(b) for a, b in zip(got, run(ours, inputs)))


def test_second_derivative(make_inputs):
    inputs = make_inputs(1, 20, 1, 16, 16, dtype=torch.float32)
    (dq,) = torch.autograd.grad(ours(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="impl='chunked'"):
        dq.sum().backward()


@pytest.mark.parametrize('change', ['double', 'wide q', 'wide v', 'double gates'])
def test_unsupported(change, make_inputs):
    K, V = (257 if change == 'wide q' else 4), (257 if change == 'wide v' else 4)
    q, k, v, g_fwd, g_bwd = make_inputs(1, 2, 1, K, V, dtype=torch.float64 if change == 'double' else torch.float32)
    if change == 'double gates':
        g_fwd, g_bwd = g_fwd.double(), g_bwd.double()
    assert kernels.unsupported(q, k, v, g_fwd, g_bwd).startswith(
        {'wide v': 'v', 'double gates': 'g_fwd'}.get(change, 'q')
    )


def gradients(fn, args):
    y = fn(*args)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, args, dy)]


def agree(got, want, tolerance, peer=None, roundings=0):
    """Within a part of the norm, or twice the error of `peer`, the same by PyTorch's operators: deep functions.

    `roundings` of float32 are allowed besides.
    """
    for a, b, c in zip(got, want, peer or want, strict=True):
        size = b.double().norm()
        allowed = max(tolerance * size, 2 * (c.double() - b.double()).norm() + roundings * 2.0**-24 * size)
        assert a.isfinite().all() and (a.double() - b.double()).norm() <= allowed


@pytest.mark.parametrize('act', [False, True])
@pytest.mark.parametrize('shape', [(2, 5, 11, 70), (1, 1, 1, 3), (1, 9, 8, 64), (1, 37, 3, 5)])
def test_conv(shape, act):
    x, weight = torch.randn(shape), torch.randn(shape[-1], 1, 3, 3)
    got = gradients(lambda *a: kernels.depthwise_conv(*a, act), [x.requires_grad_(), weight.requires_grad_()])
    wide = [a.detach().double().requires_grad_() for a in (x, weight)]
    agree(got, gradients(lambda *a: depthwise_conv(*a, act=act, impl='reference'), wide), 1e-6)


def test_conv_of_a_view():
    """Any strides with dense channels; another last stride is copied once."""
    x, weight = torch.randn(2, 6, 5, 40), torch.randn(16, 1, 3, 3)
    for view in (x[..., 8:24], x[..., 8:40:2], x[:1].expand(3, -1, -1, -1)[..., :16]):
        got = kernels.depthwise_conv(view, weight, False)
        torch.testing.assert_close(got, depthwise_conv(view, weight, impl='reference'))


@pytest.mark.parametrize('act', [False, True])
@pytest.mark.parametrize(
    'L, dims, num_heads, rank',
    [(1, 32, 1, 4), (37, 24, 2, 16), (5, 36, 3, 17), pytest.param(18, 130, 1, 4, id='values in five tiles')],
)
def test_mixer(L, dims, num_heads, rank, act, make_mixer):
    check_mixer(make_mixer(2, L, dims, num_heads, rank, dtype=torch.float32), num_heads, act)


@pytest.mark.parametrize('L', [7, 40])
def test_fast_kernels_of_the_mixer(L, fast_float32, make_mixer):
    """And the exact ones, for the first sample: its decays are strong."""
    args = make_mixer(2, L, 32, 2, dtype=torch.float32)
    low = args[0].data[0, :, 96:]
    args[2].data.abs_()
    low.abs_().mul_(-200)
    hard = torch.ops.bigla.mixer(*(x.detach() for x in args), 2, 1e-6, True, 16, L <= 16, True)[4][:-1].view(2, -1)
    assert hard[0].all() and not hard[1].any()
    check_mixer(args, 2, True)


def test_mixer_of_padded_rows(make_mixer):
    """As Inductor makes them of wide products; the gradient's rows are dense."""
    args = make_mixer(2, 37, 24, 2)
    wide = torch.nn.functional.pad(args[0].detach(), (0, 5))
    args[0] = wide[..., :-5].requires_grad_()
    assert not args[0].is_contiguous()
    check_mixer(args, 2, True)


@needs_compiler
def test_mixer_behind_a_product_of_inductor(make_mixer):
    """Whose rows it pads, from 1,024 numbers on, and hands to both directions as they are."""
    args = make_mixer(1, 9, 384, 12, 16)
    weight = torch.randn(args[0].shape[-1], 384) / 384**0.5
    args[0] = weight.requires_grad_()

    def step(weight, local, *args):
        return kernels.bigla_mixer(F.linear(local, weight), local, *args, 12, 1e-6, True)

    with torch._inductor.config.patch(disable_padding_cpu=False):
        got = gradients(torch.compile(step, fullgraph=True, dynamic=False), args)
    agree(got, gradients(step, args), 1e-5)


def test_mixer_traced_without_gradients(make_mixer):
    """What is wider than a program's tile returns what is promised, too; nothing is kept to differentiate."""
    for dims in (32, 130):
        args = [x.detach() for x in make_mixer(1, 20, dims, 1)]
        options = 1, 1e-6, True, 16, False, False
        torch.library.opcheck(torch.ops.bigla.mixer, (*args, *options))
        args[0].requires_grad_()
        with pytest.raises(RuntimeError, match='traced without gradients'):
            torch.ops.bigla.mixer(*args, *options)[0].sum().backward()


def check_mixer(args, num_heads, act):
    def mixer(*args):
        return kernels.bigla_mixer(*args, num_heads, 1e-6, act)

    got = gradients(mixer, args)
    wide = [a.detach().double().requires_grad_() for a in args]
    agree(got, gradients(lambda *a: bigla_mixer(*a, num_heads=num_heads, act=act, impl='reference'), wide), 2e-6)
    with torch.no_grad():
        assert mixer(*args).equal(got[0])  # where the operator's own output is not kept


def test_mixer_of_nothing(make_mixer):
    for shape in ((0, 5), (2, 0)):
        got = gradients(lambda *a: bigla_mixer(*a, num_heads=2, impl='triton'), make_mixer(*shape))
        assert all(x.isfinite().all() for x in got)


@needs_compiler
def test_inductor_needs_no_message(monkeypatch):
    """Which has all in it that an operator's arguments come from: behind twelve residual blocks it takes hours."""

    def message(target, *_):
        assert 'bigla' not in str(target)
        return ''

    monkeypatch.setattr('torch._inductor.exc.OperatorIssue.operator_str', message)

    def step(x, weight):
        y = depthwise_conv(x, weight, impl='triton')
        return norm_depthwise_conv(y, weight[:, 0, 0, 0], None, weight, impl='triton').sum()

    args = torch.randn(1, 3, 4, 8, requires_grad=True), torch.randn(8, 1, 3, 3, requires_grad=True)
    with torch.compiler.config.patch(force_disable_caches=True):
        got = gradients(torch.compile(step, fullgraph=True), args)
    agree(got, gradients(step, args), 1e-6)


def test_mixer_and_conv_in_graphs(make_mixer):
    args = [x.detach() for x in make_mixer(1, 20, 32, 2)]
    torch.library.opcheck(torch.ops.bigla.mixer, (*args, 2, 1e-6, True, 16, False, True))
    y, *saved = torch.ops.bigla.mixer(*args, 2, 1e-6, True, 16, False, True)
    torch.library.opcheck(torch.ops.bigla.mixer_backward, (y, *args, *saved, 2, 1e-6, True, 16, False, True))
    x, weight = torch.randn(1, 3, 4, 8), torch.randn(8, 1, 3, 3)
    torch.library.opcheck(torch.ops.bigla.depthwise_conv, (x, weight, True))
    torch.library.opcheck(torch.ops.bigla.depthwise_conv_backward, (x, x, weight, True))

    def step(x, weight, *args):
        return kernels.bigla_mixer(*args, 2, 1e-6, True).sum() + kernels.depthwise_conv(x, weight, True).sum()

    args = torch.randn(1, 3, 4, 8), torch.randn(8, 1, 3, 3), *args
    compiled = torch.compile(step, fullgraph=True, backend='aot_eager', dynamic=True)
    args = [a.requires_grad_() for a in args]
    agree(gradients(compiled, args), gradients(step, args), 1e-6)


def test_block_parts(part, derive):
    fn, tensors = part
    wide = [x if x is None else x.double() for x in tensors]
    got, peer = (derive(lambda *x, impl=impl: fn(*x, impl=impl), tensors) for impl in ('triton', 'chunked'))
    # As on a GPU: the peer's error differs between CPUs, whose sums have other orders.
    roundings = 19 * (fn.name in ('token_mixer', 'block'))
    agree(got, derive(lambda *x: fn(*x, impl='reference'), wide), 5e-6, peer, roundings)


@pytest.mark.parametrize(
    'M, C, R, dtype', [(1, 8, 3, torch.float16), (700, 40, 16, torch.float16), (70, 8, 3, torch.float32)]
)
def test_gradients_of_the_decay(M, C, R, dtype, decay_grads, monkeypatch):
    monkeypatch.setattr('bigla.triton.decay.PROGRAMS', 5)  # each takes several tiles
    decay_grads(M, C, R, dtype, 'cpu')


def test_a_sum_of_another_type(casts):
    casts('triton', 'cpu')


def test_block_parts_in_half_precision(part, derive):
    fn, tensors = part
    half = [x if x is None or i > 1 or x.ndim < 2 else x.half() for i, x in enumerate(tensors)]
    got, peer = (derive(lambda *x, impl=impl: fn(*x, impl=impl), half) for impl in ('triton', 'chunked'))
    want = derive(lambda *x: fn(*x, impl='reference'), [x if x is None else x.double() for x in half])
    assert all(a.dtype == x.dtype for a, x in zip(got[::-1], [x for x in half if x is not None][::-1]))
    agree(got, want, 3e-3, peer)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('C, fewest', [(48, 0), (64, 0), (48, 151), (300, 0)])
def test_half_a_block_with_dropped_samples(C, fewest, bias, half_block, derive, monkeypatch):
    """x in float32, as autocast has it; few tokens, or more than 256 channels, by the kernels apart."""
    monkeypatch.setattr(mlp, 'FEWEST', fewest)
    x, branch, *parameters, scale = half_block(3, 50, C, H=70, bias=bias, scale=True)
    tensors = [x, branch.half(), *parameters]
    scale[1] = 0  # stochastic depth leaves this one out
    factors = torch.rand(3)
    options = dict(scale=scale, branch_scale=factors, eps=1e-5, inner=torch.float16)
    got = derive(lambda *x: (residual_mlp(*x, **options, impl='triton'),), tensors)
    wide = [x if x is None else x.double() for x in tensors]
    agree(got, derive(lambda *x: (residual_mlp(*x, **options, impl='reference'),), wide), 3e-3)
    assert got[0].dtype == torch.float32 and got[0][1].equal(x[1] + factors[1] * tensors[1][1].float())


@pytest.mark.parametrize('fewest', [0, 10**9])
def test_a_block_with_dropped_samples(fewest, whole_block, derive, monkeypatch):
    """x in float32, as autocast has it; the gradient of x is the sum of both branches' and the stream's."""
    monkeypatch.setattr(mlp, 'FEWEST', fewest)
    monkeypatch.setattr(merge, 'WALK', 2)
    monkeypatch.setattr(merge, 'GRAD_TILE', 256)  # programs for some tiles, and some programs
    tensors = whole_block(3, 6, 7, 48, num_heads=3, rank=16, H=40, bias=True)
    factors = dict(scale=torch.tensor([2.0, 0.0, 0.0]), branch_scale=torch.tensor([0.0, 2.0, 0.0]))
    options = dict(num_heads=3, act=True, eps=1e-5, inner=torch.float16, **factors)
    got, peer, want = (
        derive(lambda *x, impl=impl: (block(*x, **options, impl=impl),), [x.to(dtype) for x in tensors])
        for impl, dtype in (('triton', torch.float32), ('chunked', torch.float32), ('reference', torch.float64))
    )
    agree(got, want, 3e-3, peer)
    assert got[0].dtype == got[1].dtype == torch.float32 and got[0][2].equal(tensors[0][2])


def test_half_a_block_as_one_operator(half_block, derive, monkeypatch):
    """In graphs of any size; vectors of any stride; no samples; no second derivative."""
    launched, launch = [], kernels.launch_residual_mlp
    monkeypatch.setattr(kernels, 'launch_residual_mlp', lambda *args: launched.append(args) or launch(*args))
    x, branch, *parameters, scale = half_block(3, 20, 48, H=24, bias=True, scale=True)

    def run(*tensors):
        factors = torch.stack([scale, scale], 1)[: len(tensors[0]), 0]  # not dense
        return (residual_mlp(*tensors, factors, factors, inner=torch.float16, impl='triton'),)

    tensors = [x, branch, *(torch.stack([p, p], 1)[:, 0] for p in parameters[:2]), *parameters[2:]]
    want = derive(run, [x, branch, *parameters])
    for fn in (run, torch.compile(run, fullgraph=True, backend='aot_eager', dynamic=True)):
        for a, b in zip(derive(fn, tensors), want, strict=True):
            torch.testing.assert_close(a, b)
    assert len(launched) == 3
    assert run(x[:0], branch[:0], *parameters)[0].shape == (0, 20, 48)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(run(x, branch, *parameters)[0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="impl='chunked'"):
        dx.sum().backward()


@pytest.mark.parametrize('bias', [False, True], ids=['RMSNorm', 'LayerNorm'])
def test_blocks_hand_over_norms(bias, whole_block, derive):
    """One that is handed over is taken as it is, and changes no gradient, whatever the next one is."""
    options = dict(num_heads=2, act=True, inner=torch.float16, impl='triton')
    x, *parameters = whole_block(2, 5, 4, 16, num_heads=2, rank=5, H=24, bias=bias)
    following = dict(zip(('next_norm_weight', 'next_norm_bias'), parameters[:2]))
    y, normed = block(x, *parameters, **options, **following)
    assert y.equal(block(x, *parameters, **options)) and normed.dtype == torch.float16 and not normed.requires_grad
    assert normed.equal(add_norm(y, None, *parameters[:2], dtype=torch.float16, impl='triton')[1])

    def run(*tensors, **more):
        out = block(*tensors, **more, **options)
        return out[:1] if 'next_norm_weight' in more else (out,)

    alone, handed, further = (
        derive(partial(run, **more), [y, *parameters])
        for more in ({}, dict(normed=normed), dict(normed=normed, **following))
    )
    assert all(a.equal(b) and a.equal(c) for a, b, c in zip(alone, handed, further, strict=True))
    assert block(y, *parameters, normed=0 * normed, **options).ne(alone[0]).any()


def test_what_its_parts_keep(half_block):
    """For the backward of what surrounds the mixer: the stream and the branch alone, beside parameters."""
    C = 64
    x, branch, *parameters = half_block(2, 12, 16, C, H=96)
    tensors = [x.requires_grad_(), branch.half().requires_grad_(), *parameters]
    kept = {}

    def keep(tensor):
        if tensor.numel() >= x.numel():
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        norm_depthwise_conv(x, parameters[0], None, torch.randn(C, 1, 3, 3), inner=torch.float16, impl='triton')
        residual_mlp(*tensors, inner=torch.float16, impl='triton')
    assert kept == {x.data_ptr(): x.nbytes, tensors[1].data_ptr(): tensors[1].nbytes}


def test_what_a_block_keeps(whole_block):
    """For the backward: x, and in half precision what was convolved, projected and mixed, and o; no norm, no branch.

    Nor a norm that is handed over, or was.
    """
    B, H, W, C, R = 2, 9, 8, 64, 16
    x, *parameters = whole_block(B, H, W, C, num_heads=2, rank=R, H=48)
    kept = {}

    def keep(tensor):
        if tensor.numel() >= x.numel():
            kept[tensor.data_ptr()] = tensor.numel(), tensor.dtype
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        more = dict(normed=x.detach().half(), next_norm_weight=parameters[0])
        block(x.requires_grad_(), *parameters, **more, num_heads=2, inner=torch.float16, impl='triton')
    tokens, half = B * H * W, torch.float16
    packed = (tokens * (3 * C + R), half)
    states = (B * 2 * -(-H * W // 32) * 2 * 16 * 32, torch.float32)
    assert sorted(kept.values(), key=str) == sorted(
        [(x.numel(), torch.float32), packed, states, *[(tokens * C, half)] * 3], key=str
    )


@pytest.mark.parametrize(
    'part', ['layer', 'layer alone', 'mlp', 'layer conv', 'first half', 'block', 'image'], indirect=True
)
def test_block_parts_in_graphs(part, derive):
    """As operators: whole graphs for any size, the same numbers, no second derivative."""
    fn, tensors = part
    compiled = torch.compile(lambda *x: fn(*x, impl='triton'), fullgraph=True, backend='aot_eager', dynamic=True)
    for a, b in zip(derive(compiled, tensors), derive(lambda *x: fn(*x, impl='triton'), tensors), strict=True):
        torch.testing.assert_close(a, b)
    tensors = [x if x is None else x.detach().requires_grad_() for x in tensors]
    grads = torch.autograd.grad(sum(y.sum() for y in fn(*tensors, impl='triton')), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="impl='chunked'"):
        grads[0].sum().backward()


def test_block_parts_as_operators(first_half, whole_block):
    ops, check = torch.ops.bigla, torch.library.opcheck
    x, branch, weight, bias = *torch.randn(2, 5, 8), *torch.randn(2, 8)
    half = torch.float16
    check(ops.norm, (x.requires_grad_(), weight, None, 1e-6, half))
    check(ops.norm_backward, (x.detach().half(), x.detach(), weight, bias, 1e-6, half))
    check(ops.cast_norm, (x, weight, bias, 1e-6, torch.float32, half))
    check(ops.cast_norm_backward, (x.detach().half(), x.detach(), x.detach(), weight, bias, 1e-6, torch.float32, half))
    types = half, torch.float32, half
    check(ops.add_norm, (x, branch.half().requires_grad_(), weight.requires_grad_(), bias, 1e-6, *types))
    tensors = x.detach(), x.detach().half(), x.detach(), weight.detach(), bias
    check(ops.add_norm_backward, (*tensors, 1e-6, *types))
    many = torch.randn(2, 5, 8).requires_grad_()
    check(ops.add_pos_embed, (many, x.detach()[None], weight.detach(), bias, 1e-6, half))
    fc1, fc2 = torch.randn(6, 8), torch.randn(8, 3)
    check(ops.gated_mlp, (x, fc1.requires_grad_(), fc2))
    check(ops.gated_mlp_backward, (x.detach(), x.detach(), fc1.detach(), fc2))
    tensors = x, branch.half(), weight.detach(), None, fc1.half(), fc2.half(), torch.rand(5), None
    check(ops.residual_mlp, (tensors[0].requires_grad_(), *tensors[1:], 1e-6, half))
    check(
        ops.residual_mlp_backward,
        (x.detach(), x.detach(), *(t if t is None else t.detach() for t in tensors[1:]), 1e-6, half),
    )
    x, taps = torch.randn(2, 3, 4, 8), torch.randn(8, 1, 3, 3)
    vectors = weight.detach(), bias
    check(ops.norm_depthwise_conv, (x.requires_grad_(), *vectors, taps, True, 1e-6, half))
    check(ops.norm_depthwise_conv_backward, (x.detach().half(), x.detach(), *vectors, taps, True, 1e-6, half))
    for keep in (True, False):
        tensors = first_half(2, 3, 4, 8, num_heads=2, rank=5, bias=keep)
        options = 2, True, 1e-6, 1e-5, half, 16, True, keep
        check(ops.token_mixer, (tensors[0].requires_grad_(keep), *tensors[1:], *options))
    tensors = first_half(2, 3, 4, 8, num_heads=2, rank=5)
    options = 2, True, 1e-6, 1e-5, half, 16, True, True
    z, *kept = ops.token_mixer(*tensors, *options)
    check(ops.token_mixer_backward, (z, *tensors, *kept, *options))
    for keep in (True, False):
        tensors = whole_block(2, 3, 4, 8, num_heads=2, rank=5, H=6, bias=keep)
        tensors += [None, torch.rand(2)] if keep else [torch.rand(2), None]
        tensors += [torch.rand(2, 3, 4, 8).half(), *torch.rand(2, 8)] if keep else [None] * 3
        options = 2, True, 1e-6, 1e-5, half, 16, True, keep
        check(ops.block, (tensors[0].requires_grad_(keep), *tensors[1:], *options))
    tensors = [t if t is None else t.detach() for t in tensors]
    y, _, *kept = ops.block(*tensors, *options[:-1], True)
    check(ops.block_backward, (y, *tensors[:-3], *kept, *options[:-1], True))
    image, taps, vectors = torch.randn(1, 6, 5, 2), torch.randn(4, 2, 3, 3), torch.randn(3, 4).unbind()
    options = 2, 1e-5, 'gelu', torch.float32, torch.float32
    check(ops.conv_norm, (image, taps.requires_grad_(), *vectors, *options))
    y = ops.conv_norm(image, taps.detach(), *vectors, *options)
    check(ops.conv_norm_backward, (y, image, taps.detach(), *vectors, *options, True))


def test_an_image_has_a_gradient_on_demand(monkeypatch):
    """Training does not ask for it, and it takes long."""
    asked = []
    launch = kernels.launch_conv_norm_grad
    monkeypatch.setattr(kernels, 'launch_conv_norm_grad', lambda *a: (asked.append(a[-1]), launch(*a))[1])
    tensors = torch.randn(1, 6, 5, 2), torch.randn(4, 2, 3, 3).requires_grad_(), *torch.randn(3, 4)
    for wanted in (False, True):
        image = tensors[0].clone().requires_grad_(wanted)
        kernels.conv_norm(image, *tensors[1:], 2, 1e-5, 'silu', torch.float32, torch.float32).sum().backward()
        assert (image.grad is not None) == wanted
    assert asked == [False, True]


@pytest.mark.parametrize('C, D, side, stride, image', [(3, 24, 9, 8, True), (5, 16, 3, 2, False), (1, 8, 3, 1, True)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_gradient_of_the_weights_alone(C, D, side, stride, image, dtype, grids, monkeypatch):
    """By a kernel of its own where the image needs none; beside PyTorch's."""
    x, weight, *vectors = grids(C, D, side, 41, 37, image)
    monkeypatch.setattr(stem, 'PROGRAMS', 8)  # fewer than there are tiles
    launch, calls = stem.launch_conv_weight_grad, []
    monkeypatch.setattr(stem, 'launch_conv_weight_grad', lambda *a: (calls.append(a), launch(*a))[1])
    grads = []
    for wanted in (False, True):
        x.requires_grad_(wanted), weight.requires_grad_()
        y = kernels.conv_norm(x, weight, *vectors, stride, 1e-5, 'gelu', dtype, torch.float32)
        grads.append(torch.autograd.grad((y * torch.linspace(-1, 1, D)).sum(), weight)[0])
        assert len(calls) == 1
    error = (grads[0] - grads[1]).norm() / grads[1].norm()
    assert error < (2e-3 if dtype == torch.float16 else 1e-5)


def test_a_position_embedding(embeds):
    embeds('cpu')


def test_a_position_embedding_in_graphs(derive):
    """Its gradients are PyTorch's own sums, which have gradients."""
    tensors, weight = [torch.randn(2, 3, 4, 8), torch.randn(1, 3, 4, 8)], torch.randn(8, requires_grad=True)

    def embed(x, pos_embed):
        total, normed = add_pos_embed(x, pos_embed, weight, inner=torch.float16, impl='triton')
        return total, normed.float() * x

    compiled = torch.compile(embed, fullgraph=True, backend='aot_eager', dynamic=True)
    for a, b in zip(derive(compiled, tensors), derive(embed, tensors), strict=True):
        torch.testing.assert_close(a, b)
    tensors = [t.requires_grad_() for t in tensors]
    (grad,) = torch.autograd.grad(embed(*tensors)[0].square().sum(), tensors[1], create_graph=True)
    twice = torch.autograd.grad(grad.sum(), tensors[0])[0]
    assert twice.equal(torch.full_like(twice, 2))


@pytest.mark.parametrize('C, D, side, multiple', [(3, 24, 9, 32), (5, 300, 3, 1), (1, 4, 1, 32)])
@pytest.mark.parametrize('last', [False, True])
def test_weights_laid_out(C, D, side, multiple, last):
    """Cast, in either order, with zeros at the ends of rows; of parameters of any strides."""
    weight = torch.randn(D, C, side, side)
    want = (weight.permute(0, 2, 3, 1) if last else weight).flatten(1).half()
    want = F.pad(want, (0, -want.shape[1] % multiple))
    for some in (weight, weight.contiguous(memory_format=torch.channels_last), weight.mT.contiguous().mT):
        assert stem.lay_out(some, torch.float16, last, multiple).equal(want)


def test_cudnn_gets_channels_last(grids, monkeypatch):
    """Or it copies weights into that layout, in the forward and for the gradient of the grid."""
    seen = []

    def noted(fn):
        def call(x, *args):
            seen.extend(t.is_contiguous(memory_format=torch.channels_last) for t in (x, *args[:2]) if t is not None)
            return fn(x, *args)

        return call

    monkeypatch.setattr(torch, 'conv2d', noted(torch.conv2d))
    x, *tensors = grids(6, 140, 3, 5, 8)
    y = kernels.conv_norm(x.requires_grad_(), *tensors, 2, 1e-5, '', torch.float16, torch.float32)
    monkeypatch.setattr(torch.ops.aten, 'convolution_backward', noted(torch.ops.aten.convolution_backward))
    y.sum().backward()
    assert seen == [True] * 7  # grid and weights, once more in the backward, and there the gradient, too


def test_vectors_of_any_stride(part):
    """Parameters may be columns of something, or one number for all."""
    fn, tensors = part
    spread = [x if x is None or x.ndim > 1 else torch.stack([x, x.new_zeros(x.shape)], 1)[:, 0] for x in tensors]
    for a, b in zip(fn(*spread, impl='triton'), fn(*tensors, impl='triton')):
        assert a.equal(b)


def test_an_image_beyond_int32():
    """Rows two gigabytes apart."""
    image = torch.empty_strided((1, 3, 4, 2), (0, 2**30, 7, 1), dtype=torch.float16)
    image.copy_(torch.randn(1, 3, 4, 2))
    args = torch.randn(4, 2, 3, 3), *torch.randn(3, 4), 1, 1e-5, '', torch.float16, torch.float16
    assert kernels.conv_norm(image, *args).equal(kernels.conv_norm(image.contiguous(), *args))
    dp = torch.randn(1, 3, 4, 4).half()
    far, near = (weights_grad(dp, x) for x in (image, image.contiguous()))
    assert far.equal(near) and not weights_grad(dp[:0], image[:0]).any()


def weights_grad(dp, image):
    with sums.Sums() as some:
        grad = stem.launch_conv_weight_grad(some, dp, image, 3, 1)
    return grad


def sum_rows(x, pieces=1):
    with sums.Sums() as some:
        return some.add((x, pieces))


@pytest.mark.parametrize('M', [1, 300, 20_000])
def test_sums(M):
    x = torch.randn(M, 40)[:, 3:38]
    left, right = sum_rows(x[:, :34], 2)
    torch.testing.assert_close(torch.cat([left, right]), x[:, :34].sum(0), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(sum_rows(x)[0], x.sum(0), atol=1e-3, rtol=1e-4)


def test_many_sums_by_two_launches():
    """Tall and short ones, more than one launch takes, one without rows: the same bits as one by one."""
    many = [(torch.randn(M, 40)[:, :C], pieces) for M, C, pieces in (
        (2000, 40, 1), (9, 40, 2), (700, 7, 1), (0, 6, 2), (1, 36, 2), (641, 33, 1), (640, 8, 2), (50, 3, 1)
    )]  # fmt: skip
    with sums.Sums() as some:
        together = some.add(*many[:3]) + some.add(*many[3:])
    alone = [total for x, pieces in many for total in sum_rows(x, pieces)]
    assert len(together) == len(alone) == 12
    assert all(x.equal(y) for x, y in zip(together, alone))
    torch.testing.assert_close(together[0], many[0][0].sum(0), atol=1e-3, rtol=1e-4)


@pytest.mark.timeout(7200)
@settings(
    max_examples=int(os.environ.get('BIGLA_CASES', '25')),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_random_cases(data, draw_case, check_budget):
    inputs, gates = draw_case(data, 70, (torch.float32, torch.float16))
    check_budget(ours, inputs, max(4, ROUNDINGS.get(gates, 1)))  # of a few tokens there is no average of roundings

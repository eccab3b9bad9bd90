"""The Triton kernels on a GPU: accuracy, the same bits every time, how PyTorch takes them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bigla import bigla

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# More than one where log2(e) g, which is rounded, is large.
ROUNDINGS = {'strong': 8, 'constant': 50}
# The products of float32 leave out what lies below 2^-21 of them.
PRODUCTS = {FP32: 2}


def ours(q, k, v, g_fwd, g_bwd, **kwargs):
    from bigla import triton  # here, so that the file can be collected where there is none

    assert triton.unsupported(q, k, v, g_fwd, g_bwd) is None
    return triton.bigla(q, k, v, g_fwd, g_bwd, q.shape[-1] ** -0.5, **kwargs)


@pytest.fixture
def make(make_inputs):
    """`make(B, L, nh, K, V, gates=, dtype=)` gives the inputs of `make_inputs` on the GPU."""

    def make(*shape, dtype=BF16, **kwargs):
        return [x.detach().cuda().requires_grad_() for x in make_inputs(*shape, dtype=dtype, **kwargs)]

    return make


@pytest.fixture
def check(check_budget):
    return lambda inputs, roundings=1, **kwargs: check_budget(ours, inputs, roundings, **kwargs)


@pytest.mark.parametrize('dtype', [FP32, FP16, BF16], ids=['fp32', 'fp16', 'bf16'])
@pytest.mark.parametrize(
    'B, L, nh, K, V',
    [
        (2, 1, 3, 32, 64),
        (3, 49, 24, 16, 32),
        (2, 63, 2, 7, 5),
        (4, 196, 3, 32, 64),
        (2, 1000, 3, 32, 64),
        (2, 1000, 3, 16, 32),
        (1, 257, 2, 33, 65),
        (1, 100, 2, 64, 128),
        (1, 70, 1, 128, 40),
        (1, 50, 1, 256, 256),
        (1, 4096, 1, 32, 64),
    ],
)
def test_shapes(B, L, nh, K, V, dtype, make, check):
    check(make(B, L, nh, K, V, dtype=dtype), PRODUCTS.get(dtype, 1))


@pytest.mark.parametrize('dtype', [FP32, FP16, BF16], ids=['fp32', 'fp16', 'bf16'])
@pytest.mark.parametrize('L, K, V', [(60, 32, 64), (300, 32, 64), (60, 16, 32), (300, 16, 32)])
def test_gates(L, K, V, dtype, gates, make, check):
    """One chunk and several, none hard, some, all. A rounding of g is |g| of e^g."""
    check(make(2, L, 2, K, V, gates=gates, dtype=dtype), ROUNDINGS.get(gates, 1))


@pytest.mark.parametrize('dtype', [FP32, FP16, BF16], ids=['fp32', 'fp16', 'bf16'])
@pytest.mark.parametrize('K, V', [(32, 64), (16, 32), (30, 70)])
def test_states(K, V, dtype, states, make, check):
    check(make(2, 107, 2, K, V, dtype=dtype), PRODUCTS.get(dtype, 1))


@pytest.mark.parametrize('K, V', [(32, 64), (16, 32), (30, 70)])
def test_regimes(K, V, gates, regime, make, check):
    check(make(2, 300, 2, K, V, gates=gates), ROUNDINGS.get(gates, 1))


@torch.no_grad()
def error_of(inputs, roundings=1, **kwargs):
    """That of ours without gradients, and what it may be, beside float64."""
    want = bigla(*(x.double() for x in inputs), impl='reference', **kwargs)
    got, again, peer = ours(*inputs, **kwargs), ours(*inputs, **kwargs), bigla(*inputs, impl='chunked', **kwargs)
    assert again.equal(got)
    mine, theirs = (((x - want).norm() / want.norm()).item() for x in (got, peer))
    return mine, 2 * theirs + roundings * 2.0**-8


@pytest.mark.parametrize('K, V', [(32, 64), (16, 32), (30, 70)])
def test_long_chunks(K, V, gates, regime, long_chunks, make):
    mine, most = error_of(make(2, 300, 2, K, V, gates=gates), ROUNDINGS.get(gates, 1))
    assert mine <= most


@pytest.mark.parametrize('V', [64, 32])
@pytest.mark.parametrize('L', [33, 64, 65, 100, 129, 192, 196, 256])
def test_whole_sequences(L, V, gates, whole_sequences, make):
    """Of two, three and four chunks, none hard, some, all; the last one shorter, or empty."""
    mine, most = error_of(make(2, L, 3, 32, V, gates=gates), ROUNDINGS.get(gates, 1))
    assert mine <= most


def test_whole_sequences_of_float32_gates_and_logits(whole_sequences, make):
    inputs = make(2, 196, 3, 32, 64)
    mine, most = error_of(inputs[:3] + [x.float() for x in inputs[3:]])
    assert mine <= most
    mine, most = error_of(inputs[:3] + [6 * torch.randn_like(x) for x in inputs[3:]], gate_logits=True)
    assert mine <= most


@torch.no_grad()
def test_a_thousand_whole_sequences(whole_sequences, make):
    """The same bits every time, in memory that held NaN; a hard sequence among them."""
    inputs = make(40, 196, 3, 32, 64)
    inputs[3] = torch.cat([inputs[3][1:], torch.full_like(inputs[3][:1], -50)])
    first = ours(*inputs)
    assert first.isfinite().all()
    for _ in range(1000):
        memory = torch.full_like(first, torch.nan)
        del memory
        assert ours(*inputs).equal(first)


def test_many_tokens_without_gradients(make, without_hopper, monkeypatch):
    """Long chunks against short ones."""
    inputs = make(2, 24_000, 3, 32, 64)
    with torch.no_grad():
        got = ours(*inputs)
        monkeypatch.setattr('bigla.triton.primitives.SHORT', 10**9)
        without_hopper()
        want = ours(*inputs)
    assert not got.equal(want)
    assert (got - want).norm() < 2.0**-7 * want.norm()


@pytest.mark.parametrize('L', [196, 300])
@pytest.mark.parametrize('K, V', [(32, 64), (16, 32), (32, 32), (16, 64)])
def test_gradients_of_long_chunks(K, V, L, gates, hopper_chunks, make, check, monkeypatch):
    """Few and many, none hard, some, all; the last one is shorter."""
    inputs = make(2, L, 2, K, V, gates=gates)
    check(inputs, ROUNDINGS.get(gates, 1))
    monkeypatch.setattr('bigla.triton.hopper.launch_bigla_grad', None)
    with pytest.raises(TypeError, match='NoneType'):  # it was what ran
        ours(*inputs).sum().backward()


@pytest.mark.parametrize('L', [33, 63, 64, 65, 128, 300, 449])
def test_lengths_of_long_chunks(L, hopper_chunks, make, check):
    check(make(3, L, 2, 32, 64))
    check(make(1, L, 3, 16, 32, gates='mixed'))


@pytest.mark.parametrize('L', [196, 300])
@pytest.mark.parametrize('K, V', [(32, 64), (16, 32)])
def test_float32_gates_of_long_chunks(K, V, L, hopper_chunks, make, check):
    inputs = make(2, L, 3, K, V)
    check(inputs[:3] + [x.detach().float().requires_grad_() for x in inputs[3:]])


@pytest.mark.parametrize('L', [196, 300])
def test_logits_of_long_chunks(L, hopper_chunks, make, run, errors):
    inputs = make(1, L, 2, 16, 32, gates='zero')
    inputs[3:] = [(6 * torch.randn_like(x)).requires_grad_() for x in inputs[3:]]

    def outside(q, k, v, *logits):
        return bigla(q, k, v, *(F.logsigmoid(x) / 16 for x in logits), impl='chunked')

    exact = run(outside, [x.detach().double().requires_grad_() for x in inputs])
    mine = errors(run(lambda *x: ours(*x, gate_logits=True), inputs), exact)
    peer = errors(run(outside, inputs), exact)
    assert all(mine[name] <= 2 * peer[name] + 2.0**-8 for name in mine), (mine, peer)


@pytest.mark.parametrize('dtype', [FP16, BF16], ids=['fp16', 'bf16'])
def test_float32_gates(dtype, make, check):
    inputs = make(2, 300, 3, 32, 64, dtype=dtype)
    check(inputs[:3] + [x.detach().float().requires_grad_() for x in inputs[3:]])


def test_gate_logits(make, run, errors):
    inputs = make(1, 300, 2, 16, 32, gates='zero', dtype=FP32)
    inputs[3:] = [(6 * torch.randn_like(x)).requires_grad_() for x in inputs[3:]]

    def outside(q, k, v, *logits):
        return bigla(q, k, v, *(F.logsigmoid(x) / 16 for x in logits), impl='chunked')

    got = run(lambda *x: ours(*x, gate_logits=True), inputs)
    worst = errors(got, run(outside, [x.detach().double().requires_grad_() for x in inputs]))
    assert max(worst.values()) < 1e-5, worst


LAYOUTS = ['packed', 'head-major', 'every other column', 'odd offset', 'odd start']


def laid_out(tensors, layout):
    """The same numbers in other places."""
    if layout == 'packed':
        return list(torch.cat(tensors, -1).split([x.shape[-1] for x in tensors], -1))
    if layout == 'head-major':
        return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    if layout == 'every other column':
        return [x.repeat_interleave(2, -1)[..., ::2] for x in tensors]
    if layout == 'odd start':
        return [x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x) for x in tensors]
    return [F.pad(x, (1, 2))[..., 1:-2] for x in tensors]


@torch.no_grad()
@pytest.mark.parametrize('layout', LAYOUTS)
def test_strides_of_whole_sequences(layout, whole_sequences, make):
    inputs = make(2, 196, 3, 32, 64)
    views = laid_out([x.detach() for x in inputs], layout)
    before = [x.clone() for x in views]
    assert ours(*views).equal(ours(*inputs))
    assert all(a.equal(b) for a, b in zip(views, before)), 'an input was written'


@pytest.mark.parametrize('long', [False, True], ids=['', 'long chunks'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_strides(layout, long, make, run, errors, request):
    if long:
        request.getfixturevalue('hopper_chunks')
    inputs = make(2, 300, 2, 32, 32)
    views = laid_out([x.detach() for x in inputs], layout)
    before = [x.clone() for x in views]
    views = [x.requires_grad_() for x in views]
    got, want = run(ours, views), run(ours, inputs)
    if layout.startswith('odd'):  # narrower loads, and sums in another order
        assert max(errors(got, want).values()) < 2.0**-9
    else:
        assert all(a.equal(b) for a, b in zip(got, want))
    assert all(a.equal(b) for a, b in zip(views, before)), 'an input was written'


def test_expanded_gradient(make):
    inputs = make(1, 300, 2, 16, 32)
    summed = torch.autograd.grad(ours(*inputs).sum(), inputs)  # the gradient of a sum has strides of 0
    out = ours(*inputs)
    assert all(a.equal(b) for a, b in zip(summed, torch.autograd.grad(out, inputs, torch.ones_like(out))))


@pytest.mark.parametrize('gates', ['model', 'strong'])
@pytest.mark.parametrize('L, K, V', [(40, 5, 7), (300, 5, 7), (600, 32, 64)])
def test_every_element_is_written(L, K, V, gates, make, run):
    inputs = make(2, L, 3, K, V, gates=gates)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        assert torch.empty(1, device='cuda').isnan()
        got = run(ours, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize(
    'L, K, V, long',
    [
        (520, 32, 64, True),
        (196, 32, 64, True),
        (500, 32, 64, False),
        (520, 16, 32, True),
        (196, 16, 32, True),
        (520, 16, 32, False),
    ],
)
@pytest.mark.parametrize('gates', ['model', 'mixed'])
def test_a_thousand_launches_give_the_same_bits(L, K, V, long, gates, make, run, request):
    if long:
        request.getfixturevalue('hopper_chunks')
    inputs = make(8, L, 3, K, V, gates=gates)
    want = run(ours, inputs)
    grad = torch.randn(want[0].shape, generator=torch.Generator().manual_seed(1)).to(want[0])
    differ = torch.zeros(6, dtype=torch.int64, device='cuda')
    for _ in range(1000):
        out = ours(*inputs)
        got = [out, *torch.autograd.grad(out, inputs, grad)]
        differ += torch.stack([(a != b).any() for a, b in zip(got, want)])
    assert differ.tolist() == [0] * 6


@pytest.mark.parametrize('L', [196, 520])
def test_memory_that_was_used_before(L, hopper_chunks, make):
    """Launches that overlap read none of what the ones before left at the same addresses."""
    from bigla.triton.launch import one_by_one

    both = [[x.detach() for x in make(8, L, 3, 32, 64, seed=seed)] for seed in (0, 1)]
    with one_by_one():
        want = [ours(*inputs) for inputs in both]
    differ = torch.zeros(2, dtype=torch.int64, device='cuda')
    for _ in range(500):
        differ += torch.stack([(ours(*inputs) != o).any() for inputs, o in zip(both, want)])
    assert differ.tolist() == [0, 0]


def test_retained_graph(make):
    inputs = make(1, 300, 1, 16, 32, gates='mixed')
    out = ours(*inputs).sum()
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    assert all(a.equal(b) for a, b in zip(first, torch.autograd.grad(out, inputs)))


def test_batch_invariance(make):
    inputs = make(3, 300, 3, 32, 64)
    whole = ours(*inputs)
    for b, h in itertools.product(range(3), range(3)):
        assert ours(*(x[b : b + 1, :, h : h + 1] for x in inputs)).equal(whole[b : b + 1, :, h : h + 1])


@pytest.mark.parametrize('L', [43_884, 67_200])
def test_long_sequences(L, make, check):
    check(make(1, L, 3, 16, 32), oracle='chunked')


def test_beyond_int32():
    """More than 2^31 elements: the last sample comes out as it does alone."""
    if torch.cuda.get_device_properties(0).total_memory < 64 * 2**30:
        pytest.skip('needs 64 GiB of GPU memory')
    shape = 36, 65536, 32, 32
    q, k, v, g = (torch.randn(shape, dtype=BF16, device='cuda') for _ in range(4))
    g = -g.abs_().div_(8)
    assert q.numel() > 2**31
    with torch.no_grad():
        whole = ours(q, k, v, g, g)[-1:]
        assert whole.equal(ours(q[-1:], k[-1:], v[-1:], g[-1:], g[-1:]))


@pytest.mark.parametrize('K, V, lengths', [(16, 32, (300, 400)), (32, 64, (600, 700))])
@pytest.mark.parametrize('dynamic', [False, True])
def test_compile(dynamic, K, V, lengths, make, run):
    def step(*inputs):
        return ours(*inputs) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for L in lengths if dynamic else lengths[:1]:
        inputs = make(1, L, 2, K, V)
        assert all(a.equal(b) for a, b in zip(run(compiled, inputs), run(step, inputs)))


def test_the_public_operator(make, run):
    """A GPU gets the Triton kernels, compiled whole or not."""
    inputs = make(1, 300, 2, 16, 32)
    want = run(ours, inputs)
    for fn in (bigla, torch.compile(bigla, fullgraph=True)):
        assert all(a.equal(b) for a, b in zip(run(fn, inputs), want))


def test_float64_is_chunked_and_says_so_once(make):
    inputs = make(1, 30, 1, 4, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match='without its Triton kernels, slowly: q must be float32') as said:
        for _ in range(2):
            out = bigla(*inputs)
    assert len(said) == 1 and out.equal(bigla(*inputs, impl='chunked'))


def test_export(make):
    class Model(torch.nn.Module):
        def forward(self, *inputs):
            return 2 * ours(*inputs)

    def inputs(L):
        return tuple(x.detach() for x in make(1, L, 1, 16, 32))

    L = torch.export.Dim('L', min=2, max=100_000)
    program = torch.export.export(Model(), inputs(300), dynamic_shapes=(tuple({1: L} for _ in range(5)),))
    assert program.module()(*inputs(500)).equal(Model()(*inputs(500)))


@pytest.mark.parametrize('L', [300, 600])
def test_cuda_graph(L, make, run):
    inputs = make(2, L, 3, 32, 64, gates='mixed')
    want = run(ours, inputs)
    grad = torch.randn(want[0].shape, generator=torch.Generator().manual_seed(1)).to(want[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(ours(*inputs), inputs, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ours(*inputs)
        got = [out, *torch.autograd.grad(out, inputs, grad)]
    for x in got:
        x.detach().fill_(torch.nan)
    graph.replay()
    assert all(a.equal(b) for a, b in zip(got, want))


def test_no_synchronisation(make):
    inputs = make(2, 300, 3, 32, 64)
    torch.autograd.grad(ours(*inputs).sum(), inputs)
    torch.cuda.set_sync_debug_mode('error')
    try:
        torch.autograd.grad(ours(*inputs).sum(), inputs)
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_checkpoint(make, run):
    inputs = make(2, 300, 3, 32, 64)
    again = run(lambda *x: checkpoint(ours, *x, use_reentrant=False), inputs)
    assert all(a.equal(b) for a, b in zip(again, run(ours, inputs)))


def test_autocast(make, run):
    """A model under autocast brings bfloat16 or float16; nothing is cast behind its back."""
    inputs = make(2, 300, 3, 32, 64)
    for dtype in (BF16, FP16):
        with torch.autocast('cuda', dtype):
            got = run(ours, inputs)
        assert all(a.equal(b) for a, b in zip(got, run(ours, inputs)))


def test_second_derivative(make):
    inputs = make(1, 100, 1, 16, 32)
    (dq,) = torch.autograd.grad(ours(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="impl='chunked'"):
        dq.sum().backward()


@pytest.mark.parametrize('L', [20, 100, 300])
def test_opcheck(L, make):
    inputs = make(1, L, 2, 16, 32)
    torch.library.opcheck(torch.ops.bigla.bigla, (*inputs, 0.25, False, 32, False, True))


def test_a_product_of_three_tf32():
    """What a lone product of float32 loses: nothing averages it where there is one token, key and value."""
    import triton
    import triton.language as tl

    @triton.jit
    def product_kernel(x, y, z, PREC: tl.constexpr):
        r = tl.arange(0, 16)
        first = (r == 0).to(tl.float32)  # of the sixteen terms of a sum
        a = tl.load(x + tl.program_id(0) * 16 + r)[:, None] * first[None, :]
        b = tl.load(y + tl.program_id(0) * 16 + r)[None, :] * first[:, None]
        at = tl.program_id(0) * 256 + r[:, None] * 16 + r[None, :]
        tl.store(z + at, tl.dot(a, b, input_precision=PREC))

    torch.manual_seed(0)
    x, y = torch.randn(2, 4096, 16, device='cuda')
    z = torch.empty(4096, 16, 16, device='cuda')
    worst = {}
    want = x.double()[:, :, None] * y.double()[:, None, :]
    for precision in ('tf32x3', 'ieee'):
        product_kernel[4096,](x, y, z, PREC=precision, num_warps=1)
        worst[precision] = ((z.double() - want) / want).abs().max().item() * 2**24
    print(f'roundings of 2^-24 that the worst of a million products is off: {worst}')
    assert worst['ieee'] <= 1 and worst['tf32x3'] <= 9.5, worst  # 9.17 on an H200

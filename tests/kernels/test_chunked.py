"""The chunk-parallel form against the oracle: values, gradients, precision, exponents, memory, how PyTorch takes it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from bigla import bigla
from bigla.chunked import _operator

SHAPES = [  # L, nh, K, V
    (1, 3, 4, 4),
    (2, 2, 4, 8),
    (15, 1, 7, 5),
    (63, 2, 1, 3),
    (64, 2, 16, 32),
    (65, 3, 5, 1),
    (196, 2, 9, 16),
    (1000, 1, 16, 33),
]


def chunked(*inputs):
    return bigla(*inputs, impl='chunked')


def reference(*inputs):
    return bigla(*inputs, impl='reference')


@pytest.mark.parametrize('L, nh, K, V', SHAPES)
def test_shapes(L, nh, K, V, make_inputs, run, errors):
    inputs = make_inputs(2, L, nh, K, V, gates='mixed')
    worst = errors(run(chunked, inputs), run(reference, inputs))
    assert max(worst.values()) < 1e-13, worst


def test_gates(gates, make_inputs, run, errors):
    """From no decay to one of e^-50, e^-10000 and to nothing at all, over tails and several groups of chunks."""
    inputs = make_inputs(1, 1100, 1, 6, 5, gates=gates)
    got = run(chunked, inputs)
    assert all(x.isfinite().all() for x in got)
    worst = errors(got, run(reference, inputs))
    assert max(worst.values()) < 1e-12, worst


@pytest.mark.parametrize('L', [1, 7, 70])
def test_gradcheck(L, make_inputs):
    assert torch.autograd.gradcheck(chunked, make_inputs(1, L, 1, 2, 3), fast_mode=L > 10)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape_and_gate(data):
    B, L, nh, K, V = (data.draw(st.integers(low, high)) for low, high in ((1, 2), (1, 150), (1, 3), (1, 9), (1, 9)))
    strongest = data.draw(st.sampled_from([1e-6, 1e-2, 1.0, 50.0]))
    share = data.draw(st.floats(0, 1))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    q, k, v = (torch.randn(B, L, nh, width, generator=rng, dtype=torch.float64) for width in (K, K, V))
    u = torch.rand(2, 2, *q.shape, generator=rng, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, *torch.where(u[0] < share, -strongest * u[1], -1e-3 * u[1]))]
    got, want = chunked(*inputs), reference(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    for a, b in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('gates', ['model', 'weak', 'mixed', 'strong'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype, gates, make_inputs, run, errors):
    """Against float64, at most twice the error of the recurrence in the same dtype and one rounding of the result."""
    inputs = make_inputs(1, 1000, 2, 16, 32, gates=gates, dtype=dtype)
    exact = run(reference, [x.detach().double().requires_grad_() for x in inputs])
    errs, budget = errors(run(chunked, inputs), exact), errors(run(reference, inputs), exact)
    for name, err in errs.items():
        allowed = 2 * (budget[name] + torch.finfo(dtype).eps / 2)
        assert err <= allowed, f'{name}: {err:.2e}, allowed {allowed:.2e} (recurrence {budget[name]:.2e})'


@pytest.mark.parametrize('gate', [-7e-6, -3e-5, -1e-3])
def test_weak_gates_keep_their_digits(gate):
    """exp rounds away most of a gate near 0. Taken a token at a time that would add up: to 2e-5 over 4096 tokens."""
    q, k, v = torch.rand(3, 1, 4096, 1, 2)
    inputs = (q, k, v, torch.full_like(q, gate), torch.full_like(q, gate))
    exact = chunked(*(x.double() for x in inputs))
    assert (chunked(*inputs) - exact).norm() < 5e-7 * exact.norm()


def test_strided_inputs(make_inputs, run):
    """Slices of one packed projection, a transposed view, an expanded one: same bits as from contiguous copies."""
    B, L, nh, K, V = 2, 70, 3, 4, 8
    packed = torch.randn(B, L, nh * (2 * K + V))
    q, k, v = (x.unflatten(-1, (nh, -1)) for x in packed.split([nh * K, nh * K, nh * V], -1))
    g_fwd = (-torch.rand(B, nh, K, L)).permute(0, 3, 1, 2)
    g_bwd = (-torch.rand(B, 1, nh, K)).expand(B, L, nh, K)
    views = [x.requires_grad_() for x in (q, k, v, g_fwd, g_bwd)]
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in views]
    assert not any(x.is_contiguous() for x in views)
    for a, b in zip(run(chunked, views), run(chunked, copies), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_expanded_output_gradient(make_inputs):
    inputs = make_inputs()
    ones = torch.ones(inputs[2].shape, dtype=torch.float64)
    from_sum = torch.autograd.grad(chunked(*inputs).sum(), inputs)
    for a, b in zip(from_sum, torch.autograd.grad(chunked(*inputs), inputs, ones), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_two_backwards_agree(make_inputs):
    inputs = make_inputs(gates='mixed')
    before = [x.detach().clone() for x in inputs]
    out = chunked(*inputs).square().sum()
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out, inputs), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_some_gradients_only(make_inputs):
    inputs = make_inputs()
    want = torch.autograd.grad(chunked(*inputs).square().sum(), inputs)
    for i, x in enumerate(inputs):
        leaves = [y if y is x else y.detach() for y in inputs]
        got = torch.autograd.grad(chunked(*leaves).square().sum(), x)[0]
        torch.testing.assert_close(got, want[i], rtol=0, atol=0)


@pytest.mark.parametrize('form', [chunked, lambda *inputs: _operator(*inputs, 0.5)[0]], ids=['eager', 'operator'])
def test_second_derivative_raises(form, make_inputs):
    inputs = make_inputs()
    dq = torch.autograd.grad(form(*inputs).sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dq.sum(), inputs[1])


def test_autocast_is_off_inside(make_inputs, run):
    inputs = make_inputs(L=100, dtype=torch.float32)
    expected = run(chunked, inputs)
    with torch.autocast('cpu', torch.bfloat16):
        got = run(chunked, inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


class Watch(TorchDispatchMode):
    """Keeps the largest exponent of every exponential, and the bytes of all tensors that operators gave back."""

    EXPONENTIALS = ('exp', 'exp_')
    OTHERS = ('exp2', 'expm1', 'pow', 'sigmoid', 'softmax', 'logsumexp', 'cumprod', 'div', 'reciprocal')

    def __init__(self) -> None:
        super().__init__()
        self.exponents: list[float] = []
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name.rstrip('_') not in self.OTHERS, name
        if name in self.EXPONENTIALS:
            self.exponents.append(args[0].max().item())
        out = func(*args, **(kwargs or {}))
        self.nbytes += sum(x.nbytes for x in tree_leaves(out) if isinstance(x, Tensor))
        return out


def test_exponents(gates, make_inputs, run):
    """No exponential of anything positive, forward or backward, and no division or power that could stand for one."""
    inputs = make_inputs(1, 1100, 1, 4, 4, gates=gates, dtype=torch.float32)
    with Watch() as watch:
        run(chunked, inputs)
    assert len(watch.exponents) > 10
    assert max(watch.exponents) <= 0


def test_memory_is_linear(make_inputs, run):
    """What is kept for the backward, and all that forward and backward ever allocate, double with L."""
    saved, made = [], []
    for L in (1024, 2048, 4096, 8192):
        inputs = make_inputs(1, L, 1, 4, 8, dtype=torch.float32)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x):
            chunked(*inputs)
        saved.append(sum(kept))
        with Watch() as watch:
            run(chunked, inputs)
        made.append(watch.nbytes)
    for sizes in (saved, made):
        assert all(1.9 < b / a < 2.1 for a, b in zip(sizes, sizes[1:])), sizes
    assert saved[0] < 3 * sum(x.nbytes for x in inputs) / 8


def test_checkpoint(make_inputs, run):
    inputs = make_inputs()
    got = run(lambda *x: checkpoint(chunked, *x, use_reentrant=False), inputs)
    for a, b in zip(got, run(chunked, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@pytest.mark.parametrize('L', [1, 33, 600])
def test_operator(L, dtype, make_inputs):
    """What PyTorch asks of an operator: gradients, and a fake of the same shapes and strides, for a symbolic L too."""
    torch.library.opcheck(_operator, (*make_inputs(2, L, 2, 3, 5, dtype=dtype), 0.5), atol=1e-2, rtol=1e-2)


def test_compile(make_inputs, run):
    """One graph for all lengths, whose nodes do not grow with them."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(chunked, fullgraph=True, dynamic=True, backend=counter)
    for B, L in ((3, 600), (4, 2), (3, 64), (2, 1100)):
        inputs = make_inputs(B, L, 5, 4, 6)
        for a, b in zip(run(compiled, inputs), run(chunked, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1 and counter.op_count < 10


def test_export(make_inputs):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return chunked(*inputs)

    inputs = tuple(x.detach() for x in make_inputs(1, 600, 1, 4, 4))
    program = torch.export.export(Module(), inputs).run_decompositions({})
    torch.testing.assert_close(program.module()(*inputs), chunked(*inputs), rtol=0, atol=0)

"""The oracle against other ways of writing the operator."""

import pytest
import torch

from bigla import bigla


def reference(*inputs, scale=None):
    return bigla(*inputs, scale=scale, impl='reference')


def masked(q, k, v, g_fwd, g_bwd, scale):
    """All pairs at once, O(L^2): o_i = scale/2 * sum_j (q_i . (decay_ij * k_j)) v_j."""
    L = q.shape[1]
    i, j, u = torch.meshgrid(*[torch.arange(L)] * 3, indexing='ij')
    fwd = torch.einsum('iju,buhk->bijhk', ((j < u) & (u <= i)).double(), g_fwd).exp()
    bwd = torch.einsum('iju,buhk->bijhk', ((i <= u) & (u < j)).double(), g_bwd).exp()
    i, j = i[..., 0, None, None], j[..., 0, None, None]
    decay = torch.where(j <= i, fwd, 0) + torch.where(j >= i, bwd, 0)
    return scale / 2 * torch.einsum('bihk,bijhk,bjhk,bjhv->bihv', q, decay, k, v)


@pytest.mark.parametrize('gates', ['model', 'strong', 'zero'])
def test_masked_form(gates, make_inputs, run, errors):
    inputs = make_inputs(L=13, gates=gates)
    worst = errors(run(reference, inputs), run(lambda *x: masked(*x, scale=5**-0.5), inputs))
    assert max(worst.values()) < 1e-13, worst


def test_single_token(make_inputs):
    """Both states hold k v^T alone and undecayed: o = scale * (q . k) v."""
    q, k, v, *gates = make_inputs(L=1)
    torch.testing.assert_close(reference(q, k, v, *gates, scale=0.3), 0.3 * (q * k).sum(-1, keepdim=True) * v)


def test_gradcheck(make_inputs):
    inputs = make_inputs(B=1, L=5, nh=2, K=2, V=3)
    assert torch.autograd.gradcheck(reference, inputs)
    assert torch.autograd.gradgradcheck(reference, make_inputs(B=1, L=3, nh=1, K=2, V=1))


def test_flip(make_inputs):
    """Reading the tokens backwards and exchanging the gates turns the output around."""
    q, k, v, g_fwd, g_bwd = make_inputs()
    flipped = reference(*(x.flip(1) for x in (q, k, v, g_bwd, g_fwd)))
    torch.testing.assert_close(flipped.flip(1), reference(q, k, v, g_fwd, g_bwd), rtol=0, atol=0)


def test_batch_invariance(make_inputs):
    """Samples and heads do not see each other."""
    inputs = make_inputs(B=3, nh=4)
    whole = reference(*inputs)
    for b, h in ((0, 0), (1, 3), (2, 2)):
        alone = reference(*(x[b : b + 1, :, h : h + 1] for x in inputs))
        torch.testing.assert_close(whole[b : b + 1, :, h : h + 1], alone, rtol=1e-14, atol=1e-14)


def test_autocast_is_off_inside(make_inputs):
    inputs = make_inputs(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        assert (inputs[0][0, 0] @ inputs[1][0, 0].mT).dtype == torch.bfloat16
        out = reference(*inputs)
    torch.testing.assert_close(out, reference(*inputs), rtol=0, atol=0)


def test_low_precision_accumulates_in_float32(make_inputs):
    """Rounding enters with the inputs and leaves with the output, and nowhere between."""
    inputs = make_inputs(L=300, gates='weak', dtype=torch.bfloat16)
    wide = reference(*(x.float() for x in inputs))
    torch.testing.assert_close(reference(*inputs), wide.bfloat16(), rtol=0, atol=0)

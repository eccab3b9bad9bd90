"""The compiled backbones: one graph, few of them over many sizes, the same values, the same state dict."""

import copy

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from mmvig.models import ViG, ViGH

SMALL = {
    ViG: dict(arch=dict(embed_dims=16, depth=1, num_heads=1, act=True, drop_path_rate=0.0), img_size=64),
    ViGH: dict(
        arch=dict(embed_dims=(16, 32, 48, 64), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4), drop_path_rate=0.0),
        out_indices=(0, 1),
    ),
}
BOTH = pytest.mark.parametrize('cls', SMALL, ids=lambda cls: cls.__name__)
# Square, long, odd, and with one or both sides of ViG's position embedding.
SIZES = [
    *[(64, 64), (64, 96), (96, 64), (80, 112), (75, 117), (128, 64), (100, 100), (33, 47), (160, 64), (72, 72)],
    *[(64, 33), (65, 64), (112, 80), (48, 48), (97, 41), (41, 97), (192, 128), (128, 192), (63, 61), (256, 40)],
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(cls, **settings):
    torch.manual_seed(0)
    return cls(**{**SMALL[cls], **settings})


def step(net, image):
    """The outputs, and the gradients by name, of a training step."""
    net.zero_grad()
    outs = net(image)
    sum(out.square().mean() for out in outs).backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return [out.detach() for out in outs], grads


def agree(found, expected):
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[0], expected[0], strict=True))
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert torch.allclose(found[1][name], grad, atol=1e-5, rtol=1e-3), name


@BOTH
@pytest.mark.parametrize('settings', [dict(), dict(with_cp=True, frozen_stages=0)], ids=['plain', 'with_cp, frozen'])
def test_one_graph_with_the_same_values(cls, settings):
    net, image = small(cls, **settings).train(), torch.rand(1, 3, 32, 48)
    names, expected = list(net.state_dict()), step(net, image)
    net.compile(backend='aot_eager', fullgraph=True, dynamic=False)
    agree(step(net, image), expected)
    assert list(net.state_dict()) == names
    net.load_state_dict(small(cls).state_dict())
    assert torch.allclose(copy.deepcopy(net)(image)[0], net(image)[0], atol=1e-5)


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.parametrize('cls', [ViG, ViGH])
def test_whole_models_by_inductor(cls):
    """The tiny models, in the minute that it takes: their graphs are deeper than those above."""
    torch.manual_seed(0)
    net, image = cls('tiny', drop_path_rate=0.0).cuda(), torch.rand(2, 3, 224, 320, device='cuda')
    expected = step(net, image)
    net.compile(fullgraph=True, dynamic=False)
    found = step(net, image)
    for a, b in zip([*found[0], *found[1].values()], [*expected[0], *expected[1].values()], strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm()


@BOTH
def test_two_recompilations_over_twenty_sizes(cls):
    """With convolutions that do not depend on the size."""
    net, counter = small(cls).eval(), CompileCounter()
    compiled = torch.compile(net.forward, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        for size in SIZES:
            image = torch.rand(1, 3, *size)
            assert all(a.equal(b) for a, b in zip(compiled(image), net(image), strict=True))
    assert len(SIZES) == 20 and counter.frame_count <= 3


def test_inside_ddp(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        net, image = small(ViG).train(), torch.rand(1, 3, 32, 48)
        expected = step(net, image)
        net.compile(backend='aot_eager')
        outs, grads = step(DistributedDataParallel(net), image)
        agree((outs, {name.removeprefix('module.'): grad for name, grad in grads.items()}), expected)
    finally:
        torch.distributed.destroy_process_group()

"""One function a property, over every architecture: the contract that OpenMMLab configs rely on."""

import copy

import pytest
import torch
from mmengine.registry import MODELS

import bigla
from mmvig.models import ViG, ViGH
from mmvig.models.layers import LayerNorm

NANO = {
    ViG: dict(embed_dims=32, depth=3, num_heads=2, act=True, drop_path_rate=0.1),
    ViGH: dict(embed_dims=(16, 32, 48, 64), depths=(1, 2, 1, 1), num_heads=(1, 2, 3, 4), drop_path_rate=0.1),
}
FULL = [(cls, arch) for cls in NANO for arch in ('tiny', 'small', 'base')]
BOTH = pytest.mark.parametrize('cls', NANO, ids=lambda cls: cls.__name__)


def nano(cls, **kwargs):
    torch.manual_seed(0)
    return cls(NANO[cls], **kwargs)


def grid(cls, index: int, height: int, width: int) -> tuple[int, int]:
    """The map size that the chain of convolutions gives, from the convolutions' own formula."""
    steps = [(9, 8), (3, 2)] if cls is ViG else [(3, 2)] * (2 + index)
    for kernel, stride in steps:
        height, width = ((side + 2 - kernel) // stride + 1 for side in (height, width))
    return height, width


@pytest.mark.parametrize('cls, arch', FULL)
@pytest.mark.parametrize('alias', [False, True])
def test_arch_names(cls, arch, alias):
    with torch.device('meta'):
        net = cls(arch[0] if alias else arch)
    dims = cls.arch_table[arch]['embed_dims']
    assert net.out_channels == ((dims,) if cls is ViG else tuple(dims))


@BOTH
@pytest.mark.parametrize('size', [(32, 32), (33, 71), (64, 96), (75, 117), (224, 160)])
def test_outputs(cls, size):
    """Tuple of NCHW maps of the promised channels, for square, odd and long images."""
    indices = (0, 2) if cls is ViG else (0, 1, 2, 3)
    net = nano(cls, out_indices=indices).eval()
    outs = net(torch.rand(2, 3, *size))
    assert isinstance(outs, tuple) and len(outs) == len(indices)
    for out, index, channels in zip(outs, indices, net.out_channels, strict=True):
        assert out.shape == (2, channels, *grid(cls, index, *size))
        assert out.isfinite().all()


def test_strides_are_those_of_the_maps():
    for cls in NANO:
        net = nano(cls)
        for out, stride in zip(net(torch.rand(1, 3, 128, 192)), net.out_strides, strict=True):
            assert out.shape[2:] == (128 // stride, 192 // stride)


@BOTH
def test_out_indices(cls):
    """Negative, unsorted and single indices; a subset gives the same values as all of them."""
    num = 3 if cls is ViG else 4
    net = nano(cls, out_indices=tuple(range(num))).eval()
    image = torch.rand(1, 3, 64, 64)
    full = net(image)
    for given, want in [(-1, (num - 1,)), ((-1, 0), (0, num - 1)), ([1], (1,)), (0, (0,))]:
        part = nano(cls, out_indices=given).eval()
        assert part.out_indices == want
        assert not part.load_state_dict(net.state_dict(), strict=False).missing_keys
        for out, i in zip(part(image), want, strict=True):
            torch.testing.assert_close(out, full[i], rtol=0, atol=0)


@BOTH
@pytest.mark.parametrize('given', [-1, 0, 1, (0, 2)])
def test_every_parameter_gets_a_gradient(cls, given):
    """No dead weights for any outputs, so DDP needs no `find_unused_parameters`."""
    net = nano(cls, out_indices=given, drop_path_rate=0.0).train()
    sum((out * torch.rand_like(out)).sum() for out in net(torch.rand(2, 3, 64, 64))).backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@BOTH
def test_train_equals_eval_without_drop_path(cls):
    net = nano(cls, drop_path_rate=0.0)
    image = torch.rand(2, 3, 64, 96)
    for a, b in zip(net.train()(image), net.eval()(image), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@BOTH
def test_drop_path_grows_to_the_rate(cls):
    net = nano(cls, drop_path_rate=0.4)
    rates = [m.p for m in net.modules() if type(m).__name__ == 'StochasticDepth']
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.4) and rates == sorted(rates)
    net.train()
    image = torch.rand(4, 3, 32, 32)
    assert any(not torch.equal(net(image)[-1], net(image)[-1]) for _ in range(5))


@BOTH
def test_checkpointing_changes_no_value(cls):
    image = torch.rand(2, 3, 64, 64)
    grads = []
    for with_cp in (False, True):
        net = nano(cls, with_cp=with_cp).train()
        torch.manual_seed(1)
        out = net(image)[-1]
        out.square().sum().backward()
        grads.append([out.detach()] + [p.grad for p in net.parameters()])
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*grads, strict=True))


@BOTH
def test_checkpointing_keeps_less(cls):
    """Fewer values are saved for the backward pass."""
    kept = []
    for with_cp in (False, True):
        net = nano(cls, with_cp=with_cp).train()
        total = 0

        def pack(t):
            nonlocal total
            total += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(torch.rand(1, 3, 128, 128))
        kept.append(total)
    assert kept[1] < 0.5 * kept[0]


@BOTH
@pytest.mark.parametrize('frozen', [-1, 0, 1, 2])
def test_frozen_stages(cls, frozen):
    """The frozen part has no gradients and stays in eval mode through train(); the rest trains."""
    net = nano(cls, out_indices=(0, 2), frozen_stages=frozen).train()
    body = 'blocks' if cls is ViG else 'stages'
    cold = {'stem', 'pos_embed'} if frozen >= 0 else set()
    cold |= {f'{body}.{i}' for i in range(frozen)} | {f'norm{i}' for i in range(frozen)}
    for name, p in net.named_parameters():
        top = '.'.join(name.split('.')[:2]) if name.startswith(body) else name.split('.')[0]
        assert p.requires_grad == (top not in cold), name
    modules = dict(net.named_modules())
    for name in cold & modules.keys():
        assert not any(m.training for m in modules[name].modules())
    assert modules[f'{body}.2'].training
    sum(out.sum() for out in net(torch.rand(1, 3, 64, 64))).backward()


def test_norm_eval_holds_batch_norms():
    net = nano(ViGH, norm_eval=True)
    net.norm0 = torch.nn.BatchNorm2d(16)
    assert not net.train().norm0.training and net.norm1.training
    net.norm_eval = False
    assert net.train().norm0.training


@BOTH
def test_layer_depths_cover_every_layer(cls):
    net = nano(cls)
    depths = {name: net.get_layer_depth(f'backbone.{name}', 'backbone.') for name, _ in net.named_parameters()}
    totals = {total for _, total in depths.values()}
    assert len(totals) == 1
    assert sorted({depth for depth, _ in depths.values()}) == list(range(totals.pop()))
    assert all(depth == 0 for name, (depth, _) in depths.items() if name.startswith(('stem', 'pos_embed')))


@BOTH
def test_state_dict_round_trip(cls):
    net, other = nano(cls).eval(), cls(NANO[cls]).eval()
    other.load_state_dict(copy.deepcopy(net.state_dict()), strict=True)
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(net(image)[-1], other(image)[-1])


@BOTH
def test_builds_from_any_scope_and_batches_are_independent(cls):
    net = MODELS.build(dict(type=f'mmvig.{cls.__name__}', arch=NANO[cls])).eval()
    image = torch.rand(3, 3, 64, 64)
    for out, single in zip(net(image), net(image[1:2]), strict=True):
        torch.testing.assert_close(out[1:2], single, rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision(cls, dtype):
    """Autocast and whole-model casts stay near float32."""
    net = nano(cls, drop_path_rate=0.0).eval()
    image = torch.rand(1, 3, 64, 64)
    want = net(image)[-1]
    with torch.autocast('cpu', dtype):
        cast = net(image)[-1]
    assert cast.dtype == torch.float32  # the residual stream and its norm
    whole = net.to(dtype)(image.to(dtype))[-1]
    assert whole.dtype == dtype
    for got in (cast, whole):
        assert (got.float() - want).norm() / want.norm() < 0.05


@BOTH
@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_image_of_another_type(cls, dtype):
    image = torch.rand(1, 3, 64, 64, dtype=dtype)
    with pytest.raises(ValueError, match=f'parameters of torch.float32 and needs images .* got {dtype}: convert'):
        nano(cls)(image)
    assert nano(cls).to(dtype)(image)[-1].dtype == dtype


def test_a_stage_is_cast_once(monkeypatch):
    """Under autocast while it is normed, for the convolution behind it, which would cast it otherwise."""
    net, image, seen = nano(ViGH).eval(), torch.rand(1, 3, 64, 96), []
    for stage in net.stages[1:]:
        stage.downsample.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast('cpu', torch.bfloat16):
        got = net(image)
        monkeypatch.setattr(LayerNorm, 'beside', lambda norm, x: (x, norm(x)))
        want = net(image)
    assert seen == [torch.bfloat16] * 3 + [torch.float32] * 3
    assert all(a.equal(b) and a.dtype == torch.float32 for a, b in zip(got, want, strict=True))


@BOTH
def test_tokens_move_without_copies(cls):
    """Channels-last strides all along: what leaves a block is dense as (B, H, W, C)."""
    net = nano(cls).eval()
    blocks = net.blocks if cls is ViG else [block for stage in net.stages for block in stage.blocks]
    dense = []
    for block in blocks:
        block.register_forward_hook(
            lambda _, inputs, out: dense.append(inputs[0].is_contiguous() and out.is_contiguous())
        )
    net(torch.rand(2, 3, 96, 128))
    assert dense and all(dense)


def test_blocks_hand_over_norms(monkeypatch):
    """Not from what a hook has changed, not to or from a block of another kind, and not where blocks are recomputed.

    The first block has its norm from the sum with the position embedding.
    """
    seen = []

    def embedded(x, pos_embed, *norm, **options):
        return x + pos_embed, (x + pos_embed).sum()

    def noted(*tensors, normed, next_norm_weight, next_norm_bias, **options):
        y = bigla.block(*tensors, **options)
        seen.append((normed, None if next_norm_weight is None else y.sum()))
        return y if next_norm_weight is None else (y, seen[-1][1])

    monkeypatch.setattr('mmvig.models.layers.block.add_pos_embed', embedded)
    monkeypatch.setattr('mmvig.models.layers.block.bigla_block', noted)
    net, image = ViG(NANO[ViG] | dict(depth=4)), torch.rand(1, 3, 64, 96)

    def handed(net) -> list[bool]:
        seen.clear()
        net(image)
        given, left = zip(*seen)
        assert all(a is None or a is b for a, b in zip(given[1:], left))
        return [a is not None for a in given]

    assert handed(net) == [True, True, True, True]
    hook = net.blocks[1].register_forward_hook(lambda _, inputs, out: out + 1)
    assert handed(net) == [True, True, False, True]
    hook.remove()
    hook = net.blocks[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1, *inputs[1:]))
    assert handed(net) == [False, True, True, True]
    hook.remove()
    net.with_cp = True
    assert handed(net.train()) == [False] * 4
    with torch.no_grad():
        assert handed(net) == [True, True, True, True]
        net.blocks[2] = torch.nn.Identity()
        assert handed(net) == [True, True, False]
        net.blocks[0] = torch.nn.Identity()
        assert handed(net) == [False, False]


def test_no_norms_from_parameters_that_are_sharded(monkeypatch):
    """FSDP2 gathers a block's own for its forward alone: another's are DTensors, which no kernel takes."""
    from torch.distributed.fsdp import fully_shard

    called = []

    def noted(name):
        def call(*tensors, **options):
            called.append((name, any(hasattr(t, 'to_local') for t in [*tensors, *options.values()])))
            return getattr(bigla, name)(*tensors, **options)

        return call

    monkeypatch.setattr('mmvig.models.layers.block.add_pos_embed', noted('add_pos_embed'))
    monkeypatch.setattr('mmvig.models.layers.block.bigla_block', noted('block'))
    net, image = nano(ViG), torch.rand(1, 3, 64, 96)
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh('cpu', (1,))
        for part in (*net.blocks, net):
            fully_shard(part, mesh=mesh)
        net(image)[0].sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert called == [('block', False)] * 3


def test_position_embedding_follows_the_image():
    net = nano(ViG, img_size=(64, 96)).eval()
    assert net.pos_embed.shape == (1, 4, 6, 32)
    with torch.no_grad():
        before = net(torch.rand(1, 3, 64, 96))[0]
        assert net(torch.rand(1, 3, 128, 64))[0].shape[2:] == (8, 4)
    assert before.shape[2:] == (4, 6)


@pytest.mark.parametrize(
    'build, words',
    [
        (lambda: ViG('huge'), "arch='huge'.*'tiny'"),
        (lambda: ViGH({'depths': (1, 1, 1, 1)}), 'lacks.*embed_dims'),
        (lambda: ViG(NANO[ViG] | {'width': 3}), "unknown keys.*'width'"),
        (lambda: ViGH(NANO[ViGH] | {'num_heads': (1, 2, 3)}), 'four values'),
        (lambda: ViG(NANO[ViG] | {'num_heads': 5}), 'embed_dims=32 must be a multiple of 2 . num_heads'),
        (lambda: ViG('t', out_indices=12), 'out_indices=12.*12 blocks'),
        (lambda: ViGH('t', out_indices=(0, 4)), 'out_indices.*4 stages'),
        (lambda: ViGH('t', out_indices=(3, -1)), 'distinct'),
        (lambda: ViGH('t', out_indices=()), 'out_indices'),
        (lambda: ViGH('t', frozen_stages=5), 'frozen_stages=5'),
        (lambda: ViG('t', frozen_stages=-2), 'frozen_stages=-2'),
        (lambda: ViG('t', img_size=4), 'img_size=4'),
        (lambda: ViG('t', pretrained='a.pth', init_cfg=dict(type='Normal')), 'pretrained'),
        (lambda: nano(ViG)(torch.rand(1, 3, 6, 32)), 'at least 7 x 7.*6 x 32'),
        (lambda: nano(ViGH)(torch.rand(1, 1, 32, 32)), r'images \(B, 3, H, W\).*\(1, 1, 32, 32\)'),
        (lambda: nano(ViGH)(torch.rand(3, 32, 32)), r'images \(B, 3, H, W\)'),
    ],
)
def test_bad_arguments_are_named(build, words):
    with pytest.raises(ValueError, match=words):
        build()

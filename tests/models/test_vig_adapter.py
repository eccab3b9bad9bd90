"""ViT-Adapter around ViG: the backbone contract, ViG left as it is at initialisation, deformable attention."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from mmengine.registry import MODELS

import mmvig  # noqa: F401  makes MMEngine read published files
from mmvig.compat.checkpoint_loading import CheckpointError
from mmvig.models import ViG, ViGAdapter
from mmvig.models.checkpoints import rename_published, resize_pos_embed
from mmvig.models.layers import DeformableAttention, Injector

KEYS = json.loads((Path(__file__).parents[2] / 'tests/reference/keys.json').read_text())
PLAIN = dict(embed_dims=32, depth=4, num_heads=2, act=True, drop_path_rate=0.1)
NANO = PLAIN | dict(conv_dims=8, deform_heads=2, deform_points=2, deform_ratio=0.5, ffn_ratio=0.25)
SUBSETS = [part for n in range(1, 5) for part in itertools.combinations(range(4), n)]


def nano(opened: bool = True, **kwargs) -> ViGAdapter:
    """A small adapter; with `opened`, its parameters that start as zeros (gates, attention's maps) are drawn too."""
    torch.manual_seed(0)
    net = ViGAdapter(NANO, **kwargs)
    if opened:
        for module in net.modules():
            if isinstance(module, Injector):
                torch.nn.init.normal_(module.gamma)
            if isinstance(module, DeformableAttention):
                torch.nn.init.normal_(module.offsets.weight, std=0.1)
                torch.nn.init.normal_(module.weights.weight, std=0.1)
    return net


def covered(size: tuple[int, int], stride: int) -> tuple[int, ...]:
    return tuple((side + stride - 1) // stride for side in size)


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
@pytest.mark.parametrize('alias', [False, True])
def test_arch_names(arch, alias):
    """Widths and depths are ViG's, interactions and their size those of ViT-Adapter for the same width."""
    with torch.device('meta'):
        net = ViGAdapter(arch[0] if alias else arch)
    dims = ViG.arch_table[arch]['embed_dims']
    heads, value_dims, rate = {'tiny': (6, 192, 0.1), 'small': (6, 384, 0.2), 'base': (12, 384, 0.3)}[arch]
    assert net.out_channels == (dims,) * 4 and net.out_strides == (4, 8, 16, 32)
    assert [len(extractors) for extractors in net.extractors] == [1, 1, 1, 3] and len(net.injectors) == 4
    for part, levels in [(net.injectors[0], 3), (net.extractors[3][2], 1)]:
        assert part.attention.value.weight.shape == (value_dims, dims)
        assert part.attention.weights.out_features == heads * levels * 4
    assert net.extractors[0][0].ffn.conv.in_channels == dims // 4
    assert net.spatial_prior.stages[0][0].out_channels == 64
    assert net.blocks[-1].drop_path.p == net.extractors[3][2].drop_path.p == rate
    added = {name: p for name, p in net.named_parameters() if not name.startswith(('stem.', 'pos_embed', 'blocks.'))}
    size = {'tiny': 2_438_192, 'small': 5_830_160, 'base': 13_680_608}[arch]
    assert sum(p.numel() for p in added.values()) == size


@pytest.mark.parametrize('size', [(7, 9), (32, 32), (33, 71), (64, 96), (75, 117), (224, 160)])
def test_outputs(size):
    net = nano().eval()
    outs = net(torch.rand(2, 3, *size))
    assert isinstance(outs, tuple)
    assert [out.shape for out in outs] == [(2, 32, *covered(size, stride)) for stride in net.out_strides]
    assert all(out.isfinite().all() for out in outs)


def test_padding_stays_inside():
    """Outputs are those of the image padded with zeros at the right and at the bottom, cut to what it covers."""
    net, image = nano().eval(), torch.randn(1, 3, 75, 117)
    for out, padded, stride in zip(net(image), net(F.pad(image, (0, 11, 0, 21))), net.out_strides, strict=True):
        height, width = covered((75, 117), stride)
        assert torch.equal(out, padded[:, :, :height, :width])


def test_batch_statistics_leave_the_padding_out():
    for out in nano().train()(torch.randn(2, 3, 75, 117)):
        torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(32), rtol=0, atol=1e-5)


def block_outputs(net: ViG, image: torch.Tensor) -> list[torch.Tensor]:
    kept = []
    hooks = [block.register_forward_hook(lambda _, inputs, out: kept.append(out.clone())) for block in net.blocks]
    with torch.no_grad():
        net.eval()(image)
    for hook in hooks:
        hook.remove()
    return kept


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base', 'nano'])
def test_tokens_are_those_of_vig_at_initialisation(arch):
    """After every block, bit for bit, with the weights of a plain ViG; no longer once a gate opens."""
    size = (75, 41) if arch == 'nano' else (32, 64)
    plain = ViG(PLAIN if arch == 'nano' else arch)
    net = nano(opened=False) if arch == 'nano' else ViGAdapter(arch)
    result = net.load_state_dict(plain.state_dict(), strict=False)
    assert result.unexpected_keys == [f'norm{len(plain.blocks) - 1}.weight']
    assert not [name for name in result.missing_keys if name.startswith(('stem', 'pos_embed', 'blocks'))]

    image = torch.randn(1, 3, *size)
    padded = F.pad(image, (0, -size[1] % 32, 0, -size[0] % 32))
    want, got = block_outputs(plain, padded), block_outputs(net, image)
    assert len(got) == len(plain.blocks) and all(map(torch.equal, got, want))

    torch.nn.init.constant_(net.injectors[1].gamma, 0.1)
    opened, span = block_outputs(net, image), len(plain.blocks) // 4
    assert [torch.equal(a, b) for a, b in zip(opened, want, strict=True)] == [True] * span + [False] * 3 * span


def test_forward_is_that_of_the_paper():
    """Sections 3.3 and 3.4 of arXiv 2205.08534, level by level, for an image that needs no padding."""
    net, image = nano().double().eval(), torch.randn(2, 3, 64, 96, dtype=torch.double)
    grids, coarse = [(8, 12), (4, 6), (2, 3)], (4, 6)

    def attend(part, query, values, query_grids, value_grids):
        return part.attention(part.query_norm(query), part.value_norm(values), query_grids, value_grids)

    def feed(ffn, tokens):
        maps = [x.mT.unflatten(2, grid) for x, grid in zip(ffn.fc1(tokens).split([96, 24, 6], dim=1), grids)]
        return ffn.fc2(F.gelu(torch.cat([ffn.conv(x).flatten(2).mT for x in maps], dim=1)))

    prior = [image]
    for stage in net.spatial_prior.stages:
        prior.append(stage(prior[-1]))
    c1, c2, c3, c4 = (proj(x) for proj, x in zip(net.spatial_prior.projs, prior[1:], strict=True))
    c = torch.cat([x.flatten(2).mT + net.level_embed[i] for i, x in enumerate((c2, c3, c4))], dim=1)
    x = net.stem(image.permute(0, 2, 3, 1)) + resize_pos_embed(net.pos_embed, coarse)
    for injector, block, extractors in zip(net.injectors, net.blocks, net.extractors, strict=True):
        tokens = x.flatten(1, 2)
        x = (tokens + injector.gamma * attend(injector, tokens, c, [coarse], grids)).unflatten(1, coarse)
        x = block(x)
        for extractor in extractors:
            c = c + attend(extractor, c, x.flatten(1, 2), grids, [coarse])
            c = c + feed(extractor.ffn, extractor.ffn_norm(c))
    c2, c3, c4 = (level.mT.unflatten(2, grid) for level, grid in zip(c.split([96, 24, 6], dim=1), grids, strict=True))
    c1 = c1 + net.upsample(c2)
    for i, (out, level, factor) in enumerate(zip(net(image), (c1, c2, c3, c4), (4, 2, 1, 0.5), strict=True)):
        level = level + F.interpolate(x.permute(0, 3, 1, 2), scale_factor=factor, mode='bilinear')
        torch.testing.assert_close(out, getattr(net, f'out_norm{i}')(level))


def test_out_indices():
    """Negative, unsorted and single indices; a subset gives the same values as all of them."""
    net = nano().eval()
    image = torch.rand(1, 3, 64, 75)
    full = net(image)
    for given, want in [(-1, (3,)), ((-1, 0), (0, 3)), ([1], (1,)), (0, (0,)), ((2, 1), (1, 2))]:
        part = nano(out_indices=given).eval()
        assert part.out_indices == want and part.out_strides == tuple(4 * 2**i for i in want)
        assert not part.load_state_dict(net.state_dict(), strict=False).missing_keys
        for out, i in zip(part(image), want, strict=True):
            assert torch.equal(out, full[i])


@pytest.mark.parametrize('given', SUBSETS, ids=str)
def test_every_parameter_gets_a_gradient(given):
    """No dead weights for any outputs, so DDP needs no `find_unused_parameters`."""
    net = nano(out_indices=given, drop_path_rate=0.0).train()
    sum((out * torch.rand_like(out)).sum() for out in net(torch.rand(2, 3, 64, 64))).backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]


def test_train_equals_eval_without_drop_path_and_batch_statistics():
    net = nano(drop_path_rate=0.0, norm_eval=True)
    image = torch.rand(2, 3, 64, 96)
    for a, b in zip(net.train()(image), net.eval()(image), strict=True):
        assert torch.equal(a, b)


def test_norm_eval_holds_batch_norms():
    norms = [m for m in nano(norm_eval=True).train().modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert len(norms) == 6 + 4 and not any(norm.training for norm in norms)
    assert all(m.training for m in nano().train().modules())


def test_drop_path_grows_to_the_rate():
    net = nano(drop_path_rate=0.4)
    rates = [block.drop_path.p for block in net.blocks]
    assert rates == pytest.approx([0, 0.4 / 3, 0.8 / 3, 0.4])
    assert {part.drop_path.p for parts in net.extractors for part in parts} == {0.4}
    net.train()
    image = torch.rand(4, 3, 32, 32)
    assert any(not torch.equal(net(image)[-1], net(image)[-1]) for _ in range(5))


def test_checkpointing_changes_no_value_and_keeps_less():
    """Outputs, gradients and running statistics, with drop path on."""
    values, kept = [], []
    for with_cp in (False, True):
        net = nano(with_cp=with_cp).train()
        kept.append(0)

        def pack(t):
            kept[-1] += t.numel()
            return t

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outs = net(torch.rand(2, 3, 96, 64))
        sum(out.square().mean() for out in outs).backward()
        values.append([*outs, *(p.grad for p in net.parameters()), *net.buffers()])
    assert all(map(torch.equal, *values))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize('frozen', [-1, 0, 2, 4])
def test_frozen_stages(frozen):
    """ViG's part has no gradients and stays in eval mode through train(); the adapter trains in any case."""
    net = nano(frozen_stages=frozen).train()
    cold = ({'stem', 'pos_embed'} if frozen >= 0 else set()) | {f'blocks.{i}' for i in range(frozen)}
    for name, p in net.named_parameters():
        top = '.'.join(name.split('.')[: 2 if name.startswith('blocks') else 1])
        assert p.requires_grad == (top not in cold), name
    modules = dict(net.named_modules())
    assert not any(m.training for name in cold & modules.keys() for m in modules[name].modules())
    assert modules['spatial_prior'].training and modules['out_norm0'].training
    sum(out.sum() for out in net(torch.rand(2, 3, 64, 64))).backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())


def test_layer_depths():
    """ViG's as ViG says; everything of the adapter is in the last layer."""
    net, plain = nano(), ViG(PLAIN)
    for name, _ in net.named_parameters():
        own = name.startswith(('stem.', 'pos_embed', 'blocks.'))
        depth = plain.get_layer_depth(name) if own else (5, 6)
        assert net.get_layer_depth(f'backbone.{name}', 'backbone.') == depth, name


def test_state_dict_round_trip_and_independent_samples():
    net, other = nano().eval(), MODELS.build(dict(type='mmvig.ViGAdapter', arch=NANO, img_size=64)).eval()
    other.load_state_dict({f'backbone.{name}': value for name, value in net.state_dict().items()}, strict=True)
    image = torch.rand(3, 3, 64, 64)
    for out, single in zip(net(image), other(image[1:2]), strict=True):
        torch.testing.assert_close(out[1:2], single, rtol=1e-3, atol=1e-4)


def test_published_vig_loads(tmp_path, capsys):
    """Into stem, position embedding and blocks; the adapter's own are listed as missing, ViG's head as left out."""
    MMLogger.get_instance('test_published_vig_loads')  # writes to the stream that is captured here
    weights = {name: torch.randn(shape) * 0.02 for name, shape in KEYS['vig-t'].items()}
    torch.save({'model': weights}, tmp_path / 'vig.pth')
    net = ViGAdapter('tiny', init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'vig.pth')))
    net.init_weights()
    want = {name.removeprefix('backbone.'): value for name, value in rename_published(weights).items()}
    own = net.state_dict()
    assert want.keys() - own.keys() == {'norm11.weight', 'head.fc.weight', 'head.fc.bias'}
    assert all(torch.equal(own[name], want[name]) for name in want.keys() & own.keys())
    assert {name for name in own if name.startswith(('stem', 'pos_embed', 'blocks'))} <= want.keys()
    said = ''.join(capsys.readouterr())
    assert all(name in said for name in ('head.fc.weight', 'norm11.weight', 'injectors.0.gamma', 'out_norm3.weight'))


def test_nothing_matched_is_an_error(tmp_path):
    torch.save({'model': {'conv1.weight': torch.zeros(1), 'norm3.weight': torch.zeros(1)}}, tmp_path / 'resnet.pth')
    net = nano(pretrained=str(tmp_path / 'resnet.pth'))
    with pytest.raises(CheckpointError, match='nothing in the checkpoint fits ViGAdapter'):
        net.init_weights()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """Autocast and whole-model casts stay near float32."""
    net = nano(drop_path_rate=0.0).eval()
    image = torch.rand(1, 3, 64, 75)
    want = net(image)
    with torch.autocast('cpu', dtype):
        cast = net(image)
    whole = net.to(dtype)(image.to(dtype))
    for a, b, c in zip(want, cast, whole, strict=True):
        assert c.dtype == dtype
        assert (b.float() - a).norm() / a.norm() < 0.05 and (c.float() - a).norm() / a.norm() < 0.05


def test_norm_cfg():
    net = nano(norm_cfg=dict(type='BN', momentum=0.3))
    norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 10 and all(type(m) is torch.nn.BatchNorm2d and m.momentum == 0.3 for m in norms)


@pytest.mark.parametrize(
    'build, words',
    [
        (lambda: ViGAdapter('huge'), "arch='huge'.*'tiny'.*deform_ratio"),
        (lambda: ViGAdapter(PLAIN), 'lacks.*conv_dims.*deform_heads'),
        (lambda: ViGAdapter(NANO | {'depth': 6}), 'depth=6 must be a multiple of 4'),
        (lambda: ViGAdapter(NANO | {'deform_heads': 3}), r'deform_ratio \* embed_dims = 16.*deform_heads=3'),
        (lambda: nano(out_indices=4), 'out_indices=4.*4 maps'),
        (lambda: nano(frozen_stages=5), 'frozen_stages=5'),
        (lambda: nano()(torch.rand(1, 3, 6, 32)), 'at least 7 x 7.*6 x 32'),
        (lambda: nano()(torch.rand(1, 1, 32, 32)), r'ViGAdapter needs images \(B, 3, H, W\).*\(1, 1, 32, 32\)'),
    ],
)
def test_bad_arguments_are_named(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# Deformable attention


@pytest.mark.parametrize('ratio', [1.0, 0.5])
def test_deformable_attention_equals_that_of_mmcv(ratio):
    """The same initialisation, and the same values and gradients for random weights."""
    from mmcv.ops import MultiScaleDeformableAttention

    ours = DeformableAttention(16, 4, num_levels=3, num_points=2, value_ratio=ratio).double()
    theirs = MultiScaleDeformableAttention(
        16, 4, num_levels=3, num_points=2, dropout=0.0, batch_first=True, value_proj_ratio=ratio
    ).double()
    pairs = [
        (getattr(ours, name), getattr(theirs, other))
        for name, other in dict(
            offsets='sampling_offsets', weights='attention_weights', value='value_proj', proj='output_proj'
        ).items()
    ]
    for a, b in pairs[:2]:
        torch.testing.assert_close(a.bias, b.bias)
        assert torch.equal(a.weight, b.weight)
    for a, b in pairs:
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.nn.init.normal_(p, std=0.3)
            q.data.copy_(p.data)
    grids = [(6, 10), (3, 5), (2, 3)]
    query = torch.randn(2, 15, 16, dtype=torch.double)
    values = torch.randn(2, 81, 16, dtype=torch.double, requires_grad=True)
    y, x = torch.meshgrid((torch.arange(3) + 0.5) / 3, (torch.arange(5) + 0.5) / 5, indexing='ij')
    places = torch.stack([x, y], -1).view(1, 15, 1, 2).expand(2, -1, 3, -1).double()
    sizes = torch.tensor(grids)
    got = ours(query, values, [(3, 5)], grids)
    want = theirs(query, value=values, identity=0, reference_points=places, spatial_shapes=sizes)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # the places above are rounded to float32
    out = torch.randn_like(got)
    torch.testing.assert_close(
        *(torch.autograd.grad((result * out).sum(), values)[0] for result in (got, want)), rtol=1e-6, atol=1e-6
    )


def test_queries_read_at_their_own_place():
    """Without offsets a grid reads itself unchanged, and a coarser one as bilinear interpolation does."""
    attention = DeformableAttention(4, 1, num_levels=1, num_points=1, value_ratio=1.0)
    for layer in (attention.value, attention.proj):
        torch.nn.init.eye_(layer.weight)
    torch.nn.init.zeros_(attention.offsets.bias)
    coarse = torch.randn(2, 4, 3, 5)
    values = coarse.flatten(2).mT
    torch.testing.assert_close(attention(torch.randn(2, 15, 4), values, [(3, 5)], [(3, 5)]), values)
    fine = attention(torch.randn(2, 60, 4), values, [(6, 10)], [(3, 5)]).mT.unflatten(2, (6, 10))
    want = F.interpolate(coarse, scale_factor=2, mode='bilinear', align_corners=False)
    inside = (..., slice(1, -1), slice(1, -1))  # beyond the border there are zeros here, copies there
    torch.testing.assert_close(fine[inside], want[inside])


def test_places_are_exact_in_half_precision():
    """A pixel of a map of 1000 x 1000 is less than a rounding step of bfloat16 from the next, and still found."""
    attention = DeformableAttention(4, 1, num_levels=1, num_points=1, value_ratio=1.0).bfloat16()
    for layer in (attention.value, attention.proj):
        torch.nn.init.eye_(layer.weight)
    torch.nn.init.zeros_(attention.offsets.bias)
    values = torch.arange(1000).remainder(7)[None, :, None].expand(1, -1, 4).bfloat16()
    torch.testing.assert_close(attention(values, values, [(1, 1000)], [(1, 1000)]), values, rtol=0, atol=0.01)


@pytest.mark.gpu
def test_cuda_equals_cpu():
    """Outputs and gradients, whatever computes the sampling there."""
    values = []
    for device in ('cpu', 'cuda'):
        net = nano(drop_path_rate=0.0, norm_eval=True).to(device).train()
        image = torch.rand(2, 3, 75, 117, generator=torch.Generator().manual_seed(0)).to(device)
        outs = net(image)
        sum(out.square().mean() for out in outs).backward()
        values.append([*outs, *(p.grad for p in net.parameters())])
    for a, b in zip(*values, strict=True):
        assert (b.cpu() - a).norm() <= 0.02 * a.norm() + 1e-5  # convolutions on GPUs round their inputs


def test_mask_rcnn_trains(mask_rcnn_step):
    """With FPN on the four maps. At the first step, closed gates and attention's zero maps hold back what is behind."""
    losses, still = mask_rcnn_step(
        dict(type='mmvig.ViGAdapter', arch=NANO | {'drop_path_rate': 0.0}),
        dict(type='FPN', in_channels=[32] * 4, out_channels=16, num_outs=5),
    )
    assert all(value.isfinite() for value in losses.values()) and losses['loss'] > 0
    assert all('.injectors.' in name or '.query_norm.' in name for name in still), still
    assert not [name for name in still if name.endswith('gamma')]

"""The same training by two implementations of the fused functions: the curves of the loss and the models agree."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import bigla
import mmvig  # noqa: F401
from mmvig.models import ViG
from mmvig.models.layers import block, conv_norm, norm

ARCH = dict(embed_dims=64, depth=2, num_heads=2, act=True, drop_path_rate=0.0)


def train(impl: str, device: str, steps: int, monkeypatch, autocast: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of each step, and all parameters at the end, of fitting eight images to random directions."""
    names = (block, 'bigla_block', bigla.block), (norm, 'add_norm', bigla.add_norm)
    for module, name, function in (*names, (conv_norm, 'conv_norm', bigla.conv_norm)):
        monkeypatch.setattr(module, name, partial(function, impl=impl))
    if impl == 'triton':
        # The one kernel of half a block, or of its end, however few the tokens.
        monkeypatch.setattr('bigla.triton.mlp.FEWEST', 0)
        if pytest.importorskip('bigla.triton.launch').KNOWN:
            hopper = pytest.importorskip('bigla.triton.hopper')
            monkeypatch.setattr(hopper, 'FEWEST', dict.fromkeys(hopper.FEWEST, 0))
    torch.manual_seed(0)
    model = ViG(arch=ARCH, img_size=96).to(device)
    model.init_weights()
    images, wanted = torch.randn(8, 3, 96, 96).to(device), torch.randn(8, 64).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            features = model(images)[-1].mean((2, 3))
        loss = F.mse_loss(features.float(), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu(), torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()


def agree(ours, theirs, tolerance: float) -> None:
    (losses, model), (their_losses, their_model) = ours, theirs
    assert losses[-1] < 0.8 * losses[0], 'nothing was learned'
    assert ((losses - their_losses).abs() < tolerance * their_losses).all()
    assert (model - their_model).norm() < tolerance * their_model.norm()


def test_chunked_learns_as_the_reference_does(monkeypatch):
    agree(*(train(impl, 'cpu', 12, monkeypatch) for impl in ('chunked', 'reference')), 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize('autocast, tolerance', [(False, 5e-3), (True, 3e-2)], ids=['fp32', 'bf16'])
def test_triton_learns_as_the_reference_does(autocast, tolerance, monkeypatch):
    agree(*(train(impl, 'cuda', 50, monkeypatch, autocast) for impl in ('triton', 'reference')), tolerance)

"""Training under autocast, in float16 with a gradient scaler and in bfloat16, with gates at both of their ends."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmvig.models import ViGH

ARCH = dict(embed_dims=(32, 64, 128, 256), depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), drop_path_rate=0.1)


def drive_gates(model: nn.Module) -> None:
    """A third of the gates' channels forget everything, a third nothing; the others follow the image, strongly."""
    for name, module in model.named_modules():
        if name.endswith('mixer'):
            project = module.decay[1]
            with torch.no_grad():
                project.weight.mul_(20)
                project.bias[0::3] = -1000  # log decays of -62
                project.bias[1::3] = 1000


def train(device: str, dtype: torch.dtype, size: int, batch: int, steps: int) -> dict[str, int]:
    """Trains on noise, whose label is its brightest colour; counts the steps in which something was not finite."""
    torch.manual_seed(0)
    backbone = ViGH(ARCH).to(device)
    drive_gates(backbone)
    head = nn.Linear(sum(backbone.out_channels), 3).to(device)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    bad = torch.zeros(2, dtype=torch.int64, device=device)
    skipped, last = 0, 0.0
    for _ in range(steps):
        image = torch.randn(batch, 3, size, size, device=device)
        label = torch.randint(3, (batch,), device=device)
        image[torch.arange(batch, device=device), label] += 0.5
        with torch.autocast(device, dtype):
            maps = backbone(image)
            logits = head(torch.cat([x.mean((2, 3)) for x in maps], 1))
            loss = F.cross_entropy(logits.float(), label)
        bad[0] += ~torch.stack([x.isfinite().all() for x in (*maps, loss)]).all()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < before:
            skipped += 1
        else:
            bad[1] += ~norm.isfinite()
        last = 0.95 * last + 0.05 * loss.detach()
    weights = sum(int(not p.isfinite().all()) for p in parameters)
    return dict(forward=int(bad[0]), gradients=int(bad[1]), weights=weights, skipped=skipped, loss=float(last))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_few_steps_on_a_cpu(dtype):
    found = train('cpu', dtype, 40, 2, 4)
    assert (found['forward'], found['gradients'], found['weights']) == (0, 0, 0), found


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(('size', 'batch'), [(224, 16), (1344, 1)])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
def test_two_thousand_steps(dtype, size, batch):
    """A scaler may skip the few steps by which it finds its scale; nothing else may be other than finite."""
    found = train('cuda', dtype, size, batch, 2000)
    print(found)
    assert (found['forward'], found['gradients'], found['weights']) == (0, 0, 0), found
    assert found['skipped'] <= 20 and found['loss'] < 1.0, found  # a guess has 1.1

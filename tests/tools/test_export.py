import pytest
import torch

from mmvig.models import ViGH

ARCH = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4), drop_path_rate=0.0)
CONFIG = f"""
default_scope = 'mmdet'
model = dict(type='mmdet.SingleStageDetector', backbone=dict(type='mmvig.ViGH', arch={ARCH}, out_indices=(0,)))
"""


@pytest.fixture
def config(tmp_path):
    file = tmp_path / 'config.py'
    file.write_text(CONFIG)
    return file


def test_messages(run_tool, config, tmp_path):
    assert run_tool('export.py', config, tmp_path / 'model.txt')[0] == 2
    assert "part='model' is for mmseg" in run_tool('export.py', config, tmp_path / 'model.pt2')[0]
    status, _ = run_tool('export.py', tmp_path / 'gone.py', tmp_path / 'model.pt2')
    assert 'config: there is no file' in status


@pytest.mark.slow
def test_a_backbone_with_its_weights(run_tool, tmp_path):
    backbone = ViGH(ARCH, out_indices=(0,)).eval()
    torch.save(dict(state_dict={f'backbone.{k}': v for k, v in backbone.state_dict().items()}), tmp_path / 'a.pth')
    file = tmp_path / 'config.py'
    head = "bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=8, stacked_convs=1, feat_channels=8)"
    file.write_text(CONFIG.replace('out_indices=(0,))', f'out_indices=(0,)), {head}'))
    out = tmp_path / 'model.pt2'
    status, said = run_tool('export.py', file, out, '--checkpoint', tmp_path / 'a.pth', '--part', 'backbone')
    assert status == 0 and 'differs from the model by at most' in said
    image = torch.randn(1, 3, 50, 70)
    torch.testing.assert_close(torch.export.load(out).module()(image)[0], backbone(image)[0], rtol=1e-4, atol=1e-5)

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmvig.engine import settings
from mmvig.engine.settings import SetupError, load_config, merge_options


@pytest.fixture
def cfg():
    return Config(
        dict(
            model=dict(type='A', backbone=dict(type='mmvig.ViGH', arch='tiny')),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3)),
            param_scheduler=[dict(type='LinearLR', end=10), dict(type='MultiStepLR', milestones=[8, 11])],
            train_cfg=dict(max_epochs=12),
        )
    )


def test_options_override(cfg):
    merge_options(
        cfg, {'model.backbone.arch': 'small', 'param_scheduler.1.milestones': [1], 'optim_wrapper.optimizer.lr': 0.1}
    )
    assert cfg.model.backbone.arch == 'small' and cfg.model.backbone.type == 'mmvig.ViGH'
    assert cfg.param_scheduler[1].milestones == [1] and cfg.param_scheduler[0].end == 10
    assert cfg.optim_wrapper.optimizer.lr == 0.1


@pytest.mark.parametrize(
    ('key', 'hint'),
    [
        ('model.backbone.arhc', 'Did you mean model.backbone.arch'),
        ('train_cfg.max_epoch', 'Did you mean train_cfg.max_epochs'),
        ('optimizer.lr', 'Did you mean optim_wrapper.optimizer.lr'),
        ('param_scheduler.2.end', r'\+param_scheduler.2.end'),
        ('model.backbone.arch.depths', r'\+model.backbone.arch.depths'),
        ('xyz', r'put a plus before it: \+xyz=\.\.\.$'),
    ],
)
def test_options_that_match_nothing(cfg, key, hint):
    before = cfg.to_dict()
    with pytest.raises(SetupError, match=f'--cfg-options: {key} matches nothing.*{hint}'):
        merge_options(cfg, {'train_cfg.max_epochs': 1, key: 1})
    assert cfg.to_dict() == before


def test_options_with_a_plus_add(cfg):
    merge_options(cfg, {'+model.backbone.with_cp': True, '+new.part': 1})
    assert cfg.model.backbone.with_cp is True and cfg.new.part == 1


def test_settings_of_a_runner_need_no_plus(cfg):
    merge_options(cfg, {'randomness.seed': 1, 'load_from': 'a.pth', 'find_unused_parameters': True})
    assert cfg.randomness.seed == 1 and cfg.load_from == 'a.pth' and cfg.find_unused_parameters is True
    with pytest.raises(SetupError, match='randomness.sed matches nothing.*randomness.seed'):
        merge_options(cfg, {'randomness.sed': 1})


def test_load_config(tmp_path):
    file = tmp_path / 'some_config.py'
    file.write_text('a = 1\n')
    given = dict(options=None, launcher='none')
    assert load_config(str(file), work_dir=None, **given).work_dir == 'work_dirs/some_config'
    file.write_text('a = 1\nwork_dir = "own"\n')
    assert load_config(str(file), work_dir=None, **given).work_dir == 'own'
    cfg = load_config(str(file), work_dir='w', launcher='pytorch', options={'a': 2})
    assert (cfg.work_dir, cfg.launcher, cfg.a) == ('w', 'pytorch', 2)
    with pytest.raises(SetupError, match='config: there is no file .*gone.py'):
        load_config(str(tmp_path / 'gone.py'), work_dir=None, **given)


def test_amp(cfg, monkeypatch):
    monkeypatch.setattr(settings, 'get_device', lambda: 'cpu')
    with pytest.raises(SetupError, match="--amp: .*has only 'cpu'"):
        settings.use_amp(cfg)
    monkeypatch.setattr(settings, 'get_device', lambda: 'cuda')
    settings.use_amp(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper' and cfg.optim_wrapper.loss_scale == 'dynamic'
    cfg.optim_wrapper.loss_scale = 512.0
    settings.use_amp(cfg)
    assert cfg.optim_wrapper.loss_scale == 512.0
    cfg.optim_wrapper.type = 'ApexOptimWrapper'
    with pytest.raises(SetupError, match="optim_wrapper.type is 'ApexOptimWrapper'"):
        settings.use_amp(cfg)


def test_auto_scale_lr(cfg):
    with pytest.raises(SetupError, match='auto_scale_lr.base_batch_size'):
        settings.use_auto_scale_lr(cfg)
    cfg.auto_scale_lr = dict(enable=False, base_batch_size=16)
    settings.use_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr.enable is True


def test_data_loaders_of_mmpretrain_collate_by_default(cfg):
    cfg.train_dataloader = dict(num_workers=2)
    cfg.val_dataloader = dict(num_workers=0, collate_fn=dict(type='pseudo_collate'))
    cfg.test_dataloader = None
    cfg.default_scope = 'mmdet'
    settings.set_dataloader_defaults(cfg)
    assert cfg.train_dataloader == dict(num_workers=2)
    cfg.default_scope = 'mmpretrain'
    settings.set_dataloader_defaults(cfg)
    expected = dict(collate_fn=dict(type='default_collate'), pin_memory=torch.cuda.is_available())
    assert cfg.train_dataloader == dict(num_workers=2, persistent_workers=True, **expected)
    assert cfg.val_dataloader.collate_fn.type == 'pseudo_collate' and cfg.val_dataloader.persistent_workers is False


def stock(name: str) -> Config:
    package, path = name.split('::')
    module = __import__(package)
    return Config.fromfile(Path(module.__file__).with_name('.mim') / 'configs' / path)


STOCK = dict(
    mmdet='mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    mmseg='mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py',
    mmpretrain='mmpretrain::resnet/resnet18_8xb32_in1k.py',
)


@pytest.mark.parametrize('scope', STOCK)
def test_tta(scope):
    cfg = stock(STOCK[scope])
    if scope == 'mmseg':  # its configs bring the augmentations, and no model for some
        cfg.tta_model = dict(type='SegTTAModel')
    model = cfg.model.type
    settings.use_tta(cfg)
    assert cfg.model.type.endswith(('TTAModel', 'TTA')) and cfg.model.module.type == model
    assert any(step['type'] == 'TestTimeAug' for step in cfg.test_dataloader.dataset.pipeline)


def test_tta_of_a_segmentor_needs_its_settings():
    for missing in ('tta_model', 'tta_pipeline'):
        cfg = stock(STOCK['mmseg'])
        cfg.tta_model = dict(type='SegTTAModel')
        cfg.pop(missing)
        with pytest.raises(SetupError, match=f'--tta: the config has no {missing}'):
            settings.use_tta(cfg)


@pytest.mark.parametrize('scope', STOCK)
def test_visualization(scope):
    cfg = stock(STOCK[scope])
    settings.use_visualization(cfg, show=True, show_dir='drawn', wait_time=3)
    hook = cfg.default_hooks.visualization
    assert hook.show is True and hook.wait_time == 3
    assert 'drawn' in (hook.get('out_dir'), hook.get('test_out_dir'), cfg.visualizer.get('save_dir'))
    del cfg.default_hooks.visualization
    with pytest.raises(SetupError, match='no default_hooks.visualization'):
        settings.use_visualization(cfg, show=True, show_dir=None, wait_time=3)


def test_predictions():
    cfg = stock(STOCK['mmdet'])
    settings.save_predictions(cfg, 'found.pkl')
    assert cfg.test_evaluator[1] == dict(type='mmdet.DumpDetResults', out_file_path='found.pkl')
    assert cfg.test_evaluator[0].type == 'CocoMetric'
    with pytest.raises(SetupError, match="--out: 'folder' is neither FILE.json"):
        settings.save_predictions(cfg, 'folder')
    cfg = stock(STOCK['mmseg'])
    settings.save_predictions(cfg, 'folder')
    assert cfg.test_evaluator.output_dir == 'folder'

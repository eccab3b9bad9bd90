from pathlib import Path

import pytest
import torch
from mmengine.fileio import LocalBackend
from mmengine.runner import EpochBasedTrainLoop as StockLoop

from mmvig.engine import Runner
from mmvig.engine.loops import EpochBasedTrainLoop, IterBasedTrainLoop
from mmvig.engine.progress import ProgressHook
from mmvig.engine.runner import build_runner

SHORT = {'train_cfg.max_epochs': 1, 'default_hooks.checkpoint': dict(type='CheckpointHook', interval=1)}


@pytest.mark.parametrize(
    ('train_cfg', 'loop'),
    [
        (dict(by_epoch=True, max_epochs=1), EpochBasedTrainLoop),
        (dict(type='EpochBasedTrainLoop', max_epochs=1), EpochBasedTrainLoop),
        (dict(_scope_='mmdet', type='EpochBasedTrainLoop', max_epochs=1), EpochBasedTrainLoop),
        (dict(by_epoch=False, max_iters=1), IterBasedTrainLoop),
        (dict(type='IterBasedTrainLoop', max_iters=1), IterBasedTrainLoop),
        (dict(type='mmengine.EpochBasedTrainLoop', max_epochs=1), StockLoop),
    ],
)
def test_loops(toy_config, train_cfg, loop):
    assert type(Runner.from_cfg(toy_config(train_cfg=train_cfg)).train_loop) is loop


def test_a_checkpoint_has_its_name_only_when_complete(toy_config, monkeypatch):
    runner = Runner.from_cfg(toy_config(**SHORT))
    runner.train()
    path = Path(runner.work_dir, 'epoch_1.pth')
    before = path.read_bytes()

    def die(backend, content, filepath):
        Path(filepath).write_bytes(content[:100])
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(LocalBackend, 'put', die)
    for name in ('epoch_1.pth', 'epoch_2.pth'):
        with pytest.raises(OSError, match='No space left'):
            runner.save_checkpoint(runner.work_dir, name)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.glob('epoch_*')] == ['epoch_1.pth']


def test_console_has_the_progress_and_warnings_and_the_log_file_has_everything(toy_config, capsys):
    runner = Runner.from_cfg(toy_config(**SHORT))
    runner.logger.warning('careful')
    runner.logger.warning('"FileClient" will be deprecated in future.')
    runner.train()
    said, log = capsys.readouterr().out, Path(runner.logger.log_file).read_text()
    assert 'careful' in said and 'Epoch(train)' not in said and 'deprecated in future' not in said
    assert 'what pycocotools would print' not in said and 'what pycocotools would print' in log
    assert 'Epoch(train)' in log and 'careful' in log


def test_without_the_progress_hook_the_console_is_mmengines(toy_config, capsys):
    runner = Runner.from_cfg(toy_config(**SHORT, **{'default_hooks.progress': None}))
    runner.train()
    said = capsys.readouterr().out
    assert 'Epoch(train)' in said and 'train  iter' not in said
    assert not any(isinstance(hook, ProgressHook) for hook in runner.hooks)


def test_test_and_val_alone(toy_config, capsys):
    for name in ('test', 'val'):
        runner = Runner.from_cfg(toy_config(name))
        assert 'toy/mean' in getattr(runner, name)()
        assert isinstance(runner._train_loop, dict)  # it was not built on the way
        assert f'{name:5}  iter 3/3' in capsys.readouterr().out


def test_runner_type_of_the_config_is_kept(toy_config):
    runner = build_runner(toy_config(runner_type='mmengine.Runner'))
    assert not isinstance(runner, Runner)
    assert isinstance(build_runner(toy_config()), Runner)


def test_auto_scale_lr_and_data_loaders_with_a_batch_sampler(toy_config):
    cfg = toy_config(**SHORT, auto_scale_lr=dict(enable=True, base_batch_size=8))
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.optim_wrapper.optimizer.defaults['lr'] == 0.05
    assert torch.tensor(runner.message_hub.get_scalar('train/lr').data[0]).max().item() == pytest.approx(0.025)

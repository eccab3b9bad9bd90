import multiprocessing

import pytest
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

SETTINGS = {
    'train_dataloader.num_workers': 2,
    'train_dataloader.persistent_workers': True,
    'train_cfg.max_epochs': 2,
    'train_cfg.val_interval': 9,
}


@HOOKS.register_module(force=True)
class KillWorker(Hook):
    """Kills a worker of the data loader after an iteration, as a system that runs out of memory does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.iter == self.after:
            multiprocessing.active_children()[0].kill()


# A dead worker is told by its signal or by the broken pipe, whichever is first: on a busy machine at times the latter.
@pytest.mark.slow
def test_a_worker_that_dies_ends_training_which_can_go_on(toy_config, train):
    whole = train(toy_config('whole', **SETTINGS))
    hooks = [*toy_config().custom_hooks, dict(type='KillWorker', after=4)]
    with pytest.raises(RuntimeError, match=r'DataLoader worker \(pid.* (is killed by signal|exited unexpectedly)'):
        train(toy_config('dying', custom_hooks=hooks, **SETTINGS))
    from mmvig.engine.resume import latest_checkpoint

    cfg = toy_config('dying', **SETTINGS)
    cfg.load_from, cfg.resume = str(latest_checkpoint(cfg.work_dir)), True
    assert train(cfg) == whole

import os
from inspect import signature
from pathlib import Path

import pytest
import torch
from mmengine.runner import IterBasedTrainLoop

from mmvig.engine import Runner
from mmvig.engine.resume import latest_checkpoint, load_for_resume

ITERATIONS = 18  # 3 epochs of 6 batches
BY_ITERATION = dict(by_epoch=False, max_iters=ITERATIONS, val_interval=5)
WORKERS = {'train_dataloader.num_workers': 2}
ONE_EPOCH = {'train_cfg.max_epochs': 1}
PERSISTENT = {**WORKERS, 'train_dataloader.persistent_workers': True}


@pytest.mark.parametrize(
    'settings',
    [
        pytest.param({}, id='epochs'),
        pytest.param(WORKERS, id='epochs-workers'),
        pytest.param(PERSISTENT, id='epochs-persistent'),
        pytest.param({'train_cfg': BY_ITERATION}, id='iterations'),
        pytest.param({'train_cfg': BY_ITERATION, **PERSISTENT}, id='iterations-persistent'),
        pytest.param(
            {'train_cfg': BY_ITERATION, **WORKERS, 'train_dataloader.sampler.type': 'InfiniteSampler'},
            id='iterations-infinite-workers',
        ),
        pytest.param(
            {'train_cfg': dict(BY_ITERATION, fast_forward_on_resume=True)},
            id='iterations-fast-forward',
            marks=pytest.mark.skipif(
                'fast_forward_on_resume' not in signature(IterBasedTrainLoop).parameters,
                reason='a setting of onedl-mmengine, which stock MMEngine lacks',
            ),
        ),
    ],
)
def test_resuming_continues_bit_for_bit(toy_config, train, settings):
    """Augmentation, dropout, drop path, batch norm, momentum, schedule, averaged weights, gradient accumulation."""
    whole = train(toy_config(**settings))
    assert sorted(whole) == list(range(ITERATIONS))
    assert len({loss for _, loss in whole.values()}) == ITERATIONS
    assert [batch for batch, _ in whole.values()] == (
        [str(i) for i in range(ITERATIONS)] if 'train_cfg' in settings else 3 * list('012345')
    )
    for done in (6, 10):  # the end of an epoch, the middle of the next one and of an accumulation
        checkpoint = toy_config().work_dir + f'/iter_{done}.pth'
        rest = train(toy_config(f'from{done}', load_from=checkpoint, resume=True, **settings))
        assert rest == {i: whole[i] for i in range(done, ITERATIONS)}
        ends = [
            load_for_resume(f'{toy_config(name).work_dir}/iter_{ITERATIONS}.pth') for name in ('run', f'from{done}')
        ]
        for part in ('state_dict', 'ema_state_dict'):
            assert all(torch.equal(value, ends[1][part][name]) for name, value in ends[0][part].items())


def test_resuming_from_the_end_of_an_epoch(toy_config, train):
    by_epoch = {'default_hooks.checkpoint': dict(type='CheckpointHook', interval=1)}
    whole = train(toy_config(**by_epoch))
    checkpoint = toy_config().work_dir + '/epoch_2.pth'
    rest = train(toy_config('rest', load_from=checkpoint, resume=True, **by_epoch))
    assert rest == {i: whole[i] for i in range(12, ITERATIONS)}


def test_number_of_workers_may_change(toy_config, train):
    assert train(toy_config('workers', **ONE_EPOCH, **WORKERS)) == train(toy_config(**ONE_EPOCH))


def test_load_from_starts_at_the_beginning(toy_config, train):
    train(toy_config(**ONE_EPOCH))
    fresh = train(toy_config('fresh', load_from=toy_config().work_dir + '/iter_4.pth', **ONE_EPOCH))
    assert sorted(fresh) == list(range(6))


def test_checkpoints_of_mmengine_restart_their_epoch(toy_config, train):
    settings = {**ONE_EPOCH, 'optim_wrapper.accumulative_counts': 1}
    path = Path(toy_config().work_dir, 'iter_2.pth')
    train(toy_config(**settings))
    checkpoint = load_for_resume(path)
    del checkpoint['resume']
    torch.save(checkpoint, path)
    runner = Runner.from_cfg(toy_config('rest', load_from=str(path), resume=True, **settings))
    runner.train()
    assert 'was not written by mmvig.engine.Runner' in Path(runner.logger.log_file).read_text()
    assert runner.iter == 2 + 6


def test_python_in_a_checkpoint_is_not_executed(toy_config, train, tmp_path):
    """MMEngine's Runner.resume executes the text under meta['config']."""
    path = Path(toy_config().work_dir, 'iter_3.pth')
    train(toy_config(**ONE_EPOCH))
    checkpoint = load_for_resume(path)
    checkpoint['meta']['config'] = f'open({str(tmp_path / "executed")!r}, "w")'
    torch.save(checkpoint, path)
    train(toy_config('rest', load_from=str(path), resume=True, **ONE_EPOCH))
    assert not (tmp_path / 'executed').exists()


def test_latest_checkpoint(tmp_path, capsys):
    def save(name: str, age: int, **content) -> Path:
        path = tmp_path / name
        torch.save(content, path)
        stamp = 1_700_000_000 - age
        os.utime(path, (stamp, stamp))
        return path

    assert latest_checkpoint(tmp_path) is None
    complete = dict(meta=dict(iter=1), optimizer={}, state_dict={})
    old = save('epoch_1.pth', 30, **complete)
    save('best_acc.pth', 10, meta=dict(iter=2), state_dict={})
    assert latest_checkpoint(tmp_path) == old
    interrupted = save('interrupted.pth', 20, **complete)
    assert latest_checkpoint(tmp_path) == interrupted
    cut = tmp_path / 'epoch_3.pth'
    cut.write_bytes(interrupted.read_bytes()[:200])
    capsys.readouterr()
    assert latest_checkpoint(tmp_path) == interrupted
    assert 'passes over' in (said := capsys.readouterr().out) and 'epoch_3.pth' in said and 'damaged' in said

    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    (elsewhere / 'last_checkpoint').write_text(f'{old}\n')
    assert latest_checkpoint(elsewhere) == old


def test_weights_alone_cannot_be_resumed(tmp_path):
    torch.save(dict(state_dict={}), tmp_path / 'weights.pth')
    with pytest.raises(ValueError, match="without the optimizer's state.*load_from="):
        load_for_resume(tmp_path / 'weights.pth')

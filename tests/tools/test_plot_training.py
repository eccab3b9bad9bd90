import json

import pytest
from PIL import Image

from mmvig.utils.training_plot import draw_history, read_history


def log(work_dir, time: str, *rows: dict, cut: str = '') -> None:
    folder = work_dir / time / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, rows)) + cut)


def train(iteration: int, loss: float) -> dict:
    numbers = dict(base_lr=1e-3, lr=1e-4, loss=loss, loss_cls=loss / 2, acc=90.0, data_time=0.1, time=0.2)
    return dict(**numbers, epoch=1 + iteration // 100, iter=iteration, step=iteration)


def validation(epoch: int, ap: float) -> dict:
    return {'coco/bbox_mAP': ap, 'coco/bbox_mAP_s': -1.0, 'data_time': 0.1, 'time': 0.2, 'step': epoch}


@pytest.fixture
def resumed(tmp_path):
    """Killed after iteration 250, 130 of it for nothing: it went on from iteration 120."""
    work_dir = tmp_path / 'resumed'
    steps = [train(50, 3.0), train(100, 2.0), validation(1, 0.1), train(150, 1.5), train(200, 1.4), validation(2, 0.2)]
    log(work_dir, '20260101_000000', *steps, train(250, 1.3), cut='\n{"loss": 1.')
    log(work_dir, '20260102_000000', train(150, 1.6), train(200, 1.2), validation(2, 0.3))
    log(work_dir, '20260103_000000', {'some/other': 1})  # of a test
    return work_dir


def test_history_of_a_resumed_run(resumed):
    history = read_history(resumed)
    assert [(row['iter'], row['loss']) for row in history.train] == [(50, 3.0), (100, 2.0), (150, 1.6), (200, 1.2)]
    assert history.resumed_at == [100]
    assert [(row['iter'], row.get('coco/bbox_mAP')) for row in history.validation[:1]] == [(100, 0.1)]


def test_curves(resumed):
    figure = draw_history(read_history(resumed), title='a run')
    loss, metric, rate = figure.axes
    curves = {line.get_label(): list(line.get_xydata()[:, 1]) for line in loss.lines}
    assert curves['loss'] == [3.0, 2.0, 1.6, 1.2] and curves['loss_cls'] == [1.5, 1.0, 0.8, 0.6]
    assert 'acc' not in curves
    assert rate.lines[0].get_label() == 'base_lr'
    assert [axis.get_ylabel() for axis in (loss, rate)] == ['training loss', 'learning rate']
    assert 'coco/bbox_mAP_s' not in [line.get_label() for line in metric.lines]
    assert rate.get_xlabel() == 'iteration' and figure.get_suptitle() == 'a run'


def test_without_validation_there_is_no_panel_for_it(tmp_path):
    log(tmp_path, '20260101_000000', train(1, 100.0), *(train(i, 0.1) for i in range(2, 20)))
    figure = draw_history(read_history(tmp_path), title='')
    assert len(figure.axes) == 2
    assert figure.axes[0].get_yscale() == 'log'


def test_picture(run_tool, resumed, tmp_path):
    status, said = run_tool('plot_training.py', resumed)
    assert status == 0 and f'{resumed}/training.png' in said
    assert min(Image.open(resumed / 'training.png').size) > 500
    assert run_tool('plot_training.py', resumed, '--out', tmp_path / 'new/curves.svg')[0] == 0
    assert (tmp_path / 'new/curves.svg').read_text().startswith('<?xml')


def test_of_a_real_run(run_tool, toy_file, tmp_path):
    work_dir = tmp_path / 'work'
    assert run_tool('train.py', toy_file, '--work-dir', work_dir, '--cfg-options', 'train_cfg.max_epochs=2')[0] == 0
    history = read_history(work_dir)
    assert [row['iter'] for row in history.train] == list(range(1, 13))
    assert [(row['iter'], 'toy/mean' in row) for row in history.validation] == [(6, True), (12, True)]


def test_nothing_logged(run_tool, tmp_path):
    status, _ = run_tool('plot_training.py', tmp_path)
    assert f'work_dir: {tmp_path} holds no */vis_data/scalars.json' in status

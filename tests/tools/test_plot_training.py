import json

import pytest
from PIL import Image

from mmvig.utils.training_plot import draw_comparison, draw_history, read_history


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


def test_runs_against_each_other(resumed, tmp_path):
    log(tmp_path / 'other', '20260101_000000', train(50, 4.0), train(100, 1.0), dict(validation(1, 0.4), extra=7.0))
    histories = {name: read_history(tmp_path / name) for name in ('resumed', 'other')}
    figure = draw_comparison(histories)
    curves = {
        axis.get_title(): {line.get_label(): list(line.get_xydata()[:, 1]) for line in axis.lines}
        for axis in figure.axes
    }
    assert list(curves) == ['loss', 'coco/bbox_mAP', 'some/other', 'extra']
    assert curves['loss'] == {'resumed': [3.0, 2.0, 1.6, 1.2], 'other': [4.0, 1.0]}
    assert curves['coco/bbox_mAP'] == {'resumed': [0.1, 0.3], 'other': [0.4]} and curves['extra'] == {'other': [7.0]}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['resumed', 'other']
    lines = figure.axes[0].lines
    assert lines[0].get_color() != lines[1].get_color() == figure.axes[3].lines[0].get_color()
    assert [axis.get_title() for axis in draw_comparison(histories, ['lr', 'acc']).axes] == ['lr', 'acc']


def test_more_runs_than_colours(resumed):
    history = read_history(resumed)
    lines = draw_comparison({str(i): history for i in range(10)}, ['loss']).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 10


def test_comparison(run_tool, resumed, tmp_path):
    (tmp_path / 'twin').mkdir()
    rows = [dict(train(1, 1.0), time=1.0), dict(train(2, 1.0), time=3.0), {'loss': 1.0, 'iter': 3}]
    log(tmp_path / 'twin/resumed', '20260101_000000', *rows)
    out = tmp_path / 'both.png'
    status, said = run_tool('plot_training.py', resumed, tmp_path / 'twin/resumed', '--out', out)
    assert status == 0 and min(Image.open(out).size) > 300
    assert f'{resumed}: 0.2 seconds an iteration\n{tmp_path}/twin/resumed: 2 seconds an iteration\n' in said
    status, said = run_tool('plot_training.py', resumed, '--keys', 'loss_cls', '--out', out)
    assert status == 0 and said.startswith('resumed: 0.2 seconds')
    status, _ = run_tool('plot_training.py', resumed, '--keys', 'los', '--out', out)
    assert status.startswith('keys: no run logged los; there is ') and 'loss_cls' in status

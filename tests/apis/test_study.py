"""The study's bookkeeping, with a stand-in for tools/train.py; the tool itself trains in tests/tools."""

import json
import re
from pathlib import Path

import pytest

from mmvig.apis import study
from mmvig.apis.study import Result, Training, draw, results, train_all

NANO = Path(__file__).parents[2] / 'configs/mmpretrain/digits/vigh-gla-nano_1xb64_digits-64px.py'

# Logs an iteration at a time, saves on SIGTERM, goes on where it was, and fails where its config says so.
TRAIN = """
import json, os, pathlib, signal, sys, time
config, work_dir = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[sys.argv.index('--work-dir') + 1])
assert '--resume' in sys.argv and config.exists()
wanted = config.read_text()
if wanted == 'fail':
    sys.exit('no such luck')
saved = work_dir / 'saved'
signal.signal(signal.SIGTERM, lambda *_: sys.exit((work_dir / 'stopped').write_text('') or 143))
(work_dir / 'device').write_text(os.environ.get('CUDA_VISIBLE_DEVICES', ''))
(work_dir / 'arguments').write_text(' '.join(sys.argv))
log = work_dir / f'{time.time()}/vis_data/scalars.json'
log.parent.mkdir(parents=True)
for i in range(int(saved.read_text()) if saved.exists() else 0, 4):
    print(f'train iter {i + 1}/4', flush=True)
    with log.open('a') as file:
        row = dict(iter=i + 1, time=0.1 * (i + 1), data_time=0.01, loss=4.0 - i, memory=1024 * i)
        print(json.dumps(row), file=file)
    saved.write_text(str(i + 1))
    time.sleep(0.05 if wanted == 'quick' else 2)
with log.open('a') as file:
    print(json.dumps({'accuracy/top1': 90.0, 'step': 4}), file=file)
"""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    (tmp_path / 'tools').mkdir()
    (tmp_path / 'tools/train.py').write_text(TRAIN)
    monkeypatch.setattr(study, 'home', lambda: tmp_path)
    monkeypatch.setattr(study, '_devices', lambda: ['cpu'])
    return tmp_path


def training(home: Path, name: str, kind: str) -> Training:
    (home / f'{name}.py').write_text(kind)
    return Training(home / f'{name}.py', home / 'study')


@pytest.mark.parametrize(
    ('name', 'task', 'backbone'),
    [
        ('mask-rcnn_vigh-gla-tiny_fpn_512px_digits', 'mask-rcnn_fpn_512px_digits', 'vigh-gla-tiny'),
        ('mask-rcnn_r50_fpn_512px_digits', 'mask-rcnn_fpn_512px_digits', 'r50'),
        ('mask-rcnn_swin-t-p4-w7_fpn_512px_digits', 'mask-rcnn_fpn_512px_digits', 'swin-t-p4-w7'),
        ('swin-tiny-patch4-window7_upernet_1xb8', 'upernet_1xb8', 'swin-tiny-patch4-window7'),
        ('resnet50_1xb64_digits-64px', '1xb64_digits-64px', 'resnet50'),
        ('vig-gla-base-adapter_upernet', 'upernet', 'vig-gla-base-adapter'),
        ('something_else', 'something_else', 'something_else'),
    ],
)
def test_names(name, task, backbone):
    training = Training(Path(f'configs/{name}.py'), Path('study'))
    assert (training.task, training.backbone) == (task, backbone)


def test_complete_and_failed_trainings(home):
    good, bad = training(home, 'good', 'quick'), training(home, 'bad', 'fail')
    said = []
    assert train_all([bad, good], seconds=60, options=['a=1'], say=said.append) == [bad]
    assert good.about.exists() and not bad.about.exists()
    assert (good.work_dir / 'arguments').read_text().endswith(' --cfg-options a=1')
    assert any('bad failed with status 1: no such luck' in line for line in said)
    assert any('good is complete: top-1 0.900' in line for line in said)
    (home / 'good.py').write_text('fail')  # what is complete does not run again
    assert train_all([good], seconds=60, say=said.append) == []


def test_out_of_time_and_on_again(home):
    slow, never = training(home, 'slow', 'slow'), training(home, 'never', 'quick')
    said = []
    assert train_all([slow, never], seconds=1.5, say=said.append, interval=0.2) == []
    assert not slow.about.exists() and not never.work_dir.exists()
    assert any('slow has stopped, and goes on' in line for line in said)
    assert any('slow: train iter 1/4' in line for line in said)
    (home / 'slow.py').write_text('quick')
    assert train_all([slow, never], seconds=60, say=said.append) == []
    rows = [json.loads(line) for path in sorted(slow.work_dir.glob('*/vis_data/scalars.json')) for line in path.open()]
    assert [row['iter'] for row in rows if 'iter' in row] == [1, 2, 3, 4]


def test_one_training_a_gpu(home, monkeypatch):
    monkeypatch.setattr(study, '_devices', lambda: ['4', '7'])
    monkeypatch.setattr(study.torch.cuda, 'get_device_name', lambda: 'a GPU')
    trainings = [training(home, name, 'slow') for name in ('one', 'two', 'three')]
    train_all(trainings, seconds=2, say=lambda line: None)
    assert [(t.work_dir / 'device').read_text() for t in trainings[:2]] == ['4', '7']
    assert not trainings[2].work_dir.exists()
    for t in trainings:
        t.config.write_text('quick')
    train_all(trainings, seconds=60, say=lambda line: None)
    assert json.loads(trainings[2].about.read_text())['device'] == 'a GPU'


def test_commit(monkeypatch):
    assert re.fullmatch(r'([0-9a-f]{7,}\+?)?', study._commit())
    monkeypatch.setenv('PATH', '')
    assert study._commit() == ''


@pytest.mark.parametrize(('visible', 'expected'), [(None, ['0', '1']), ('3,5', ['3', '5'])])
def test_devices(visible, expected, monkeypatch):
    monkeypatch.setattr(study.torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(study.torch.cuda, 'device_count', lambda: 2)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    assert study._devices() == expected
    monkeypatch.setattr(study.torch.cuda, 'is_available', lambda: False)
    assert study._devices() == ['cpu']


def test_results_and_picture(home, monkeypatch):
    monkeypatch.setenv('COMMIT', 'abc1234')
    (home / NANO.name).write_text('quick')
    done, waiting = Training(home / NANO.name, home / 'study'), training(home, 'waiting', 'slow')
    with pytest.raises(ValueError, match='trainings: none of them is complete'):
        draw([done, waiting])
    train_all([done], seconds=60, say=lambda line: None)
    done = done._replace(config=NANO)  # for the parameters
    (result,) = results([done, waiting])
    assert isinstance(result, Result) and result.metrics == {'top-1': 0.9}
    assert (result.seconds, result.waiting, result.memory) == (pytest.approx(0.3), 0.01, 3.0)
    row = result.row()
    assert row['backbone'] == 'vigh-gla-nano' and row['commit'] == 'abc1234' and row['device'] == 'CPU'
    assert (row['top-1'], row['mIoU'], row['ms an iteration'], row['memory, GiB']) == ('0.900', '', '300', '3.0')
    assert 1 < float(row['parameters, M']) < 3
    figure = draw([done, waiting])
    assert [axis.get_title(loc='left') for axis in figure.axes][0] == '1xb64_digits-64px' and len(figure.axes) == 4
    figure.savefig(home / 'picture.png')


def test_an_exception_stops_the_trainings(home):
    slow = training(home, 'slow', 'slow')

    def say(line: str) -> None:
        if 'train iter' in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_all([slow], seconds=60, say=say, interval=0.1)
    assert (slow.work_dir / 'stopped').exists()

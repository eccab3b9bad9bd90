import csv
import json
import runpy
from pathlib import Path

import pytest
from mmengine.config import Config

ROOT = Path(__file__).parents[2]
HEADER = 'model,size,accuracy,metric\n'


@pytest.fixture
def study(run_tool, library_file, untrained, tmp_path):
    """Runs the tool on an untrained model of a library: (exit status or message, standard output)."""

    def run(library: str, *arguments: object, options: tuple[str, ...] = ()) -> tuple[int | str, str]:
        file = library_file(library)
        places = ['--work-dir', tmp_path / 'work', '--out', tmp_path / 'accuracies.csv']
        more = ['--cfg-options', *options] if options else []
        return run_tool('resolution_study.py', file, untrained(file), *places, *arguments, *more)

    return run


@pytest.fixture
def rows(tmp_path):
    def read() -> list[dict]:
        with (tmp_path / 'accuracies.csv').open(newline='') as stream:
            return list(csv.DictReader(stream))

    return read


@pytest.mark.parametrize(('library', 'metric'), [('mmdet', 'box AP'), ('mmpretrain', 'top-1')])
def test_a_row_a_size(study, rows, tmp_path, library, metric):
    (tmp_path / 'accuracies.csv').write_text(f'{HEADER}other,64,0.5,top-1\nmine,64,7,top-1\nmine,32,0.1,top-1\n')
    status, said = study(library, '--sizes', '64', '96', '--name', 'mine')
    assert status == 0, said
    assert [(row['model'], row['size']) for row in rows()] == [
        ('other', '64'),
        ('mine', '32'),
        ('mine', '64'),
        ('mine', '96'),
    ]
    assert all(row['metric'] == metric and 0 <= float(row['accuracy']) <= 1 for row in rows()[2:])


def test_images_have_the_size(study, monkeypatch):
    from mmdet.models import TwoStageDetector

    shapes, predict = [], TwoStageDetector.predict

    def spy(self, images, *args, **more):
        shapes.append(images.shape[2:])
        return predict(self, images, *args, **more)

    monkeypatch.setattr(TwoStageDetector, 'predict', spy)
    # What the config pads to, for the one size that it was made for, would hide the others.
    status, said = study('mmdet', '--sizes', '64', '160', options=('+model.data_preprocessor.pad_size_divisor=256',))
    assert status == 0, said
    assert {max(shape) for shape in shapes[:3]} == {64} and {max(shape) for shape in shapes[3:]} == {160}


def test_a_model_that_finds_nothing(study, rows):
    status, said = study('mmdet', '--sizes', '64', options=('model.test_cfg.rcnn.score_thr=1.0',))
    assert status == 0, said
    assert [(row['accuracy'], row['metric']) for row in rows()] == [('0.0000', 'box AP')]


def test_crops_of_a_larger_picture():
    at_size = runpy.run_path(str(ROOT / 'tools/resolution_study.py'))['at_size']
    steps = [dict(type='ResizeEdge', scale=256, edge='short'), dict(type='CenterCrop', crop_size=224)]
    wrapped = dict(dataset=dict(type='RepeatDataset', dataset=dict(pipeline=steps)))
    cfg = Config(dict(model=dict(), test_dataloader=wrapped))
    edge, crop = at_size(cfg, 448).test_dataloader.dataset.dataset.pipeline
    assert (edge.scale, crop.crop_size) == (512, 448)
    assert json.loads(json.dumps(cfg.to_dict())) == dict(model={}, test_dataloader=wrapped)


def test_what_cannot_be(study, tmp_path):
    out = tmp_path / 'accuracies.csv'
    assert study('mmseg', '--sizes', '64')[0].startswith('test_dataloader.dataset.pipeline must have Resize')
    assert study('mmdet', '--sizes', '64', '16')[0].startswith('--sizes must be at least 32')
    assert not out.exists()
    out.write_text('model,size,accuracy,commit\nother,64,0.5,abc\n')
    assert 'name another file' in study('mmdet', '--sizes', '64')[0]
    assert out.read_text().endswith('other,64,0.5,abc\n')
    out.unlink()
    out.mkdir()
    assert study('mmdet', '--sizes', '64')[0].startswith('--out: ')

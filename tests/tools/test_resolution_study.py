import csv

import pytest


@pytest.mark.parametrize(('library', 'metric'), [('mmdet', 'box AP'), ('mmpretrain', 'top-1')])
def test_rows_a_size(run_tool, library_file, untrained, tmp_path, library, metric):
    file, out = library_file(library), tmp_path / 'accuracies.csv'
    out.write_text('model,size,accuracy,metric\nother,64,0.5,top-1\nmine,32,0.1,top-1\n')
    options = ['--work-dir', tmp_path / 'work', '--name', 'mine', '--out', out]
    if library == 'mmdet':  # what an untrained model finds depends on nothing but its weights: all of it counts
        options += ['--cfg-options', '+model.data_preprocessor.pad_size_divisor=128']
    status, said = run_tool('resolution_study.py', file, untrained(file), '--sizes', '64', '96', *options)
    assert status == 0, said
    with out.open(newline='') as stream:
        rows = list(csv.DictReader(stream))
    assert [(row['model'], row['size']) for row in rows] == [('other', '64'), ('mine', '64'), ('mine', '96')]
    assert all(row['metric'] == metric and 0 <= float(row['accuracy']) <= 1 for row in rows[1:])


def test_images_have_the_size(run_tool, library_file, untrained, tmp_path, monkeypatch):
    from mmdet.models import TwoStageDetector

    shapes, predict = [], TwoStageDetector.predict
    monkeypatch.setattr(
        TwoStageDetector,
        'predict',
        lambda self, x, *args, **more: shapes.append(x.shape[2:]) or predict(self, x, *args, **more),
    )
    file = library_file('mmdet')
    options = ['--work-dir', tmp_path / 'work', '--out', tmp_path / 'a.csv']
    options += ['--cfg-options', '+model.data_preprocessor.pad_size_divisor=128']
    status, said = run_tool('resolution_study.py', file, untrained(file), '--sizes', '64', '160', *options)
    assert status == 0, said
    assert {max(shape) for shape in shapes[:3]} == {64} and {max(shape) for shape in shapes[3:]} == {160}


def test_what_cannot_be(run_tool, library_file, untrained, tmp_path):
    file = library_file('mmseg')  # its test pipeline has no Resize
    arguments = [file, untrained(file), '--out', tmp_path / 'a.csv', '--work-dir', tmp_path / 'work', '--sizes']
    assert run_tool('resolution_study.py', *arguments, '64')[0].startswith('test_dataloader.dataset.pipeline must')
    assert run_tool('resolution_study.py', *arguments, '16')[0].startswith('--sizes must be at least 32')
    assert not (tmp_path / 'a.csv').exists()

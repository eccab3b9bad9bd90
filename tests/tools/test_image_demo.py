import json
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

CLASSES = dict(mmdet=[*'0123456789'], mmseg=['background', *'0123456789'], mmpretrain=[*'0123456789'])


@pytest.fixture
def images(tmp_path, digit_scenes):
    """Two good images, one of them in a subfolder, two bad ones, and a file that is no image."""
    folder = tmp_path / 'images'
    (folder / 'more').mkdir(parents=True)
    good = folder / 'good.jpg'
    shutil.copy(digit_scenes / 'images/test/000001.jpg', good)
    shutil.copy(digit_scenes / 'images/test/000002.jpg', folder / 'more/other.jpg')
    (folder / 'cut.jpg').write_bytes(good.read_bytes()[:-400])
    (folder / 'text.png').write_text('no image')
    (folder / 'notes.txt').write_text('no image')
    return folder


@pytest.fixture
def demo(run_tool, library_file, untrained, tmp_path):
    """Runs tools/image_demo.py with an untrained model of a library: (exit status or message, standard output)."""

    def run(library: str, source: object, *arguments: object) -> tuple[int | str, str]:
        file = library_file(library)
        return run_tool('image_demo.py', file, untrained(file), source, '--out-dir', tmp_path / 'out', *arguments)

    return run


@pytest.mark.parametrize('library', CLASSES)
def test_a_folder(demo, images, library, tmp_path):
    status, said = demo(library, images, '--score-thr', 0)
    assert status == 0, said
    assert 'images  iter 4/4' in said
    assert '2 of 4 images are in' in said and '2 skipped:' in said
    assert said.count(f'{images}/cut.jpg: OSError') == 2 and said.count(f'{images}/text.png: UnidentifiedImage') == 2
    out = tmp_path / 'out'
    expected = {'good.jpg', 'good.json', 'more/other.jpg', 'more/other.json'}
    expected |= {'good_labels.png', 'more/other_labels.png'} if library == 'mmseg' else set()
    assert {str(path.relative_to(out)) for path in out.rglob('*.*')} == expected

    original, drawn = cv2.imread(str(images / 'good.jpg')), cv2.imread(str(out / 'good.jpg'))
    height, width = original.shape[:2]
    if library != 'mmpretrain':
        assert drawn.shape == original.shape and np.abs(drawn.astype(int) - encoded(original)).mean() > 1
    record = json.loads((out / 'good.json').read_text())
    assert (record['image'], record['width'], record['height']) == (str(images / 'good.jpg'), width, height)
    check = dict(mmdet=check_detections, mmseg=check_segmentation, mmpretrain=check_classification)[library]
    check(record, out, height, width)


def encoded(image: np.ndarray) -> np.ndarray:
    """What writing and reading a JPEG file leaves of an image."""
    return cv2.imdecode(cv2.imencode('.jpg', image)[1], cv2.IMREAD_COLOR)


def check_detections(record, out, height, width):
    assert 0 < len(record['detections']) <= 5
    for found in record['detections']:
        assert found['name'] == CLASSES['mmdet'][found['label']] and 0 <= found['score'] <= 1
        left, top, right, bottom = found['box']
        assert 0 <= left <= right <= width and 0 <= top <= bottom <= height
        assert rle.decode(found['mask']).shape == (height, width)


def check_segmentation(record, out, height, width):
    labels = np.asarray(Image.open(out / 'good_labels.png'))
    assert labels.shape == (height, width) and record['classes'] == CLASSES['mmseg']
    shares = {name: (labels == i).mean() for i, name in enumerate(record['classes']) if (labels == i).any()}
    assert record['shares'] == pytest.approx(shares, abs=1e-6)
    assert list(record['shares'].values()) == sorted(record['shares'].values(), reverse=True)


def check_classification(record, out, height, width):
    scores = [found['score'] for found in record['top5']]
    assert len(scores) == 5 and scores == sorted(scores, reverse=True) and 0 < sum(scores) <= 1
    assert all(found['name'] == CLASSES['mmpretrain'][found['label']] for found in record['top5'])


def test_score_threshold(demo, images, tmp_path):
    status, _ = demo('mmdet', images / 'good.jpg', '--score-thr', 1)
    assert status == 0
    assert json.loads((tmp_path / 'out/good.json').read_text())['detections'] == []
    original, drawn = cv2.imread(str(images / 'good.jpg')), cv2.imread(str(tmp_path / 'out/good.jpg'))
    assert np.array_equal(drawn, encoded(original))


def test_large_images_are_not_unpacked(demo, tmp_path, monkeypatch):
    bomb = tmp_path / 'bomb.png'
    Image.new('1', (12_000, 10_000)).save(bomb)
    assert bomb.stat().st_size < 30_000
    monkeypatch.setattr(Image.Image, 'load', lambda self: pytest.fail('unpacked'))
    status, said = demo('mmpretrain', bomb)
    assert status == 1
    assert '120000000 pixels are more than 100000000; --max-pixels allows more' in said
    status, said = demo('mmpretrain', bomb, '--max-pixels', 1000)  # beyond twice the limit Pillow itself refuses
    assert status == 1 and '--max-pixels allows more' in said


def test_limit(demo, images, tmp_path):
    status, said = demo('mmpretrain', images, '--limit', 2)
    assert status == 0 and 'iter 2/2' in said and '1 of 2 images' in said


def test_images_of_the_same_stem_keep_apart(demo, images, tmp_path):
    cv2.imwrite(str(images / 'good.png'), cv2.imread(str(images / 'good.jpg')))
    assert demo('mmpretrain', images)[0] == 0
    assert {'good_jpg.json', 'good_png.json'} <= {path.name for path in (tmp_path / 'out').iterdir()}


def test_nothing_worked(demo, images):
    status, said = demo('mmpretrain', images / 'text.png')
    assert status == 1 and '0 of 1 images' in said


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['gone.jpg'], 'image: there is no file or folder gone.jpg'),
        (['tests'], 'image: the folder tests holds no image'),
    ],
)
def test_no_images(demo, arguments, message, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    status, _ = demo('mmpretrain', *arguments)
    assert status.startswith(message)


@pytest.mark.parametrize('arguments', [('--score-thr', 2), ('--limit', 0), ('--max-pixels', -1)])
def test_arguments_out_of_range(run_tool, arguments, capsys):
    assert run_tool('image_demo.py', 'a.py', 'a.pth', 'a.jpg', '--out-dir', 'out', *arguments)[0] == 2


def test_missing_checkpoint_and_scope(run_tool, toy_file, images, tmp_path):
    rest = [images, '--out-dir', tmp_path / 'out']
    assert 'checkpoint: there is no file gone.pth' in run_tool('image_demo.py', toy_file, 'gone.pth', *rest)[0]
    (tmp_path / 'some.pth').touch()
    status, _ = run_tool('image_demo.py', toy_file, tmp_path / 'some.pth', *rest)
    assert "default_scope must be 'mmdet', 'mmseg' or 'mmpretrain', got None" in status

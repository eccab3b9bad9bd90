import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.datasets import load_digits

from mmvig.datasets.digit_composer import compose_scene, load_scans, split_scans
from mmvig.datasets.digit_layout import CLASSES, SEG_CLASSES, SPLITS, expected_layout
from mmvig.datasets.digit_scenes import Recipe, make_digit_scenes, square_crop

RECIPE = Recipe(train=8, test=4, size=192, seed=3)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp('digits') / 'scenes'
    assert make_digit_scenes(out, RECIPE)
    return out


@pytest.fixture(params=SPLITS)
def coco(root, request):
    coco = COCO(root / f'annotations/instances_{request.param}.json')
    coco.split = request.param
    return coco


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# ------------------------------------------------------------------------------------------------- the same bytes


def test_bytes_do_not_depend_on_the_number_of_processes(root, tmp_path):
    assert make_digit_scenes(tmp_path / 'again', RECIPE, workers=2)
    assert contents(tmp_path / 'again') == contents(root)


def test_a_larger_set_begins_with_the_smaller(root, tmp_path):
    make_digit_scenes(tmp_path / 'few', Recipe(train=3, test=1, size=192, seed=3))
    few, many = contents(tmp_path / 'few'), contents(root)
    pictures = [name for name in few if name.endswith(('.jpg', '0001.png', '0002.png', '0003.png'))]
    assert len(pictures) >= 2 * 4 + 4
    assert all(few[name] == many[name] for name in pictures)


@pytest.mark.parametrize('recipe', [Recipe(1, 1, 192, seed=4), Recipe(1, 1, size=208, seed=3)])
def test_seed_and_size_change_the_scenes(root, tmp_path, recipe):
    make_digit_scenes(tmp_path / 'other', recipe)
    for name in ('images/train/000001.jpg', 'images/test/000001.jpg'):
        assert read(tmp_path / 'other' / name).shape != read(root / name).shape


PINNED = {'numpy': '2.3.5', 'scipy': '1.17.1', 'pillow': '13.0.0', 'scikit-learn': '1.9.1', 'pycocotools': '2.0.11'}


@pytest.mark.skipif(
    {name: importlib.metadata.version(name) for name in PINNED} != PINNED,
    reason='the golden digests hold for the pinned versions',
)
def test_golden_bytes(root):
    """Other bytes than these are another data set: if that is meant, raise VERSION and update the digests."""
    files = hashlib.sha256()
    for name, content in sorted(contents(root).items()):
        if name.startswith(('images/', 'annotations/', 'crops/')):
            files.update(name.encode() + content)
    assert digest_of_arrays() == 'd3e0ba2bd95a7d5628d1cfeccbe00d80e80d186eb452da0ed6ba05b864808d8d'
    assert files.hexdigest() == 'c8f7d5d73911945a7cc0d49ab7fe2a3a8f4e4c3dcdacf6f339b903b141bf64c4'


def digest_of_arrays() -> str:
    """Of some scenes as composed, before any file format."""
    images, targets = load_scans()
    arrays = hashlib.sha256()
    for number in range(6):
        scene = compose_scene(np.random.default_rng(number), images, split_scans(targets, 0)['train'], 320)
        arrays.update(scene.image.tobytes() + scene.owner.tobytes() + bytes(scene.digits))
    return arrays.hexdigest()


def test_bytes_do_not_depend_on_the_processor(monkeypatch):
    """Simulated by switching off the vector extensions that NumPy, OpenBLAS and the C library would choose."""
    extensions = np.show_config('dicts')['SIMD Extensions'].get('found', [])
    monkeypatch.setenv('NPY_DISABLE_CPU_FEATURES', ' '.join(extensions))
    monkeypatch.setenv('OPENBLAS_CORETYPE', 'Prescott')
    monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA')
    code = 'import runpy, sys; print(runpy.run_path(sys.argv[1])["digest_of_arrays"]())'
    done = subprocess.run([sys.executable, '-c', code, __file__], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == digest_of_arrays(), done.stderr


# -------------------------------------------------------------------------------------------------------- formats


def test_train_and_test_share_no_scan(root):
    scans = {}
    for split in SPLITS:
        document = json.loads((root / f'annotations/instances_{split}.json').read_text())
        scans[split] = {annotation['scan'] for annotation in document['annotations']}
        for annotation in document['annotations']:
            assert load_digits().target[annotation['scan']] == int(CLASSES[annotation['category_id'] - 1])
    assert scans['train'] and scans['test'] and not scans['train'] & scans['test']


def test_train_and_test_share_no_background(root):
    shapes = [
        {number: (image['height'], image['width']) for number, image in COCO(path).imgs.items()}
        for path in sorted(root.glob('annotations/*.json'))
    ]
    assert all(shapes[0][number] != shapes[1][number] for number in shapes[0])


def test_coco_images_are_the_files(root, coco):
    images = coco.loadImgs(coco.getImgIds())
    assert {image['file_name'] for image in images} == {path.name for path in (root / 'images' / coco.split).iterdir()}
    assert len(images) == getattr(RECIPE, coco.split)
    for image in images:
        assert read(root / 'images' / coco.split / image['file_name']).shape == (image['height'], image['width'], 3)


def test_coco_boxes_and_areas_are_those_of_the_masks(coco):
    annotations = coco.loadAnns(coco.getAnnIds())
    assert sorted(annotation['id'] for annotation in annotations) == list(range(1, len(annotations) + 1))
    assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    for annotation in annotations:
        mask = coco.annToMask(annotation)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
        assert annotation['bbox'] == box
        assert annotation['area'] == mask.sum() > 0
        assert annotation['iscrowd'] == 0


def test_label_map_is_the_union_of_the_masks(root, coco):
    for image in coco.loadImgs(coco.getImgIds()):
        label_map = np.zeros((image['height'], image['width']), int)
        for annotation in coco.imgToAnns[image['id']]:
            mask = coco.annToMask(annotation)
            assert not label_map[mask == 1].any(), 'a pixel belongs to two digits'
            label_map += mask * SEG_CLASSES.index(coco.cats[annotation['category_id']]['name'])
        written = read(root / 'annotations' / coco.split / image['file_name'].replace('.jpg', '.png'))
        assert written.dtype == np.uint8
        assert np.array_equal(written, label_map)


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_perfect_results_score_one(coco, kind, capsys):
    results = [
        {key: annotation[key] for key in ('image_id', 'category_id', 'bbox', 'segmentation')} | {'score': 1.0}
        for annotation in coco.loadAnns(coco.getAnnIds())
    ]
    evaluation = COCOeval(coco, coco.loadRes(results), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == 1.0


def test_one_crop_for_each_digit(root, coco):
    crops = {path.name: path for path in (root / 'crops' / coco.split).glob('*/*.jpg')}
    assert sorted(path.name for path in (root / 'crops' / coco.split).iterdir()) == sorted(CLASSES)
    assert len(crops) == len(coco.getAnnIds())
    for image in coco.loadImgs(coco.getImgIds()):
        scene = read(root / 'images' / coco.split / image['file_name'])
        for place, annotation in enumerate(coco.imgToAnns[image['id']], 1):
            path = crops[image['file_name'].replace('.jpg', f'_{place}.jpg')]
            assert path.parent.name == coco.cats[annotation['category_id']]['name']
            crop, expected = read(path).astype(int), square_crop(scene, annotation['bbox'])
            assert crop.shape == expected.shape
            assert np.abs(crop - expected).mean() < 12  # both went through JPEG, apart


def test_square_crop_holds_the_box():
    image = np.arange(100 * 160).reshape(100, 160)
    for box in ([0, 0, 20, 30], [140, 70, 20, 30], [60, 40, 10, 12], [0, 95, 3, 5]):
        x, y, width, height = box
        crop = square_crop(image, box)
        assert crop.shape == (round(1.25 * max(width, height)),) * 2
        assert np.isin(image[y : y + height, x : x + width], crop).all()
    assert square_crop(image, [5, 2, 60, 96]).shape == (100, 120)  # as much as the image holds


def test_high_resolution(tmp_path):
    make_digit_scenes(tmp_path / 'large', Recipe(train=1, test=1, size=2048))
    coco = COCO(tmp_path / 'large/annotations/instances_train.json')
    (image,) = coco.loadImgs(coco.getImgIds())
    assert 0.79 * 2048 <= max(image['height'], image['width']) <= 2048
    heights = [annotation['bbox'][3] for annotation in coco.loadAnns(coco.getAnnIds())]
    assert round(3 * 6.4) <= len(heights) <= round(7 * 6.4)
    assert min(heights) < 100 and max(heights) > 300
    assert read(tmp_path / 'large/images/train/000001.jpg').shape[:2] == (image['height'], image['width'])


def test_every_place_of_the_layout_exists(root):
    for line in expected_layout(str(root)).splitlines()[1:]:
        for pattern in line.split('  ')[2].strip().split(' '):
            for split in SPLITS:
                for digit in CLASSES:
                    path = pattern.replace('{train,test}', split).replace('0..9', digit)
                    path = path.replace('000001_1.jpg', '')  # a class may miss in scene 1
                    assert (root / path).exists(), path


def test_preview_and_readme(root):
    assert read(root / 'preview.png').shape == (320, 4 * 320, 3)
    text = (root / 'README.txt').read_text()
    assert 'make_digit_scenes.py OUT --train 8 --test 4 --size 192 --seed 3' in text
    assert all(line.strip() in text for line in expected_layout('.').splitlines())


# --------------------------------------------------------------------------------------------- OpenMMLab reads it


def test_mmdet_reads_it(root):
    pytest.importorskip('mmdet')
    from mmdet.datasets import CocoDataset

    dataset = CocoDataset(
        data_root=str(root),
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='images/train'),
        metainfo=dict(classes=CLASSES),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=[
            dict(type='mmdet.LoadImageFromFile'),
            dict(type='mmdet.LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='mmdet.PackDetInputs'),
        ],
    )
    assert len(dataset) == RECIPE.train
    document = json.loads((root / 'annotations/instances_train.json').read_text())
    seen = 0
    for sample in dataset:
        annotations = [a for a in document['annotations'] if a['image_id'] == sample['data_samples'].img_id]
        instances = sample['data_samples'].gt_instances
        assert instances.labels.tolist() == [a['category_id'] - 1 for a in annotations]
        assert instances.masks.masks.sum((1, 2)).tolist() == [a['area'] for a in annotations]
        boxes = [[x, y, x + width, y + height] for x, y, width, height in (a['bbox'] for a in annotations)]
        assert instances.bboxes.tensor.tolist() == boxes
        seen += len(annotations)
    assert seen == len(document['annotations'])


@pytest.mark.parametrize('reduce_zero_label', [False, True])
def test_mmseg_reads_it(root, reduce_zero_label):
    pytest.importorskip('mmseg')
    from mmseg.datasets import BaseSegDataset

    dataset = BaseSegDataset(
        data_root=str(root),
        data_prefix=dict(img_path='images/test', seg_map_path='annotations/test'),
        img_suffix='.jpg',
        seg_map_suffix='.png',
        metainfo=dict(classes=CLASSES if reduce_zero_label else SEG_CLASSES),
        reduce_zero_label=reduce_zero_label,
        pipeline=[
            dict(type='mmseg.LoadImageFromFile'),
            dict(type='mmseg.LoadAnnotations', reduce_zero_label=reduce_zero_label),
            dict(type='mmseg.PackSegInputs'),
        ],
    )
    assert len(dataset) == RECIPE.test
    for sample in dataset:
        written = read(Path(sample['data_samples'].seg_map_path)).astype(int)
        labels = sample['data_samples'].gt_sem_seg.data[0].numpy()
        assert labels.shape == sample['inputs'].shape[1:]
        background = 255 if reduce_zero_label else 0
        assert set(np.unique(labels)) <= {background, *range(len(dataset.metainfo['classes']))}
        assert np.array_equal(labels, np.where(written == 0, background, written - reduce_zero_label))


def test_mmpretrain_reads_it(root):
    pytest.importorskip('mmpretrain')
    from mmpretrain.datasets import CustomDataset

    dataset = CustomDataset(
        data_root=str(root / 'crops'), data_prefix='train', pipeline=[dict(type='LoadImageFromFile')]
    )
    assert dataset.metainfo['classes'] == CLASSES
    assert len(dataset) == len(json.loads((root / 'annotations/instances_train.json').read_text())['annotations'])
    for sample in dataset:
        assert CLASSES[sample['gt_label']] == Path(sample['img_path']).parent.name
        assert sample['img'].ndim == 3


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(train=0), 'train must be from 1 to 999,999, got 0'),
        (dict(test=-3), 'test must be from 1'),
        (dict(test=1_000_000), 'test must be from 1'),
        (dict(size=127), 'size must be from 128 to 2,048, got 127'),
        (dict(size=2049), 'size must be from 128 to 2,048, got 2,049'),
        (dict(seed=-1), 'seed must be from 0'),
    ],
)
def test_numbers_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**arguments)


def test_no_workers(tmp_path):
    with pytest.raises(ValueError, match='workers must be at least 1, got 0'):
        make_digit_scenes(tmp_path / 'out', RECIPE, workers=0)


def test_finished_data_is_reused(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    assert not make_digit_scenes(root, RECIPE, on_scene=lambda: pytest.fail('a scene was written'))
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob('*')}


def test_other_arguments_are_refused(root):
    before = contents(root)
    with pytest.raises(FileExistsError, match=r'--train 8 .* not with --train 9 .* delete it or choose another folder'):
        make_digit_scenes(root, Recipe(train=9, test=4, size=192, seed=3))
    assert contents(root) == before


def test_another_version_is_refused(root, monkeypatch):
    monkeypatch.setattr('mmvig.datasets.digit_scenes.VERSION', 99)
    with pytest.raises(FileExistsError, match='by version 1 of the generator, not with .* by version 99'):
        make_digit_scenes(root, RECIPE)


def test_lost_files_are_noticed(tmp_path):
    recipe = Recipe(train=1, test=1, size=128)
    make_digit_scenes(tmp_path / 'out', recipe)
    (tmp_path / 'out/annotations/train/000001.png').unlink()
    with pytest.raises(FileExistsError, match='lost files'):
        make_digit_scenes(tmp_path / 'out', recipe)


@pytest.mark.parametrize('meta', [None, 'no json', '[]', '{"generator": "another"}'])
def test_foreign_folders_are_left_alone(tmp_path, meta):
    (tmp_path / 'thesis.tex').write_text('years of work')
    if meta is not None:
        (tmp_path / 'meta.json').write_text(meta)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match='is no folder of digit scenes: delete it or choose another folder'):
        make_digit_scenes(tmp_path, RECIPE)
    assert contents(tmp_path) == before


def test_a_file_in_the_way(tmp_path):
    (tmp_path / 'out').write_text('years of work')
    with pytest.raises(FileExistsError, match='is no folder of digit scenes'):
        make_digit_scenes(tmp_path / 'out', RECIPE)


def test_empty_folders_and_missing_parents_are_fine(tmp_path):
    (tmp_path / 'empty').mkdir()
    recipe = Recipe(train=1, test=1, size=128)
    assert make_digit_scenes(tmp_path / 'empty', recipe)
    assert make_digit_scenes(tmp_path / 'not/yet', recipe)
    assert contents(tmp_path / 'empty') == contents(tmp_path / 'not/yet')


def test_the_working_directory_and_links_are_fine(tmp_path, monkeypatch):
    recipe = Recipe(train=1, test=1, size=128)
    (tmp_path / 'here').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'there')
    assert make_digit_scenes(tmp_path / 'link', recipe)
    monkeypatch.chdir(tmp_path / 'here')
    assert make_digit_scenes('.', recipe)
    assert contents(tmp_path / 'here') == contents(tmp_path / 'there')


def test_what_a_killed_run_left_is_cleared(tmp_path):
    left = tmp_path / 'out.unfinished/images/train'
    left.mkdir(parents=True)
    (left / '000777.jpg').write_text('half a picture')
    (tmp_path / 'out.unfinished/stray').touch()
    assert make_digit_scenes(tmp_path / 'out', Recipe(train=1, test=1, size=128))
    assert os.listdir(tmp_path) == ['out']
    assert not {'images/train/000777.jpg', 'stray'} & set(contents(tmp_path / 'out'))


@pytest.mark.parametrize('workers', [1, 2])
def test_interrupted_runs_leave_nothing(tmp_path, workers):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_digit_scenes(tmp_path / 'out', Recipe(train=20, test=1, size=128), workers=workers, on_scene=interrupt)
    assert os.listdir(tmp_path) == []


def test_full_disk(tmp_path, monkeypatch):
    write = Path.write_bytes

    def write_until_full(path, content):
        if path.name == '000002.png':
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, 'write_bytes', write_until_full)
    with pytest.raises(OSError, match=r'No space left on device, so the unfinished .*000002\.png') as caught:
        make_digit_scenes(tmp_path / 'out', RECIPE)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_one_run_at_a_time(tmp_path):
    (tmp_path / 'out.unfinished').mkdir()
    lock = os.open(tmp_path / 'out.unfinished', os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError, match='another process is writing'):
        make_digit_scenes(tmp_path / 'out', RECIPE)
    os.close(lock)
    assert make_digit_scenes(tmp_path / 'out', Recipe(train=1, test=1, size=128))

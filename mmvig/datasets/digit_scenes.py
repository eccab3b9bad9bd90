"""Digit scenes: a small real data set for detection, segmentation and classification that needs no download.

Handwritten digits that scikit-learn ships (Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998)
are composed into scenes and written in the formats of COCO, ADE20K and ImageNet at once. A data set is a function of
its `Recipe`: in one environment the same recipe gives the same bytes, whatever the number of processes, and scene n of
a split does not depend on how many follow it.
"""

import fcntl
import io
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from scipy import ndimage

from mmvig.datasets.digit_composer import REFERENCE_SIZE, Scene, compose_scene, load_scans, split_scans
from mmvig.datasets.digit_layout import CLASSES, PALETTE, SPLITS, expected_layout

__all__ = ['Recipe', 'draw_preview', 'make_digit_scenes', 'write_scene']

VERSION = 1  # of the generator: raised whenever the same recipe gives other bytes
SIZES = (128, 2048)
JPEG_QUALITY = 92
CROP = 1.25  # side of a crop over the longer side of the digit's box
PREVIEW_SCENES = 24
PREVIEW_CELL = 320  # pixels


@dataclass(frozen=True)
class Recipe:
    """All that a data set depends on.

    Args:
        train: number of scenes to train on, 1 to 999,999.
        test: number of held-out scenes, whose digits come from other scans, 1 to 999,999.
        size: nominal size in pixels, 128 to 2048; see `compose_scene`.
        seed: 0 or more.

    Raises:
        ValueError: a number is out of range.
    """

    train: int = 1200
    test: int = 200
    size: int = REFERENCE_SIZE
    seed: int = 0

    def __post_init__(self):
        for name, low, high in (('train', 1, 999_999), ('test', 1, 999_999), ('size', *SIZES), ('seed', 0, 2**63)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f'{name} must be from {low:,} to {high:,}, got {getattr(self, name):,}')


def make_digit_scenes(
    out: str | os.PathLike,
    recipe: Recipe,
    *,
    workers: int = 1,
    on_scene: Callable[[], None] = lambda: None,
) -> bool:
    """Write the data set into the folder `out`, which appears only when it is complete.

    Args:
        out: made with its parents; may exist if it is empty or holds this very data set.
        workers: number of processes.
        on_scene: called after each scene, to show progress.

    Returns:
        False if `out` held this data set already and nothing had to be done.

    Raises:
        FileExistsError: `out` holds something else, or an incomplete data set.
        BlockingIOError: another process is writing `out`.
        OSError: the disk is full, or `out` cannot be written; what was written is removed.
    """
    out = Path(out).resolve()
    if workers < 1:
        raise ValueError(f'workers must be at least 1, got {workers}')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        check_finished(out, recipe)
        return False
    with unfinished_folder(out) as folder:
        for split in SPLITS:
            records = []
            with closing(write_scenes(folder, split, recipe, workers)) as scenes:
                for record in scenes:
                    records.append(record)
                    on_scene()
            write_json(folder / f'annotations/instances_{split}.json', coco_document(records))
        write_image(folder / 'preview.png', draw_preview(folder))
        write_bytes(folder / 'README.txt', readme(recipe).encode())
        write_json(folder / 'meta.json', describe(recipe) | {'files': count_files(folder) + 1}, indent=2)
        folder.rename(out)
    return True


def describe(recipe: Recipe) -> dict:
    """What tells one data set from another."""
    return {'generator': 'mmvig digit scenes', 'version': VERSION, 'recipe': asdict(recipe)}


def arguments(recipe: dict[str, int]) -> str:
    return ' '.join(f'--{name} {value}' for name, value in recipe.items())


def readme(recipe: Recipe) -> str:
    return f"""Digit scenes, version {VERSION}, made by tools/make_digit_scenes.py OUT {arguments(asdict(recipe))}

The digits are scans of handwriting from scikit-learn's load_digits (E. Alpaydin and C. Kaynak, Optical Recognition of
Handwritten Digits, UCI Machine Learning Repository, 1998, CC BY 4.0). No scan is in both train and test: `scan` in an
annotation is the row of load_digits.

{expected_layout('.')}
"""


def check_finished(out: Path, recipe: Recipe) -> None:
    """Raise FileExistsError unless `out` is the complete data set of that recipe."""
    cure = 'delete it or choose another folder'
    asked = describe(recipe)
    try:
        meta = json.loads((out / 'meta.json').read_text())
        made, files = {key: meta[key] for key in asked}, meta['files']
    except (OSError, ValueError, TypeError, KeyError):
        raise FileExistsError(f'{out} exists and is no folder of digit scenes: {cure}') from None
    if made != asked:
        raise FileExistsError(
            f'{out} was made with {arguments(made["recipe"])} by version {made["version"]} of the generator, '
            f'not with {arguments(asked["recipe"])} by version {VERSION}: {cure}'
        )
    found = count_files(out)
    if found < files:
        raise FileExistsError(f'{out} has lost files, {found:,} are left of {files:,}: {cure}')


def count_files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


@contextmanager
def unfinished_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, held by this process alone; removed if it cannot be finished."""
    folder = out.with_name(out.name + '.unfinished')
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f'another process is writing {out}: wait for it to end') from None
        for left_over in folder.iterdir():  # by a run that was killed
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def write_scenes(folder: Path, split: str, recipe: Recipe, workers: int) -> Iterator[dict]:
    """Write all scenes of a split; yields what `write_scene` returns, in order."""
    for name in (f'images/{split}', f'annotations/{split}', *(f'crops/{split}/{digit}' for digit in CLASSES)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write = partial(write_scene, folder, split, recipe)
    numbers = range(1, asdict(recipe)[split] + 1)
    if workers == 1:
        yield from map(write, numbers)
        return
    # Fresh processes rather than forks, since the caller may run threads.
    pool = ProcessPoolExecutor(workers, get_context('spawn'), initializer=end_with_caller)
    try:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is the caller's to answer
        try:
            records = pool.map(write, numbers)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield from records
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_caller() -> None:
    """In a worker: end when the calling process does, even if that is killed."""

    def wait_and_end() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


def write_scene(folder: Path, split: str, recipe: Recipe, number: int) -> dict:
    """Compose scene `number` of a split and write its picture, label map and crops.

    Returns:
        Its COCO image under 'image' and its COCO annotations, not yet numbered, under 'annotations'.
    """
    images, pools = scans_of(recipe.seed)
    rng = np.random.default_rng((recipe.seed, SPLITS.index(split), number))
    scene = compose_scene(rng, images, pools[split], recipe.size)
    name = f'{number:06d}'
    height, width = scene.owner.shape
    write_image(folder / f'images/{split}/{name}.jpg', scene.image)
    write_image(folder / f'annotations/{split}/{name}.png', label_map(scene))
    annotations = coco_annotations(scene, number)
    for place, annotation in enumerate(annotations, 1):
        digit = CLASSES[annotation['category_id'] - 1]
        write_image(folder / f'crops/{split}/{digit}/{name}_{place}.jpg', square_crop(scene.image, annotation['bbox']))
    image = {'id': number, 'file_name': f'{name}.jpg', 'height': height, 'width': width}
    return {'image': image, 'annotations': annotations}


@cache
def scans_of(seed: int) -> tuple[np.ndarray, dict[str, list[np.ndarray]]]:
    """All scans, and those of each split and class; read once a process."""
    images, targets = load_scans()
    return images, split_scans(targets, seed)


def label_map(scene: Scene) -> np.ndarray:
    """0 on the background and digit + 1 elsewhere: uint8, `(H, W)`."""
    return np.array([0, *(digit + 1 for digit in scene.digits)], np.uint8)[scene.owner]


def coco_annotations(scene: Scene, image_id: int) -> list[dict]:
    """One COCO annotation for each digit, of what is visible; `scan` is the row of `load_digits` that it came from."""
    annotations = []
    for place, (rows, columns) in enumerate(ndimage.find_objects(scene.owner)):
        mask = scene.owner == place + 1
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        annotations.append(
            {
                'image_id': image_id,
                'category_id': scene.digits[place] + 1,
                'bbox': [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
                'area': int(mask.sum()),
                'segmentation': {'size': list(mask.shape), 'counts': rle['counts'].decode()},
                'iscrowd': 0,
                'scan': scene.scans[place],
            }
        )
    return annotations


def square_crop(image: np.ndarray, box: list[int]) -> np.ndarray:
    """The square around a box `[x, y, width, height]`, shifted to lie inside the image; cut where it is too large."""
    side = round(CROP * max(box[2:]))
    x, y = (
        int(np.clip(start + (length - side) / 2, 0, max(limit - side, 0)))
        for start, length, limit in zip(box[:2], box[2:], image.shape[1::-1], strict=True)
    )
    return image[y : y + side, x : x + side]


def coco_document(records: list[dict]) -> dict:
    """A COCO file of scenes in order; annotations are numbered from 1, for COCO's evaluation reads 0 as no match."""
    annotations = [annotation for record in records for annotation in record['annotations']]
    return {
        'info': {'description': 'mmvig digit scenes', 'version': str(VERSION)},
        'images': [record['image'] for record in records],
        'annotations': [{'id': number} | annotation for number, annotation in enumerate(annotations, 1)],
        'categories': [{'id': number, 'name': name} for number, name in enumerate(CLASSES, 1)],
    }


def draw_preview(folder: Path) -> np.ndarray:
    """A contact sheet of test scenes, with the boxes, names and outlines of their digits: RGB, `(H, W, 3)`."""
    document = json.loads((folder / 'annotations/instances_test.json').read_text())
    scenes = document['images'][:PREVIEW_SCENES]
    columns = min(6, len(scenes))
    rows = -(-len(scenes) // columns)
    sheet = Image.new('RGB', (columns * PREVIEW_CELL, rows * PREVIEW_CELL), 'white')
    for place, scene in enumerate(scenes):
        annotations = [a for a in document['annotations'] if a['image_id'] == scene['id']]
        with Image.open(folder / 'images/test' / scene['file_name']) as image:
            cell = draw_annotations(image, annotations)
        sheet.paste(cell, (place % columns * PREVIEW_CELL, place // columns * PREVIEW_CELL))
    return np.asarray(sheet)


def draw_annotations(image: Image.Image, annotations: list[dict]) -> Image.Image:
    """The scene, scaled to fit a cell of the contact sheet, with its annotations."""
    scale = (PREVIEW_CELL - 4) / max(image.size)
    size = round(scale * image.width), round(scale * image.height)
    image = image.resize(size)
    draw = ImageDraw.Draw(image)
    for annotation in annotations:
        colour = PALETTE[annotation['category_id'] - 1]
        mask = Image.fromarray(255 * coco_mask.decode(annotation['segmentation'])).resize(size)
        inside = np.asarray(mask) >= 128
        outline = Image.fromarray(inside & ~ndimage.binary_erosion(inside))
        image.paste(colour, mask=outline)
        x, y, width, height = (scale * length for length in annotation['bbox'])
        draw.rectangle((x, y, x + width, y + height), outline=colour)
        name = CLASSES[annotation['category_id'] - 1]
        draw.text((x + 3, y), name, colour, ImageFont.load_default(16), stroke_width=1, stroke_fill='black')
    return image


def write_image(path: Path, image: np.ndarray) -> None:
    """Write a JPEG or PNG file. Pillow brings its own codecs; OpenCV's PNG bytes depend on the machine's zlib."""
    buffer = io.BytesIO()
    codec, options = {'.jpg': ('JPEG', {'quality': JPEG_QUALITY}), '.png': ('PNG', {})}[path.suffix]
    Image.fromarray(image).save(buffer, codec, **options)
    write_bytes(path, buffer.getvalue())


def write_json(path: Path, document: dict, indent: int | None = None) -> None:
    write_bytes(path, (json.dumps(document, indent=indent) + '\n').encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; an OSError, such as a full disk, names it."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, f'{error.strerror}, so the unfinished data set was removed', str(path)) from None

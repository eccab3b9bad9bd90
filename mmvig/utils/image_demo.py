"""Predictions on images of the user's own, by a model of any of the three libraries: a picture and a record each."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image

from mmvig.engine.settings import SetupError

__all__ = [
    'IMAGE_SUFFIXES',
    'Predictor',
    'build_predictor',
    'find_images',
    'output_names',
    'predict_file',
    'read_image',
]

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')

# (image (H, W, 3) uint8 BGR, where the annotated picture goes) -> what was found; a label map is under 'label_map'
Predictor = Callable[[np.ndarray, Path], dict]


def find_images(source: str | os.PathLike) -> list[Path]:
    """A file as it is, or the images of a folder and its subfolders in order of name.

    Raises:
        FileNotFoundError: `source` is not there, or is a folder without images.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f'image: there is no file or folder {source} in {os.getcwd()}.')
    found = sorted(path for path in source.rglob('*') if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise FileNotFoundError(f'image: the folder {source} holds no image ({", ".join(IMAGE_SUFFIXES)}).')
    return found


def output_names(images: list[Path], source: str | os.PathLike) -> list[Path]:
    """Relative names of the results, without suffix; two images that differ in the suffix alone keep it."""
    root = Path(source) if Path(source).is_dir() else Path(source).parent
    names = [path.relative_to(root) for path in images]
    shared = Counter(name.with_suffix('') for name in names)
    return [
        name.with_suffix('') if shared[name.with_suffix('')] == 1 else name.with_name(name.name.replace('.', '_'))
        for name in names
    ]


def read_image(path: Path, max_pixels: int) -> np.ndarray:
    """The image (H, W, 3) uint8 BGR, turned upright, as the data pipelines of the three libraries read it.

    Raises:
        ValueError: it has more than `max_pixels` pixels; known from its header, before it is unpacked.
        OSError: it is damaged or no image.
    """
    import mmcv

    Image.MAX_IMAGE_PIXELS = max_pixels
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                pixels = image.width * image.height
                if pixels <= max_pixels:
                    image.load()  # OpenCV fills what is missing of a cut-off file with grey
        except Image.DecompressionBombError as error:
            raise ValueError(f'{error}; --max-pixels allows more') from error
    if pixels > max_pixels:
        raise ValueError(f'{pixels} pixels are more than {max_pixels}; --max-pixels allows more')
    pixels = mmcv.imread(path)
    if pixels is None:
        raise OSError('OpenCV cannot read this kind of image')
    return pixels


def predict_file(predictor: Predictor, path: Path, target: Path, max_pixels: int) -> dict:
    """Writes `target`.jpg, the annotated picture, `target`.json, the record, and for segmentation `target`_labels.png.

    The label map holds, for each pixel, the index of its class among the record's `classes`.
    """
    image = read_image(path, max_pixels)
    target.parent.mkdir(parents=True, exist_ok=True)
    found = predictor(image, target.with_name(f'{target.name}.jpg'))
    label_map = found.pop('label_map', None)
    if label_map is not None:
        Image.fromarray(label_map).save(target.with_name(f'{target.name}_labels.png'))
    record = dict(image=str(path), width=image.shape[1], height=image.shape[0], **found)
    target.with_name(f'{target.name}.json').write_text(f'{json.dumps(record)}\n')
    return record


def build_predictor(cfg: Config, checkpoint: str, device: str, score_thr: float) -> Predictor:
    """Loads the model of a config and says how to apply it.

    Args:
        cfg: its `default_scope` chooses the library.
        checkpoint: trained weights.
        device: 'cpu', 'cuda:0', ...
        score_thr: detections below this score, 0 to 1, are left out.

    Raises:
        SetupError: a `default_scope` other than mmdet, mmseg and mmpretrain.
    """
    scope = cfg.get('default_scope')
    if scope == 'mmdet':
        return _detector(cfg, checkpoint, device, score_thr)
    if scope == 'mmseg':
        return _segmentor(cfg, checkpoint, device)
    if scope == 'mmpretrain':
        return _classifier(cfg, checkpoint, device)
    raise SetupError(f"config: default_scope must be 'mmdet', 'mmseg' or 'mmpretrain', got {scope!r}.")


def _detector(cfg: Config, checkpoint: str, device: str, score_thr: float) -> Predictor:
    from mmdet.apis import inference_detector, init_detector
    from mmdet.visualization import DetLocalVisualizer
    from pycocotools import mask as rle

    model = init_detector(cfg, checkpoint, device=device)
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = model.dataset_meta
    names = model.dataset_meta['classes']

    def predict(image: np.ndarray, picture: Path) -> dict:
        sample = inference_detector(model, image).cpu()
        found = sample.pred_instances[sample.pred_instances.scores >= score_thr].numpy()
        sample.pred_instances = sample.pred_instances[sample.pred_instances.scores >= score_thr]
        visualizer.add_datasample('', image[..., ::-1], sample, draw_gt=False, pred_score_thr=-1, out_file=str(picture))
        detections = [
            dict(label=int(label), name=names[label], score=float(score), box=[round(float(x), 2) for x in box])
            for label, score, box in zip(found.labels, found.scores, found.bboxes)
        ]
        for detection, mask in zip(detections, found.get('masks', ())):
            encoded = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
            detection['mask'] = dict(size=encoded['size'], counts=encoded['counts'].decode())
        return dict(detections=detections)

    return predict


def _segmentor(cfg: Config, checkpoint: str, device: str) -> Predictor:
    from mmseg.apis import inference_model, init_model
    from mmseg.visualization import SegLocalVisualizer

    cfg.setdefault('test_pipeline', cfg.test_dataloader.dataset.pipeline)
    model = init_model(cfg, checkpoint, device=device)
    visualizer = SegLocalVisualizer(alpha=0.5)
    visualizer.dataset_meta = model.dataset_meta
    names = model.dataset_meta['classes']

    def predict(image: np.ndarray, picture: Path) -> dict:
        sample = inference_model(model, image).cpu()
        visualizer.add_datasample('', image[..., ::-1], sample, draw_gt=False, out_file=str(picture))
        labels = sample.pred_sem_seg.data[0].numpy().astype(np.uint8)
        counts = np.bincount(labels.ravel(), minlength=len(names)) / labels.size
        shares = {names[i]: round(float(counts[i]), 6) for i in counts.argsort()[::-1] if counts[i]}
        return dict(classes=list(names), shares=shares, label_map=labels)

    return predict


def _classifier(cfg: Config, checkpoint: str, device: str) -> Predictor:
    from mmpretrain.apis import ImageClassificationInferencer
    from mmpretrain.visualization import UniversalVisualizer

    inferencer = ImageClassificationInferencer(cfg, pretrained=checkpoint, device=device)
    visualizer = UniversalVisualizer()
    names = inferencer.classes

    def predict(image: np.ndarray, picture: Path) -> dict:
        (batch,) = inferencer.preprocess([image])
        (sample,) = inferencer.forward(batch)
        resize = 224 if min(image.shape[:2]) < 224 else None  # or the text would not fit
        visualizer.visualize_cls(
            image[..., ::-1], sample, classes=names, resize=resize, draw_gt=False, out_file=str(picture)
        )
        scores = sample.pred_score.cpu().numpy()
        return dict(
            top5=[
                dict(label=int(i), name=names[i] if names else str(i), score=float(scores[i]))
                for i in scores.argsort()[::-1][:5]
            ]
        )

    return predict

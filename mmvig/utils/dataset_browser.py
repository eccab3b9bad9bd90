"""What training sees: the images of a config's training set with their annotations, drawn by the library itself."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, init_default_scope
from torch import Tensor

from mmvig.engine.settings import SetupError

__all__ = ['MODES', 'build_training_set', 'draw_samples']

MODES = ('original', 'transformed')

# (image (H, W, 3) uint8 RGB, its data sample, the picture to write)
Draw = Callable[[np.ndarray, Any, Path], None]


def build_training_set(cfg: Config, mode: str) -> BaseDataset:
    """The training set of a config, its wrappers included.

    Args:
        cfg: its `default_scope` chooses the library: mmdet, mmseg or mmpretrain.
        mode: 'transformed' as training loads it; 'original' without the transforms between loading and packing.

    Raises:
        SetupError: another `default_scope`, no training set, or an unknown mode.
    """
    if cfg.get('default_scope') not in DRAWERS:
        raise SetupError(f'config: default_scope must be one of {list(DRAWERS)}, got {cfg.get("default_scope")!r}.')
    if mode not in MODES:
        raise SetupError(f'--mode must be one of {MODES}, got {mode!r}.')
    if not cfg.get('train_dataloader'):
        raise SetupError('config: it has no train_dataloader, so that there is nothing to train on and to draw.')
    init_default_scope(cfg.default_scope)
    dataset = cfg.train_dataloader.dataset
    return DATASETS.build(untransformed(dataset) if mode == 'original' else dataset)


def untransformed(dataset: dict) -> dict:
    """The config of a dataset with loading and packing alone; mixtures of several images become the images."""
    dataset = dict(dataset)
    if 'pipeline' in dataset and 'dataset' in dataset:
        return untransformed(dataset['dataset'])
    if 'dataset' in dataset:
        dataset['dataset'] = untransformed(dataset['dataset'])
    if 'datasets' in dataset:
        dataset['datasets'] = [untransformed(part) for part in dataset['datasets']]
    if 'pipeline' in dataset:
        dataset['pipeline'] = [step for step in dataset['pipeline'] if _name(step).startswith(('Load', 'Pack'))]
    return dataset


def _name(transform: dict) -> str:
    """The class of a transform without its scope; configs may hold the class itself."""
    kind = transform['type']
    return kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__


def draw_samples(dataset: BaseDataset, scope: str, number: int, out_dir: Path) -> Iterator[Path]:
    """Draws the first `number` samples into `out_dir`, one picture each, and yields its path.

    Args:
        dataset: from `build_training_set`.
        scope: the library that it is of.
        number: samples to draw, if there are as many.
        out_dir: a folder, made if need be. A picture's name is the sample's index and the name of its image.

    Raises:
        SetupError: the samples hold no single image each, as where a model learns from several views of one.
    """
    draw = DRAWERS[scope](dataset.metainfo)
    for index in range(min(number, len(dataset))):
        packed = dataset[index]
        if not isinstance(packed.get('inputs'), Tensor):
            raise SetupError(
                "config: train_dataloader.dataset.pipeline must end in its library's packing of one image, "
                f'got inputs of type {type(packed.get("inputs")).__name__}.'
            )
        sample = packed['data_samples']
        image = packed['inputs'].permute(1, 2, 0).numpy()[..., ::-1]  # (H, W, 3), BGR to RGB
        image = np.ascontiguousarray(image.clip(0, 255).astype(np.uint8))
        picture = out_dir / f'{index:06d}_{Path(sample.get("img_path") or "").stem}.jpg'
        draw(image, sample, picture)
        yield picture


def _detection(metainfo: dict) -> Draw:
    from mmdet.structures.bbox import BaseBoxes
    from mmdet.visualization import DetLocalVisualizer

    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = metainfo

    def draw(image: np.ndarray, sample: Any, picture: Path) -> None:
        instances = sample.get('gt_instances')
        if instances is not None and isinstance(instances.get('bboxes'), BaseBoxes):
            instances.bboxes = instances.bboxes.tensor.numpy()
        visualizer.add_datasample('', image, sample, draw_pred=False, out_file=str(picture))

    return draw


def _segmentation(metainfo: dict) -> Draw:
    from mmseg.visualization import SegLocalVisualizer

    visualizer = SegLocalVisualizer(alpha=0.5)
    visualizer.dataset_meta = metainfo

    def draw(image: np.ndarray, sample: Any, picture: Path) -> None:
        visualizer.add_datasample('', image, sample, draw_pred=False, out_file=str(picture))

    return draw


def _classification(metainfo: dict) -> Draw:
    from mmpretrain.visualization import UniversalVisualizer

    visualizer = UniversalVisualizer()

    def draw(image: np.ndarray, sample: Any, picture: Path) -> None:
        resize = 224 if min(image.shape[:2]) < 224 else None  # or the text would not fit
        classes = metainfo.get('classes')
        visualizer.visualize_cls(image, sample, classes, resize=resize, draw_pred=False, out_file=str(picture))

    return draw


DRAWERS = dict(mmdet=_detection, mmpretrain=_classification, mmseg=_segmentation)

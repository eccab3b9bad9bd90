"""Models as files that run without this package: `torch.export` programs and ONNX graphs, for images of any size.

Needs `pip install "mmvig[export]"` for ONNX. Limits, stated where they arise:

- Shapes: height and width are free, the batch is the example's. ViG's position embedding is resized in the graph.
- The operator is exported in its chunk-parallel PyTorch form, always in whole groups of 512 tokens, to which small maps
  are padded. The Triton kernels are not part of the file.
- Weights and images in float32.
- Of an mmseg model the logits (B, classes, H, W) are exported, of an mmpretrain model the logits (B, classes), and of
  anything else its maps; detectors' post-processing, which depends on what is found, is not: export their backbone.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes
from torch.utils._pytree import tree_leaves

__all__ = ['ExportError', 'build_exportable', 'export_program', 'save_onnx', 'save_program', 'worst_difference']


class ExportError(ValueError):
    """A model that cannot be exported as it was asked for; the message says what can."""


class Logits(nn.Module):
    """An mmseg model from normalised images (B, 3, H, W) to logits (B, classes, H, W)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        logits = self.model(image, mode='tensor')
        return F.interpolate(logits, image.shape[2:], mode='bilinear', align_corners=self.model.align_corners)


class Maps(nn.Module):
    """A backbone and, if there is one, its neck, from normalised images to the tuple of maps."""

    def __init__(self, backbone: nn.Module, neck: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone, self.neck = backbone, neck

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        maps = self.backbone(image)
        return maps if self.neck is None else tuple(self.neck(maps))


class Scores(nn.Module):
    """An mmpretrain classifier from normalised images to logits (B, classes)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image, mode='tensor')


def build_exportable(cfg, checkpoint: str | os.PathLike | None, part: str) -> nn.Module:
    """The model of a config, on the CPU and in eval mode, as a module from images to tensors.

    Args:
        cfg: an MMEngine config with `model` and `default_scope`.
        checkpoint: its weights; None takes fresh ones.
        part: 'model' (of mmseg and mmpretrain), 'neck' (backbone and neck) or 'backbone'.

    Raises:
        ExportError: `part` is not to be had of this config.
    """
    from mmengine.registry import MODELS, init_default_scope
    from mmengine.runner import load_checkpoint

    scope = cfg.get('default_scope')
    wrappers = dict(mmseg=Logits, mmpretrain=Scores)
    if part == 'model' and scope not in wrappers:
        raise ExportError(f"part='model' is for mmseg and mmpretrain, and this config is of {scope}: take 'neck'")
    init_default_scope(scope)
    settings = cfg.model.copy()
    if 'data_preprocessor' in cfg:
        settings.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(settings)
    if checkpoint is not None:
        load_checkpoint(model, str(checkpoint), map_location='cpu')
    model.eval()
    if part == 'model':
        return wrappers[scope](model).eval()
    neck = getattr(model, 'neck', None) if part == 'neck' else None
    if part == 'neck' and neck is None:
        raise ExportError("part='neck': this model has none; take 'backbone'")
    return Maps(model.backbone, neck).eval()


def export_program(model: nn.Module, size: Sequence[int] = (224, 256), batch: int = 1) -> ExportedProgram:
    """Traces a module from images (B, 3, H, W) to tensors, with H and W free.

    `size`: height and width of the image that is traced with. They only have to differ, lest one follow the other.
    """
    height, width = size
    if height == width:
        raise ExportError(f'size={tuple(size)} must be of different sides, so that neither is taken for the other')
    image = torch.zeros(batch, 3, height, width)
    # Without this a graph for more than one group of tokens would refuse images that have one.
    with torch.no_grad(), symbolic_shapes.patch(backed_size_oblivious=True):
        return torch.export.export(model, (image,), dynamic_shapes=({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},), strict=False)


def save_program(program: ExportedProgram, path: Path) -> None:
    """Writes a .pt2 file: `torch.export.load(path).module()(image)`."""
    torch.export.save(program, path)


def save_onnx(program: ExportedProgram, path: Path) -> None:
    """Writes an .onnx file with its weights inside (up to 2 GB): input `image`, outputs `output_0`, `output_1`, ..."""
    if any(node.target in POOLS for node in program.graph.nodes):  # another trace, which most models can do without
        with symbolic_shapes.patch(backed_size_oblivious=True):
            program = program.run_decompositions(POOLS)
    names = [f'output_{i}' for i in range(len(program.graph_signature.user_outputs))]
    graph = torch.onnx.export(program, dynamo=True, input_names=['image'], output_names=names, verbose=False)
    graph.save(path, external_data=False)


def average_pool(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """`adaptive_avg_pool2d` as a product with one matrix (side, bins) an axis, for maps of any size."""
    for axis, bins in zip((-2, -1), output_size):
        side = x.shape[axis]
        edges = torch.arange(bins + 1, device=x.device) * side
        places = torch.arange(side, device=x.device)[:, None]
        inside = ((edges[:-1] // bins <= places) & (places < (edges[1:] + bins - 1) // bins)).to(x.dtype)
        x = (x.transpose(axis, -1) @ (inside / inside.sum(0))).transpose(axis, -1)
    return x


# For ONNX: torch's own form of this pool is one of several, chosen by the traced size, and reads outside smaller maps.
POOLS = dict.fromkeys(
    (torch.ops.aten.adaptive_avg_pool2d.default, torch.ops.aten._adaptive_avg_pool2d.default), average_pool
)


def runner_of(path: Path) -> Callable[[Tensor], list[Tensor]]:
    """From an image to the list of outputs, by a file that was written here: .pt2 in torch, .onnx in onnxruntime."""
    if path.suffix == '.pt2':
        module = torch.export.load(path).module()
        return lambda image: tree_leaves(module(image))
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda image: [torch.from_numpy(out) for out in session.run(None, {'image': image.numpy()})]


@torch.no_grad()
def worst_difference(path: Path, model: nn.Module, sizes: Sequence[tuple[int, int]], batch: int = 1) -> float:
    """The largest |file - model| on noise of these sizes, as a part of the largest value of the same output."""
    run, worst = runner_of(path), 0.0
    for height, width in sizes:
        image = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height))
        for got, want in zip(run(image), tree_leaves(model(image)), strict=True):
            worst = max(worst, ((got - want).abs().max() / want.abs().max()).item())
    return worst

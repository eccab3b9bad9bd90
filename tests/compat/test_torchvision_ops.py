"""The stand-in's operators, through mmcv's public functions, against loops in float64 written here."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import mmvig  # noqa: F401  serves mmcv._ext
from mmvig.compat import torchvision_ops as ops

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]
LOW = [torch.float16, torch.bfloat16]
double = torch.float64


def random(*shape: int, seed: int = 0, **kwargs) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=double, **kwargs)


def random_boxes(n: int, size: float = 40.0, seed: int = 0) -> Tensor:
    corners = torch.rand(n, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=double) * size
    return torch.cat([corners.amin(1), corners.amax(1) + 1], 1)


# Suppression of boxes


def iou(a: Tensor, b: Tensor, offset: int) -> float:
    (ax, ay, au, av), (bx, by, bu, bv) = a.tolist(), b.tolist()
    width = max(0.0, min(au, bu) - max(ax, bx) + offset)
    height = max(0.0, min(av, bv) - max(ay, by) + offset)
    both = (au - ax + offset) * (av - ay + offset) + (bu - bx + offset) * (bv - by + offset)
    return width * height / (both - width * height)


def plain_nms(boxes: Tensor, scores: Tensor, threshold: float, offset: int) -> list[int]:
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(boxes[j], boxes[i], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


def plain_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset) -> list[tuple[int, float]]:
    left, taken = dict(enumerate(scores.tolist())), []
    while left:
        best = max(left, key=left.get)
        taken.append((best, left.pop(best)))
        for i in list(left):
            u = iou(boxes[best], boxes[i], offset)
            if method == 'gaussian':
                left[i] *= math.exp(-u * u / sigma)
            elif u >= threshold:
                left[i] *= 1 - u if method == 'linear' else 0
            if left[i] < min_score:
                del left[i]
    return taken


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('offset', [0, 1])
def test_nms(offset: int, device: str):
    from mmcv.ops import nms

    boxes, scores = random_boxes(60).float(), torch.rand(60, generator=torch.Generator().manual_seed(1))
    dets, kept = nms(boxes.to(device), scores.to(device), 0.3, offset=offset)
    assert kept.tolist() == plain_nms(boxes, scores, 0.3, offset)
    assert 5 < len(kept) < 60
    torch.testing.assert_close(dets.cpu(), torch.cat([boxes, scores[:, None]], 1)[kept.cpu()])


def test_nms_offset_decides():
    """Boxes one pixel apart overlap only where a box from x1 to x2 is x2 - x1 + 1 wide."""
    boxes, scores = torch.tensor([[0.0, 0, 3, 9], [3.5, 0, 7, 9]]), torch.tensor([0.9, 0.8])
    assert len(ops.nms(boxes, scores, iou_threshold=0.01, offset=0)) == 2
    assert len(ops.nms(boxes, scores, iou_threshold=0.01, offset=1)) == 1


def test_nms_limits():
    from mmcv.ops import nms

    boxes, scores = random_boxes(30).float(), torch.linspace(0.05, 0.95, 30)
    _, kept = nms(boxes, scores, 0.5, score_threshold=0.5, max_num=3)
    assert kept.tolist() == [i for i in plain_nms(boxes, scores, 0.5, 0) if scores[i] > 0.5][:3]
    assert len(nms(boxes[:0], scores[:0], 0.5)[1]) == 0


def test_batched_nms_keeps_classes_apart():
    from mmcv.ops import batched_nms

    boxes, scores = random_boxes(40).float(), torch.rand(40, generator=torch.Generator().manual_seed(2))
    classes = torch.arange(40) % 3
    _, kept = batched_nms(boxes, scores, classes, dict(type='nms', iou_threshold=0.3))
    expected = []
    for label in range(3):
        mine = (classes == label).nonzero()[:, 0]
        expected += mine[plain_nms(boxes[mine], scores[mine], 0.3, 0)].tolist()
    assert sorted(kept.tolist()) == sorted(expected)
    assert scores[kept].diff().le(0).all()


@pytest.mark.parametrize('dtype', LOW)
@pytest.mark.parametrize('device', DEVICES)
def test_batched_nms_half(dtype: torch.dtype, device: str):
    """mmcv moves each class by the size of the image: 80 of them leave the range of float16."""
    from mmcv.ops import batched_nms

    boxes, scores, classes = (
        random_boxes(160, size=1000).to(dtype),
        torch.arange(160).to(dtype) / 256,
        torch.arange(160) % 80,
    )
    boxes += boxes.new_tensor([0, 0, 32, 32])
    boxes[80:] = boxes[:80] + 4  # each class has two boxes, nearly the same
    config = dict(type='nms', iou_threshold=0.513)
    dets, kept = batched_nms(boxes.to(device), scores.to(device), classes.to(device), config)
    expected = []
    for label in range(80):
        mine = (classes == label).nonzero()[:, 0]
        expected += mine[plain_nms(boxes[mine].double(), scores[mine].double(), 0.513, 0)].tolist()
    assert sorted(kept.tolist()) == sorted(expected) and 80 <= len(kept) < 160
    assert dets.dtype == dtype and torch.equal(dets[:, :4].cpu(), boxes[kept.cpu()])


@pytest.mark.parametrize('dtype', LOW)
@pytest.mark.parametrize('device', DEVICES)
def test_nms_half(dtype: torch.dtype, device: str):
    boxes, scores = random_boxes(40).to(dtype), torch.arange(40).to(dtype) / 64  # exact, no ties
    kept = ops.nms(boxes.to(device), scores.to(device), 0.4, 0)
    assert kept.tolist() == plain_nms(boxes.double(), scores.double(), 0.4, 0)


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
def test_soft_nms(method: str, offset: int):
    from mmcv.ops import soft_nms

    boxes, scores = random_boxes(40), torch.rand(40, generator=torch.Generator().manual_seed(4), dtype=double)
    dets, kept = soft_nms(boxes, scores, 0.3, sigma=0.4, min_score=0.02, method=method, offset=offset)
    expected = plain_soft_nms(boxes, scores, 0.3, 0.4, 0.02, method, offset)
    assert kept.tolist() == [i for i, _ in expected]
    torch.testing.assert_close(dets[:, :4], boxes[kept])
    torch.testing.assert_close(dets[:, 4], torch.tensor([score for _, score in expected], dtype=double))
    assert 1 < len(kept) < 40


def test_soft_nms_keeps_the_best_box_below_the_limit():
    boxes, dets = random_boxes(3), torch.zeros(3, 5, dtype=double)
    kept = ops.softnms(boxes, boxes.new_tensor([0.1, 0.3, 0.2]), dets, 0.3, 0.5, 0.9, method=1, offset=0)
    assert kept.tolist() == [1]
    assert len(ops.softnms(boxes[:0], boxes[:0, 0], dets[:0], 0.3, 0.5, 0.9, method=1, offset=0)) == 0


def test_soft_nms_of_boxes_without_area():
    """The documented example of mmcv: five of six stay, the IoU of empty boxes being no number."""
    from mmcv.ops import soft_nms

    boxes = np.array([[4, 3, 5, 3], [4, 3, 5, 4], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1]], np.float32)
    scores = np.array([0.9, 0.9, 0.5, 0.5, 0.4, 0.0], np.float32)
    dets, kept = soft_nms(boxes, scores, 0.6, sigma=0.5)
    assert isinstance(dets, np.ndarray) and len(dets) == len(kept) == 5


def test_soft_nms_half():
    from mmcv.ops import soft_nms

    boxes, scores = random_boxes(10).half(), torch.linspace(0.1, 1, 10).half()
    dets, kept = soft_nms(boxes, scores, method='linear')
    expected = plain_soft_nms(boxes.double(), scores.double(), 0.3, 0.5, 1e-3, 'linear', 0)
    assert kept.tolist() == [i for i, _ in expected]
    torch.testing.assert_close(dets[:, 4], torch.tensor([score for _, score in expected]).half())


def test_nms_match():
    from mmcv.ops import nms_match

    boxes, scores = random_boxes(30), torch.rand(30, generator=torch.Generator().manual_seed(5), dtype=double)
    groups = [group.tolist() for group in nms_match(torch.cat([boxes, scores[:, None]], 1), 0.3)]
    left, expected = scores.argsort(descending=True).tolist(), []
    while left:
        expected.append([i for i in left if i == left[0] or iou(boxes[left[0]], boxes[i], 0) >= 0.3])
        left = [i for i in left if i not in expected[-1]]
    assert groups == expected
    assert any(len(group) > 1 for group in groups)


# Pooling of regions

ROIS = torch.tensor(
    [[0, 1.3, 2.1, 9.7, 11.2], [1, 0.0, 0.0, 12.0, 4.6], [1, 5.2, 6.1, 5.9, 6.4], [0, -3.0, -2.0, 30.0, 25.0]],
    dtype=double,
)


def sample(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear sample (C,) of an image (C, H, W), its border stretched by a pixel and zero beyond."""
    height, width = image.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return image.new_zeros(len(image))
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    fy, fx = y - top, x - left
    upper = image[:, top, left] * (1 - fx) + image[:, top, right] * fx
    lower = image[:, bottom, left] * (1 - fx) + image[:, bottom, right] * fx
    return upper * (1 - fy) + lower * fy


def plain_roi_align(input, rois, size, scale, ratio, mode, aligned) -> Tensor:
    output = []
    for image, *corners in rois.tolist():
        x1, y1, x2, y2 = (c * scale - (0.5 if aligned else 0) for c in corners)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        nx = ratio or math.ceil(width / size)
        ny = ratio or math.ceil(height / size)
        for i in range(size):
            for j in range(size):
                points = [
                    sample(
                        input[int(image)],
                        y1 + (i + (p + 0.5) / ny) * height / size,
                        x1 + (j + (q + 0.5) / nx) * width / size,
                    )
                    for p in range(ny)
                    for q in range(nx)
                ]
                stacked = torch.stack(points)
                output.append(stacked.mean(0) if mode == 'avg' else stacked.amax(0))
    return torch.stack(output).view(len(rois), size, size, -1).permute(0, 3, 1, 2)


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, random(*output.shape, 1, seed=9)[..., 0].to(output))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align(mode: str, ratio: int, aligned: bool, device: str):
    from mmcv.ops import RoIAlign

    input = random(2, 3, 9, 13, requires_grad=True)
    expected = plain_roi_align(input, ROIS, 3, 0.7, ratio, mode, aligned)
    copy = input.detach().to(device).requires_grad_()
    output = RoIAlign(3, spatial_scale=0.7, sampling_ratio=ratio, pool_mode=mode, aligned=aligned)(
        copy, ROIS.to(device)
    )
    torch.testing.assert_close(output.cpu(), expected)
    torch.testing.assert_close(gradients(output, copy)[0].cpu(), gradients(expected, input)[0])


@pytest.mark.parametrize('device', DEVICES)
def test_roi_align_of_an_empty_region_is_zero(device: str):
    from mmcv.ops import roi_align

    input = torch.randn(1, 2, 8, 8, device=device, requires_grad=True)
    rois = torch.tensor([[0, 3.0, 3, 3, 3]], device=device)
    output = roi_align(input, rois, 2, 1.0, 0, 'max', True)
    output.sum().backward()
    assert not output.any() and not input.grad.any()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', LOW)
@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_half(mode: str, dtype: torch.dtype, device: str):
    """Computed in float32 and rounded once, which a sum in half precision would not be."""
    from mmcv.ops import roi_align

    input = random(2, 3, 9, 13).to(dtype).to(device).requires_grad_()
    wide = input.detach().float().requires_grad_()
    rois = ROIS.to(dtype).to(device)
    output, expected = (roi_align(x, r, 3, 0.5, 0, mode, True) for x, r in ((input, rois), (wide, rois.float())))
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected.to(dtype), rtol=0, atol=0)
    if mode == 'avg':  # the place of a maximum is stored in the input's precision, as by mmcv
        grad = torch.ones_like(output)
        theirs = torch.autograd.grad(expected, wide, grad.float())[0]
        torch.testing.assert_close(torch.autograd.grad(output, input, grad)[0], theirs.to(dtype), rtol=0, atol=1e-6)


def plain_roi_pool(input: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    height, width = input.shape[2:]
    output = []
    for image, x1, y1, x2, y2 in rois.tolist():
        x, y, w, h = x1 * scale, y1 * scale, (x2 + 1 - x1) * scale, (y2 + 1 - y1) * scale
        for i in range(size):
            for j in range(size):
                top, bottom = math.floor(y + i * h / size), math.ceil(y + (i + 1) * h / size)
                left, right = math.floor(x + j * w / size), math.ceil(x + (j + 1) * w / size)
                window = input[int(image), :, max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
                empty = w <= 0 or h <= 0 or window[0].numel() == 0
                output.append(window.new_zeros(len(window)) if empty else window.amax((1, 2)))
    return torch.stack(output).view(len(rois), size, size, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize('device', DEVICES)
def test_roi_pool(device: str):
    from mmcv.ops import RoIPool

    rois = torch.cat([ROIS, torch.tensor([[0, 40.0, 40, 50, 50], [1, 8.0, 8, 2, 2]], dtype=double)])
    input = random(2, 3, 9, 13, requires_grad=True)
    expected = plain_roi_pool(input, rois, 3, 0.7)
    copy = input.detach().to(device).requires_grad_()
    output = RoIPool(3, spatial_scale=0.7)(copy, rois.to(device))
    torch.testing.assert_close(output.cpu(), expected)
    torch.testing.assert_close(gradients(output, copy)[0].cpu(), gradients(expected, input)[0])
    assert not output[4:].any()


@pytest.mark.parametrize('dtype', LOW)
def test_roi_pool_half(dtype: torch.dtype):
    from mmcv.ops import roi_pool

    input = random(2, 3, 9, 13).to(dtype).requires_grad_()
    output = roi_pool(input, ROIS.to(dtype), 3, 0.5)
    expected = plain_roi_pool(input.detach().double(), ROIS.to(dtype).double(), 3, 0.5)
    torch.testing.assert_close(output, expected.to(dtype), rtol=0, atol=0)
    output.float().sum().backward()
    assert input.grad.float().sum() == output.numel()


# Focal loss


def plain_focal_loss(x: Tensor, target: list[int], weight: Tensor | None, gamma: float, alpha: float) -> Tensor:
    rows = []
    for n, t in enumerate(target):
        p = x[n].sigmoid()
        row = -(1 - alpha) * p**gamma * (1 - p).log()
        if 0 <= t < x.size(1):
            hit = torch.arange(x.size(1)) == t
            row = torch.where(hit, -alpha * (1 - p) ** gamma * p.log(), row)
            row = row if weight is None else row * weight[t]
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (0.5, 0.6)])
@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
def test_sigmoid_focal_loss(reduction: str, gamma: float, alpha: float, weighted: bool, device: str):
    from mmcv.ops import SigmoidFocalLoss

    x, target = random(7, 4, requires_grad=True), [0, 3, 1, 4, 2, 4, 0]  # 4 is background
    weight = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=double) if weighted else None
    expected = plain_focal_loss(x, target, weight, gamma, alpha)
    expected = dict(none=expected, sum=expected.sum(), mean=expected.sum() / 7)[reduction]
    copy = x.detach().to(device).requires_grad_()
    moved = None if weight is None else weight.to(device)
    output = SigmoidFocalLoss(gamma, alpha, moved, reduction)(copy, torch.tensor(target, device=device))
    torch.testing.assert_close(output.cpu(), expected)
    torch.testing.assert_close(gradients(output, copy)[0].cpu(), gradients(expected, x)[0])


def test_sigmoid_focal_loss_is_finite_far_out():
    from mmcv.ops import sigmoid_focal_loss

    x = torch.tensor([[-200.0, 200.0, 0.0]], requires_grad=True)
    for target in (0, 1, 3):
        loss = sigmoid_focal_loss(x, torch.tensor([target]), 2.0, 0.25, None, 'sum')
        assert loss.isfinite() and torch.autograd.grad(loss, x)[0].isfinite().all()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', LOW)
def test_sigmoid_focal_loss_half(dtype: torch.dtype, device: str):
    from mmcv.ops import sigmoid_focal_loss

    x, target = random(7, 4).to(dtype).to(device).requires_grad_(), torch.tensor([0, 3, 1, 4, 2, 4, 0], device=device)
    output = sigmoid_focal_loss(x, target, 2.0, 0.25, None, 'none')
    expected = plain_focal_loss(x.detach().double().cpu(), target.tolist(), None, 2.0, 0.25)
    assert output.dtype == dtype
    torch.testing.assert_close(
        output.cpu(), expected.to(dtype), rtol=1e-3 if dtype == torch.float16 else 1e-2, atol=1e-6
    )


# Deformable convolution


def plain_deform_conv(input, offset, weight, mask, bias, stride, padding, dilation, groups, deform_groups) -> Tensor:
    channels, (kh, kw) = input.size(1), weight.shape[2:]
    height, width = offset.shape[2:]
    output = []
    for b in range(len(input)):
        padded = torch.nn.functional.pad(input[b], (1, 1, 1, 1))  # zeros, reached by less than a pixel
        pixels = []
        for i in range(height):
            for j in range(width):
                taps = []
                for tap in range(kh * kw):
                    columns = []
                    for g in range(deform_groups):
                        at = g * kh * kw + tap
                        y = i * stride - padding + (tap // kw) * dilation + offset[b, 2 * at, i, j]
                        x = j * stride - padding + (tap % kw) * dilation + offset[b, 2 * at + 1, i, j]
                        size = channels // deform_groups
                        value = zero_padded_sample(padded[g * size : (g + 1) * size], y + 1, x + 1)
                        columns.append(value if mask is None else value * mask[b, at, i, j])
                    taps.append(torch.cat(columns))
                column = torch.stack(taps, 1).view(groups, -1, kh * kw)  # (groups, C / groups, taps)
                kernel = weight.flatten(2).view(groups, -1, channels // groups, kh * kw)
                pixels.append(torch.einsum('goct,gct->go', kernel, column).flatten())
        output.append(torch.stack(pixels, 1).view(-1, height, width))
    result = torch.stack(output)
    return result if bias is None else result + bias[:, None, None]


def by_address(image: Tensor, shape: torch.Size) -> Tensor:
    """Of an image (C, H, W) the maps (C, *shape) whose numbers would lie where its first ones do."""
    height, width = shape
    flat = image.reshape(-1)
    rows = [flat[(c * height + y) * width :][:width] for c in range(len(image)) for y in range(height)]
    return torch.stack(rows).view(-1, height, width)


def zero_padded_sample(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    height, width = image.shape[1:]
    if not (0 < y < height - 1 and 0 < x < width - 1):
        return image.new_zeros(len(image))
    top, left = int(y), int(x)
    fy, fx = y - top, x - left
    upper = image[:, top, left] * (1 - fx) + image[:, top, left + 1] * fx
    lower = image[:, top + 1, left] * (1 - fx) + image[:, top + 1, left + 1] * fx
    return upper * (1 - fy) + lower * fy


GEOMETRIES = [
    pytest.param(dict(stride=1, padding=1, dilation=1, groups=1, deform_groups=1), id='plain'),
    pytest.param(dict(stride=2, padding=2, dilation=2, groups=2, deform_groups=2), id='grouped'),
]


def deform_inputs(geometry: dict, masked: bool) -> dict[str, Tensor]:
    """Two images of 6 x 7 with 4 channels, 6 filters of 3 x 2, offsets of up to some pixels."""
    taps = geometry['deform_groups'] * 6
    reach = [geometry['dilation'] * (k - 1) for k in (3, 2)]
    size = [(n + 2 * geometry['padding'] - r - 1) // geometry['stride'] + 1 for n, r in zip((6, 7), reach, strict=True)]
    shapes = dict(input=(2, 4, 6, 7), offset=(2, 2 * taps, *size), weight=(6, 4 // geometry['groups'], 3, 2))
    if masked:
        shapes |= dict(mask=(2, taps, *size), bias=(6,))
    return {name: random(*shape, seed=i).requires_grad_() for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_deform_conv(geometry: dict, device: str):
    from mmcv.ops import deform_conv2d

    inputs = deform_inputs(geometry, masked=False)
    expected = plain_deform_conv(**inputs, mask=None, bias=None, **geometry)
    copies = [tensor.detach().to(device).requires_grad_() for tensor in inputs.values()]
    output = deform_conv2d(*copies, *geometry.values())
    torch.testing.assert_close(output.cpu(), expected)
    for ours, theirs in zip(gradients(output, *copies), gradients(expected, *inputs.values()), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('biased', [True, False])
@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_modulated_deform_conv(geometry: dict, biased: bool, device: str):
    from mmcv.ops import modulated_deform_conv2d

    inputs = deform_inputs(geometry, masked=True)
    order = ['input', 'offset', 'mask', 'weight'] + ['bias'] * biased
    expected = plain_deform_conv(**(inputs if biased else inputs | dict(bias=None)), **geometry)
    copies = {name: inputs[name].detach().to(device).requires_grad_() for name in order}
    output = modulated_deform_conv2d(*copies.values(), *([] if biased else [None]), *geometry.values())
    torch.testing.assert_close(output.cpu(), expected)
    theirs = gradients(expected, *(inputs[name] for name in order))
    for ours, reference in zip(gradients(output, *copies.values()), theirs, strict=True):
        torch.testing.assert_close(ours.cpu(), reference)


@pytest.mark.parametrize('device', DEVICES)
def test_modulated_deform_conv_reads_larger_maps_by_address(device: str):
    """As mmcv's kernels do, which multiply out addresses by the output's size: DyHead's come from a finer level."""
    from mmcv.ops import modulated_deform_conv2d

    geometry = GEOMETRIES[1].values[0]
    inputs = deform_inputs(geometry, masked=True)
    shape = inputs['mask'].shape[2:]
    both = random(2, 12 * 3, 2 * shape[0] + 1, 2 * shape[1], seed=9).requires_grad_()
    fine = dict(zip(('offset', 'mask'), both.split([24, 12], 1)))  # slices, as DyHead's
    read = {name: torch.stack([by_address(image, shape) for image in maps]) for name, maps in fine.items()}
    expected = plain_deform_conv(**(inputs | read), **geometry)
    copy = both.detach().to(device).requires_grad_()
    others = [inputs[name].detach().to(device).requires_grad_() for name in ('input', 'weight', 'bias')]
    output = modulated_deform_conv2d(others[0], *copy.split([24, 12], 1), *others[1:], *geometry.values())
    torch.testing.assert_close(output.cpu(), expected)
    theirs = gradients(expected, both, *(inputs[name] for name in ('input', 'weight', 'bias')))
    for ours, reference in zip(gradients(output, copy, *others), theirs, strict=True):
        torch.testing.assert_close(ours.cpu(), reference)


@pytest.mark.parametrize('name', ['DeformConv2dPack', 'ModulatedDeformConv2dPack'])
def test_deform_conv_packs_start_as_convolutions(name: str):
    """Offsets start at zero (and v2's factors at one half), so that each pack is a convolution before training."""
    import mmcv.ops

    layer = getattr(mmcv.ops, name)(4, 6, 3, padding=1, bias=name.startswith('Mod'))
    x = torch.randn(2, 4, 8, 9)
    factor = 0.5 if name.startswith('Mod') else 1.0
    bias = layer.bias[:, None, None] if name.startswith('Mod') else 0
    expected = torch.nn.functional.conv2d(x, layer.weight, padding=1) * factor + bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())


def test_deform_conv_backward_parameters_accumulates_and_scales():
    inputs = {name: tensor.detach() for name, tensor in deform_inputs(GEOMETRIES[0].values[0], False).items()}
    empty = torch.empty(0)
    rest = dict(kW=2, kH=3, dW=1, dH=1, padW=1, padH=1, dilationW=1, dilationH=1, group=1, deformable_group=1)
    grad_output = random(2, 6, 6, 8)
    once, twice = torch.zeros(6, 4, 3, 2, dtype=double), torch.ones(6, 4, 3, 2, dtype=double)
    for target, scale in ((once, 1), (twice, 2)):
        ops.deform_conv_backward_parameters(
            inputs['input'], inputs['offset'], grad_output, target, empty, empty, **rest, scale=scale, im2col_step=2
        )
    torch.testing.assert_close(twice, 1 + 2 * once)
    assert once.any()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', LOW)
@pytest.mark.parametrize('version', ['v1', 'v2'])
def test_deform_conv_half(version: str, dtype: torch.dtype, device: str):
    """Equal to the float32 result of the same, rounded inputs, but for the last rounding."""
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    geometry = GEOMETRIES[0].values[0]
    inputs = deform_inputs(geometry, masked=version == 'v2')
    order = ['input', 'offset', 'weight'] if version == 'v1' else ['input', 'offset', 'mask', 'weight', 'bias']
    call = deform_conv2d if version == 'v1' else modulated_deform_conv2d
    low = [inputs[name].detach().to(device, dtype).requires_grad_() for name in order]
    wide = [tensor.detach().float().requires_grad_() for tensor in low]
    output, expected = call(*low, *geometry.values()), call(*wide, *geometry.values())
    assert output.dtype == dtype
    tolerance = dict(rtol=2 ** (-10 if dtype == torch.float16 else -7), atol=1e-3)
    torch.testing.assert_close(output.float(), expected, **tolerance)
    grad = torch.ones_like(output)
    ours, theirs = torch.autograd.grad(output, low, grad), torch.autograd.grad(expected, wide, grad.float())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b, **tolerance)


# Multi-scale deformable attention

SHAPES = [(5, 4), (3, 2)]


def attention_inputs() -> list[Tensor]:
    """value (2, 26, 3, 4), sampling locations (2, 5, 3, 2, 2, 2) partly outside, weights (2, 5, 3, 2, 2)."""
    value = random(2, sum(h * w for h, w in SHAPES), 3, 4, seed=1)
    locations = random(2, 5, 3, len(SHAPES), 2, 2, seed=2).sigmoid() * 1.3 - 0.15
    weights = random(2, 5, 3, len(SHAPES), 2, seed=3).flatten(3).softmax(-1).view(2, 5, 3, len(SHAPES), 2)
    return [tensor.requires_grad_() for tensor in (value, locations, weights)]


def plain_attention(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    batch, queries, heads = weights.shape[:3]
    output, start = value.new_zeros(batch, queries, heads, value.size(-1)), 0
    for level, (height, width) in enumerate(SHAPES):
        maps = value[:, start : start + height * width].unflatten(1, (height, width)).permute(0, 3, 4, 1, 2)
        start += height * width
        for b in range(batch):
            for q in range(queries):
                for h in range(heads):
                    for point in range(2):
                        x, y = locations[b, q, h, level, point] * locations.new_tensor([width, height]) - 0.5
                        padded = torch.nn.functional.pad(maps[b, h], (1, 1, 1, 1))
                        part = zero_padded_sample(padded, y + 1, x + 1) * weights[b, q, h, level, point]
                        output = output.index_put(tuple(torch.tensor(i) for i in (b, q, h)), part, accumulate=True)
    return output.flatten(2)


@pytest.mark.parametrize('device', DEVICES)
def test_multi_scale_deformable_attention(device: str):
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    inputs = attention_inputs()
    expected = plain_attention(*inputs)
    value, locations, weights = copies = [tensor.detach().to(device).requires_grad_() for tensor in inputs]
    shapes, starts = torch.tensor(SHAPES, device=device), torch.tensor([0, 20], device=device)
    output = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)
    torch.testing.assert_close(output.cpu(), expected)
    for ours, theirs in zip(gradients(output, *copies), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', LOW)
def test_multi_scale_deformable_attention_half(dtype: torch.dtype, device: str):
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    low = [tensor.detach().to(device, dtype).requires_grad_() for tensor in attention_inputs()]
    wide = [tensor.detach().double().cpu().requires_grad_() for tensor in low]
    shapes, starts = torch.tensor(SHAPES, device=device), torch.tensor([0, 20], device=device)
    output = MultiScaleDeformableAttnFunction.apply(low[0], shapes, starts, low[1], low[2], 64)
    expected = plain_attention(*wide)
    assert output.dtype == dtype
    tolerance = dict(rtol=2 ** (-10 if dtype == torch.float16 else -7), atol=1e-3)
    torch.testing.assert_close(output.double().cpu(), expected, **tolerance)
    for ours, theirs in zip(gradients(output, *low), gradients(expected, *wide), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=5e-2, atol=5e-2)


def test_multi_scale_deformable_attention_gradcheck():
    """The backward function, which mmcv calls on CUDA alone, is the derivative of the forward one."""
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    value, locations, weights = attention_inputs()
    shapes, starts = torch.tensor(SHAPES), torch.tensor([0, 20])

    def attend(value, locations, weights):
        return MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)

    small = (value[:1], locations[:1, :2], weights[:1, :2])
    assert torch.autograd.gradcheck(attend, [tensor.detach().requires_grad_() for tensor in small])


def test_under_autocast():
    """float32 in, float32 out: autocast around a detector's head does not reach inside."""
    from mmcv.ops import modulated_deform_conv2d, roi_align

    inputs = deform_inputs(GEOMETRIES[0].values[0], masked=True)
    args = [inputs[name].detach().float() for name in ('input', 'offset', 'mask', 'weight', 'bias')]
    image, rois = random(2, 3, 9, 13).float(), ROIS.float()
    expected = modulated_deform_conv2d(*args, 1, 1), roi_align(image, rois, 3, 0.7, 0, 'max', True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        actual = modulated_deform_conv2d(*args, 1, 1), roi_align(image, rois, 3, 0.7, 0, 'max', True)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

"""The operators of `mmcv._ext` that stock detectors use, over torchvision, on CPU and CUDA.

Names, argument order and keywords are those of mmcv 2's C interface, as `mmcv/ops/*.py` calls it: results are written
into the tensors that the caller allocated, unless the contract below says what is returned. float16 and bfloat16 are
computed in float32 and rounded once, at the end. Nothing here records gradients: mmcv calls the backward functions.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad
from torchvision.ops import deform_conv2d, roi_align
from torchvision.ops import nms as torchvision_nms

__all__ = [
    'deform_conv_backward_input',
    'deform_conv_backward_parameters',
    'deform_conv_forward',
    'get_compiler_version',
    'get_compiling_cuda_version',
    'modulated_deform_conv_backward',
    'modulated_deform_conv_forward',
    'ms_deform_attn_backward',
    'ms_deform_attn_forward',
    'nms',
    'nms_match',
    'roi_align_backward',
    'roi_align_forward',
    'roi_pool_backward',
    'roi_pool_forward',
    'sigmoid_focal_loss_backward',
    'sigmoid_focal_loss_forward',
    'softnms',
]


def _wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32 or, where they all are, float64: one precision for the whole computation."""
    dtype = torch.float64 if all(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return [tensor.to(dtype) for tensor in tensors]


# Suppression of boxes


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices (M,) of the boxes kept, by descending score.

    Args:
        boxes: (N, 4), corners x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: A box goes when its IoU with a kept one is larger than this.
        offset: 0, or 1 where a box from x1 to x2 is x2 - x1 + 1 wide.
    """
    boxes, scores = _wide(boxes, scores)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torchvision_nms(boxes, scores, iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Indices (M,) of the boxes that stay, in the order taken; their boxes and decayed scores fill `dets[:M]`.

    The best box is taken and the scores of the rest are multiplied by a weight of their IoU with it, until none is
    left; a box whose score falls below `min_score` is dropped.

    Args:
        boxes: (N, 4).
        scores: (N,).
        dets: (N, 5), filled.
        iou_threshold: The IoU from which methods 0 and 1 act.
        sigma: Width of method 2.
        min_score: See above.
        method: The weight at IoU u: 0 gives zero, 1 gives 1 - u, 2 gives exp(-u^2 / sigma).
        offset: As in `nms`.
    """
    boxes, scores = _wide(boxes, scores)
    scores = scores.clone()  # the caller's stay as they are
    left, taken = torch.arange(len(boxes), device=boxes.device), []
    while len(left):
        best = scores[left].argmax()
        index = left[best]
        dets[len(taken), :4] = boxes[index]
        dets[len(taken), 4] = scores[index]
        taken.append(index)
        left = torch.cat([left[:best], left[best + 1 :]])
        iou = _iou(boxes[index], boxes[left], offset)
        if method == 2:
            weight = torch.exp(-iou.square() / sigma)
        else:
            weight = torch.where(iou >= iou_threshold, (1 - iou) * method, 1)
        scores[left] = scores[left] * weight
        left = left[~(scores[left] < min_score)]  # the IoU of empty boxes is no number, and drops none
    return torch.stack(taken) if taken else left


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of indices, a kept box first and then those it suppresses (IoU not below the threshold), best first.

    Args:
        dets: (N, 5), corners and score.
        iou_threshold: See above.
    """
    (dets,) = _wide(dets)
    left, groups = dets[:, 4].argsort(descending=True, stable=True), []
    while len(left):
        same = _iou(dets[left[0], :4], dets[left, :4], offset=0) >= iou_threshold
        same[0] = True
        groups.append(left[same].tolist())
        left = left[~same]
    return groups


def _iou(box: Tensor, boxes: Tensor, offset: int) -> Tensor:
    """IoU (N,) of one box (4,) with boxes (N, 4)."""
    size = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2]) + offset).clamp(min=0)
    overlap = size.prod(1)
    return overlap / ((box[2:] - box[:2] + offset).prod() + (boxes[:, 2:] - boxes[:, :2] + offset).prod(1) - overlap)


# Pooling of regions


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (Mask R-CNN, section 3): bilinear samples of each bin, averaged or their maximum.

    Args:
        input: (B, C, H, W).
        rois: (N, 5), image index and corners.
        output: (N, C, aligned_height, aligned_width), filled.
        argmax_y, argmax_x: Where the maximum was sampled; filled as `output` for `pool_mode` 0, unused otherwise.
        aligned_height, aligned_width: Bins of a region.
        spatial_scale: From the coordinates of `rois` to those of `input`.
        sampling_ratio: Samples a bin and axis; 0 takes one for each pixel that the bin spans.
        pool_mode: 0 maximum, 1 average.
        aligned: Whether pixel centres lie at half-integer coordinates.
    """
    input, rois = _wide(input, rois)
    size = aligned_height, aligned_width
    if pool_mode == 1:
        output.copy_(roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned))
        return
    for n, (roi, y, x) in enumerate(_sample_grids(rois, size, spatial_scale, sampling_ratio, aligned)):
        if y.numel() == 0 or x.numel() == 0:  # a region without extent
            output[n], argmax_y[n], argmax_x[n] = 0, -2, -2  # -2 lies outside: its gradient goes nowhere
            continue
        ys, xs = torch.broadcast_tensors(y[:, None, :, None], x[None, :, None, :])  # (h, w, sy, sx)
        ys, xs = ys.flatten(2), xs.flatten(2)  # (h, w, s)
        value, best = _bilinear(input[int(roi[0])], ys, xs).max(-1)  # (C, h, w)
        output[n] = value
        argmax_y[n] = ys.expand(len(value), -1, -1, -1).gather(-1, best[..., None])[..., 0]
        argmax_x[n] = xs.expand(len(value), -1, -1, -1).gather(-1, best[..., None])[..., 0]


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of `roi_align_forward` with respect to `input`, into `grad_input` (B, C, H, W)."""
    grad, rois = _wide(grad_output, rois)
    if pool_mode == 1:
        grad_input.copy_(
            torch.ops.torchvision._roi_align_backward(
                grad,
                rois,
                spatial_scale,
                aligned_height,
                aligned_width,
                *grad_input.shape,
                sampling_ratio,
                aligned,
            )
        )
        return
    total = torch.zeros_like(grad_input, dtype=grad.dtype)
    height, width = total.shape[2:]
    argmax_y, argmax_x = argmax_y.to(grad.dtype), argmax_x.to(grad.dtype)
    for n, image in enumerate(rois[:, 0].int().tolist()):
        for index, weight in _corners(argmax_y[n].flatten(1), argmax_x[n].flatten(1), height, width):
            total[image].flatten(1).scatter_add_(1, index, grad[n].flatten(1) * weight)
    grad_input.copy_(total)


def _sample_grids(rois: Tensor, size: tuple[int, int], spatial_scale: float, sampling_ratio: int, aligned: bool):
    """For each region: the region, and the sampled coordinates of its bins, y (h, samples) and x (w, samples)."""
    corners = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    start, extent = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        extent = extent.clamp(min=1)
    for roi, (x, y), (width, height) in zip(rois, start, extent, strict=True):
        axes = []
        for origin, length, bins in ((y, height, size[0]), (x, width, size[1])):
            samples = sampling_ratio if sampling_ratio > 0 else max(int((length / bins).ceil()), 0)
            steps = torch.arange(bins * samples, dtype=rois.dtype, device=rois.device) + 0.5
            axes.append((origin + steps * length / max(bins * samples, 1)).view(bins, samples))
        yield roi, *axes


def _bilinear(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Samples (C, *S) of an image (C, H, W) at coordinates y, x of shape S; 0 more than a pixel outside."""
    image, (height, width) = image.flatten(1), image.shape[1:]
    return sum(image[:, index] * weight for index, weight in _corners(y, x, height, width))


def _corners(y: Tensor, x: Tensor, height: int, width: int):
    """The four pixels around each point: their flat index and their bilinear weight, both shaped as `y`."""
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.floor(), x.floor()
    for row, row_weight in ((top, top + 1 - y), ((top + 1).clamp(max=height - 1), y - top)):
        for column, column_weight in ((left, left + 1 - x), ((left + 1).clamp(max=width - 1), x - left)):
            yield (row * width + column).long(), row_weight * column_weight * inside


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """RoIPool (Fast R-CNN, section 2.1): the maximum of the pixels of each bin, 0 for an empty bin.

    mmcv does not round a region's corners to pixels, as torchvision's roi_pool does; hence this is written out.

    Args:
        input: (B, C, H, W).
        rois: (N, 5), image index and corners; x2 and y2 belong to the region.
        output: (N, C, pooled_height, pooled_width), filled.
        argmax: As `output`, int32, filled: flat index of the maximum in its image plane, -1 for an empty bin.
        pooled_height, pooled_width: Bins of a region.
        spatial_scale: From the coordinates of `rois` to those of `input`.
    """
    input, rois = _wide(input, rois)
    height, width = input.shape[2:]
    output.zero_()
    argmax.fill_(-1)
    start, end = rois[:, 1:3] * spatial_scale, (rois[:, 3:] + 1) * spatial_scale
    xs = _bin_edges(start[:, 0], end[:, 0], pooled_width, width)
    ys = _bin_edges(start[:, 1], end[:, 1], pooled_height, height)
    for n, image in enumerate(rois[:, 0].int().tolist()):
        for i, (top, bottom) in enumerate(ys[n]):
            for j, (left, right) in enumerate(xs[n]):
                if top < bottom and left < right:
                    value, best = input[image, :, top:bottom, left:right].flatten(1).max(1)
                    row, column = best // (right - left) + top, best % (right - left) + left
                    output[n, :, i, j] = value
                    argmax[n, :, i, j] = row * width + column


def _bin_edges(start: Tensor, end: Tensor, bins: int, size: int) -> list[list[list[int]]]:
    """For each region (N,) and bin of it, its first pixel and the one after its last; nothing where end <= start."""
    edges = start[:, None] + torch.arange(bins + 1, device=start.device) * ((end - start) / bins)[:, None]
    edges = torch.stack([edges[:, :-1].floor(), edges[:, 1:].ceil()], dim=-1).clamp(0, size)  # (N, bins, 2)
    return (edges * (end > start)[:, None, None]).int().tolist()


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Gradient of `roi_pool_forward` with respect to `input`, into `grad_input` (B, C, H, W)."""
    (grad,) = _wide(grad_output)
    grad, index = grad.flatten(2), argmax.flatten(2).long()
    total = torch.zeros_like(grad_input, dtype=grad.dtype).flatten(2)  # (B, C, H * W)
    for n, image in enumerate(rois[:, 0].int().tolist()):
        total[image].scatter_add_(1, index[n].clamp(min=0), grad[n] * (index[n] >= 0))
    grad_input.copy_(total.view_as(grad_input))


# Focal loss


def sigmoid_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """The loss of RetinaNet (Focal Loss, section 3), for each sample and class.

    With p = sigmoid(input): -alpha (1 - p)^gamma log p at the target class, -(1 - alpha) p^gamma log(1 - p) elsewhere.

    Args:
        input: (N, C).
        target: (N,), int64; C and above, or below 0, is background.
        weight: (C,), a factor of the samples of each class, or empty.
        output: (N, C), filled.
        gamma, alpha: See above.
    """
    x, p, is_target = _focal_terms(input, target)
    positive = -alpha * (1 - p) ** gamma * logsigmoid(x)
    negative = -(1 - alpha) * p**gamma * logsigmoid(-x)
    output.copy_(torch.where(is_target, positive, negative) * _class_weight(target, weight, input.size(1)))


def sigmoid_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Derivative of `sigmoid_focal_loss_forward` by `input`, element by element, into `grad_input` (N, C)."""
    x, p, is_target = _focal_terms(input, target)
    positive = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * logsigmoid(x))
    negative = (1 - alpha) * p**gamma * (p - gamma * (1 - p) * logsigmoid(-x))
    grad_input.copy_(torch.where(is_target, positive, negative) * _class_weight(target, weight, input.size(1)))


def _focal_terms(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (x,) = _wide(input)
    return x, x.sigmoid(), target[:, None] == torch.arange(x.size(1), device=x.device)


def _class_weight(target: Tensor, weight: Tensor, num_classes: int) -> Tensor | int:
    if weight.numel() == 0:
        return 1
    is_class = (target >= 0) & (target < num_classes)
    return torch.where(is_class, weight[target.clamp(0, num_classes - 1)], 1)[:, None]


# Deformable convolution


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Deformable convolution v1 (Dai et al., section 2.1): each tap of the kernel is read at its place plus an offset.

    Args:
        input: (B, C, H, W).
        weight: (O, C / group, kH, kW).
        offset: (B, deformable_group * kH * kW * 2, h, w), in pairs y, x.
        output: (B, O, h, w), filled.
        columns, ones, im2col_step: Buffers of the compiled kernel and their batch; not needed.
        kW, kH, group, deformable_group: Follow from the shapes.
        dW, dH, padW, padH, dilationW, dilationH: Stride, zero padding and dilation.
    """
    output.copy_(_deform_conv(input, weight, offset, None, None, (dH, dW), (padH, padW), (dilationH, dilationW)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Gradients of `deform_conv_forward` with respect to `input` and `offset`, into `grad_input` and `grad_offset`."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    by_input, _, by_offset, _, _ = _deform_conv_gradients(grad_output, input, weight, offset, None, geometry)
    grad_input.copy_(by_input)
    grad_offset.copy_(by_offset)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Gradient of `deform_conv_forward` with respect to `weight`, times `scale`, added to `grad_weight`."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    by_weight = _deform_conv_gradients(grad_output, input, torch.zeros_like(grad_weight), offset, None, geometry)[1]
    grad_weight += (scale * by_weight).to(grad_weight.dtype)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Deformable convolution v2 (Zhu et al., section 3.2): v1, with a factor for each tap.

    Larger maps of offsets and factors than the output are taken as mmcv's kernel takes them: it asks for no shape and
    reads each image as if its first numbers were maps of the size of the output. mmdet's DyHead relies on that.

    Args:
        input, weight, offset, output: As in `deform_conv_forward`.
        bias: (O,); empty without one.
        mask: (B, deformable_group * kernel_h * kernel_w, h, w), the factors.
        ones, columns: Buffers of the compiled kernel; not needed.
        kernel_h, kernel_w, group, deformable_group: Follow from the shapes.
        stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w: Stride, zero padding and dilation.
        with_bias: Whether `bias` is one.
    """
    stride, padding, dilation = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w)
    offset, mask = (_first_numbers(x, output.shape[2:]) for x in (offset, mask))
    output.copy_(_deform_conv(input, weight, offset, mask, bias if with_bias else None, stride, padding, dilation))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Gradients of `modulated_deform_conv_forward` with respect to its five inputs, into the `grad_` tensors."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    offset, mask = (_first_numbers(x, grad_output.shape[2:]) for x in (offset, mask))
    by_input, by_weight, by_offset, by_mask, by_bias = _deform_conv_gradients(
        grad_output, input, weight, offset, mask, geometry
    )
    grad_input.copy_(by_input)
    grad_weight.copy_(by_weight)
    for grad, by in ((grad_offset, by_offset), (grad_mask, by_mask)):
        grad.copy_(pad(by.flatten(1), (0, grad[0].numel() - by[0].numel())).view_as(grad))
    if with_bias:
        grad_bias.copy_(by_bias)


def _first_numbers(maps: Tensor, size: torch.Size) -> Tensor:
    """(B, C, H, W) as (B, C, *size): of each image the first numbers in memory, for that many channels."""
    channels = maps.size(1)
    return maps.flatten(1)[:, : channels * size.numel()].unflatten(1, (channels, *size))


def _deform_conv(input, weight, offset, mask, bias, stride, padding, dilation) -> Tensor:
    input, weight, offset = _wide(input, weight, offset)
    mask, bias = (None if tensor is None else tensor.to(input.dtype) for tensor in (mask, bias))
    return deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)


def _deform_conv_gradients(grad_output, input, weight, offset, mask, geometry) -> tuple[Tensor, ...]:
    """Gradients by input, weight, offset, mask and bias; `geometry` ends in the numbers of groups."""
    grad_output, input, weight, offset = _wide(grad_output, input, weight, offset)
    use_mask = mask is not None
    mask = mask.to(input.dtype) if use_mask else input.new_zeros(input.size(0), 1)
    bias = input.new_zeros(weight.size(0))
    return torch.ops.torchvision._deform_conv2d_backward(
        grad_output.contiguous(), input, weight, offset, mask, bias, *geometry, use_mask
    )


# Multi-scale deformable attention


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, equation 3): (B, Q, nh * V).

    Args:
        value: (B, L, nh, V), the levels one after another.
        spatial_shapes: (levels, 2), the height and width of each.
        level_start_index: Follows from `spatial_shapes`.
        sampling_locations: (B, Q, nh, levels, points, 2), x and y from 0 to 1 across a level.
        attention_weights: (B, Q, nh, levels, points).
        im2col_step: Batch of the compiled kernel; not needed.
    """
    return _attend(value, spatial_shapes, sampling_locations, attention_weights).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Gradients of `ms_deform_attn_forward` by value, locations and weights, into the `grad_` tensors."""
    inputs = [tensor.detach().requires_grad_() for tensor in (value, sampling_locations, attention_weights)]
    with torch.enable_grad():
        output = _attend(inputs[0], spatial_shapes, *inputs[1:])
    gradients = torch.autograd.grad(output, inputs, grad_output.to(output.dtype))
    for target, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True):
        target.copy_(gradient)


def _attend(value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    # mmcv's own PyTorch form, which it uses on CPUs; mmcv.ops imports this module, hence not at the top
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    value, sampling_locations, attention_weights = _wide(value, sampling_locations, attention_weights)
    sizes = spatial_shapes.tolist()  # read from a GPU once; it would be several times a level
    return multi_scale_deformable_attn_pytorch(value, sizes, sampling_locations, attention_weights)


# What mmcv reports about its build


def get_compiler_version() -> str:
    """The answer of an environment report to "MMCV Compiler"."""
    return 'none (mmvig computes the operators over torchvision)'


def get_compiling_cuda_version() -> str:
    """The answer of an environment report to "MMCV CUDA Compiler"."""
    return 'none (mmvig computes the operators over torchvision)'

"""Layer-wise learning-rate decay for classifiers, detectors and segmentors alike."""

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from mmvig.registry import OPTIM_WRAPPER_CONSTRUCTORS

__all__ = ['LayerDecayOptimWrapperConstructor']


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Gives layer d of n in the backbone the learning rate lr * layer_decay_rate^(n - 1 - d), and lr to all the rest.

    The backbone says by `get_layer_depth(param_name, prefix) -> (d, n)` to which layer a parameter belongs, as ViG,
    ViG-H and mmpretrain's backbones do. It is the module named `backbone`, at any depth: of a classifier, detector or
    segmentor, and of those inside another model, `detector.backbone` or `student.backbone`.

    Weights of norms, biases and all other 1-D parameters are free of weight decay unless `paramwise_cfg` says
    otherwise, also where a custom key sets their learning rate alone. The position embedding is no 1-D parameter and
    decays, as in the published code; `custom_keys={'pos_embed': dict(decay_mult=0.0)}` frees it.

    Args:
        optim_wrapper_cfg: the optimizer wrapper with its `optimizer`, which must name `lr`.
        paramwise_cfg: `layer_decay_rate` in (0, 1], where 1 is no decay; and the options of MMEngine's default
            constructor, whose learning-rate multipliers multiply with the decay.

    Raises:
        ValueError: `layer_decay_rate` is missing or out of range, the optimizer has no `lr`, or the model (on calling)
            has no backbone.
        TypeError: on calling, the backbone does not say how deep its parameters are.

    Example:
        optim_wrapper = dict(
            constructor='mmvig.LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
            paramwise_cfg=dict(layer_decay_rate=0.85),
        )
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        # `flat_decay_mult` is for all vectors; MMEngine's `norm_decay_mult` does not know RMSNorm.
        options = {'flat_decay_mult': 0.0, **(paramwise_cfg or {})}
        self.rate = options.pop('layer_decay_rate', None)
        if not isinstance(self.rate, (int, float)) or not 0 < self.rate <= 1:
            raise ValueError(
                f'paramwise_cfg.layer_decay_rate={self.rate!r} must be a number above 0 and at most 1, for instance '
                '0.85; 1 is no decay'
            )
        super().__init__(optim_wrapper_cfg, options)
        if self.base_lr is None:
            raise ValueError('optim_wrapper.optimizer needs an lr for layers to have a part of, for instance lr=1e-4')

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module=None) -> None:
        """As MMEngine's, one group for each trained parameter; called with the whole model it also sets the rates."""
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:  # MMEngine's walk through the model has not ended yet
            return
        backbones = find_backbones(module)
        names = {parameter: name for name, parameter in module.named_parameters()}
        for group in params:
            (parameter,) = group['params']
            # MMEngine copies a custom key's settings into the group, and lets it off every other rule.
            if parameter.dim() == 1 and 'lr_mult' in group and 'decay_mult' not in group and self.base_wd is not None:
                group['weight_decay'] = self.base_wd * self.paramwise_cfg['flat_decay_mult']
            for path, backbone in backbones.items():
                if names[parameter].startswith(path):
                    depth, num_layers = backbone.get_layer_depth(names[parameter], path)
                    group['lr'] = group.get('lr', self.base_lr) * self.rate ** (num_layers - 1 - depth)


def find_backbones(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules named `backbone`, by the prefix of their parameters' names ('detector.backbone.')."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if path.split('.')[-1] == 'backbone' and not path.startswith(tuple(found)):
            if not callable(getattr(module, 'get_layer_depth', None)):
                raise TypeError(
                    f'layer-wise decay needs a backbone with get_layer_depth(param_name, prefix) and {path} is a '
                    f"{type(module).__name__}, which has none: drop optim_wrapper.constructor, or use 'mmvig.ViGH', "
                    "'mmvig.ViG' or one of mmpretrain's backbones that have it"
                )
            found[f'{path}.'] = module
    if not found:
        children = [name for name, _ in model.named_children()]
        raise ValueError(
            f'layer-wise decay needs a module named `backbone` and {type(model).__name__} has none, only {children}: '
            'drop optim_wrapper.constructor'
        )
    return found

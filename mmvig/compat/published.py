"""MMEngine reads weights under `state_dict` only: a file that nests them under `model`, as the published ViG files and
many others do, loads nothing, with a warning at most. Here such files are read, and loading nothing is an error."""

from types import ModuleType

from mmvig.compat.change import Change
from mmvig.compat.checkpoint_loading import CheckpointError
from mmvig.compat.imports import after_import

__all__ = ['apply']


def apply() -> Change:
    """Wraps MMEngine's file loader, through which every load and resume goes, and its state-dict loader."""
    after_import('mmengine.runner.checkpoint', _patch)
    return Change(
        name='checkpoints nested under `model`',
        cause='MMEngine reads weights under `state_dict` only; of other files it loads nothing, with a warning at most',
        action='such files and the published ViG files are read; a file of which nothing fits the model is an error',
        cure='none needed',
    )


def _patch(engine: ModuleType) -> None:
    read, load = engine.CheckpointLoader.load_checkpoint.__func__, engine.load_state_dict

    def load_checkpoint(cls, filename, map_location=None, logger='current'):
        from mmvig.models.checkpoints import normalise_checkpoint  # not before it is needed: it imports the models

        checkpoint = read(cls, filename, map_location, logger)
        return normalise_checkpoint(checkpoint) if isinstance(checkpoint, dict) else checkpoint

    def load_state_dict(module, state_dict, strict=False, logger=None):
        _check_overlap(module, state_dict)
        load(module, state_dict, strict, logger)

    engine.CheckpointLoader.load_checkpoint = classmethod(load_checkpoint)
    engine.load_state_dict = load_state_dict


def _check_overlap(module, state_dict: dict) -> None:
    """Raises CheckpointError where no name of the file is one of the model's, or most of those have other sizes."""
    from mmengine.model import BaseTTAModel, is_model_wrapper

    while is_model_wrapper(module) or isinstance(module, BaseTTAModel):
        module = module.module
    own = module.state_dict()
    shared = {name: (name if name in own else name.removeprefix('backbone.')) for name in state_dict}
    shared = {theirs: ours for theirs, ours in shared.items() if ours in own}
    if own and not shared:
        raise CheckpointError(
            f'nothing in the checkpoint fits {type(module).__name__}: the file has {len(state_dict)} names such as '
            f'{list(map(str, state_dict))[:3]}, the model {len(own)} such as {list(own)[:3]}; a file that holds '
            "only a part of the model needs init_cfg=dict(type='Pretrained', checkpoint=..., prefix=...) on that part"
        )
    other = [
        f'{theirs} {tuple(state_dict[theirs].shape)} in the file, {tuple(own[ours].shape)} in the model'
        for theirs, ours in shared.items()
        if getattr(state_dict[theirs], 'ndim', 0) > 1 and state_dict[theirs].shape != own[ours].shape
    ]
    matrices = sum(getattr(state_dict[name], 'ndim', 0) > 1 for name in shared)
    if 2 * len(other) > matrices:
        raise CheckpointError(
            f'the checkpoint is of another size than {type(module).__name__}: {len(other)} of {matrices} weights that '
            f"have the model's names have other shapes, such as {other[0]}; give the model the arch that the file "
            'was trained with'
        )

"""The models of this project's configs, by name: as the metafiles list them."""

from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config
from mmengine.fileio import load
from mmengine.model import BaseModel
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint

from mmvig.utils.home import home

__all__ = ['Entry', 'find_model', 'get_model', 'list_models', 'register_models']


class Entry(NamedTuple):
    """A model of the zoo. `weights` is the address of its published weights, where there are any."""

    name: str
    config: Path
    weights: str | None


def list_models(pattern: str = '*') -> list[str]:
    """The names, in alphabetical order, that `pattern` matches, with `*` and `?` as in file names."""
    return sorted(name for name in _models() if fnmatchcase(name, pattern))


def find_model(name: str) -> Entry:
    """Where the config and the weights of a model are.

    Raises:
        ValueError: no model has this name.
    """
    if name not in _models():
        similar = list_models(f'*{name}*')
        hint = f'is it {", ".join(similar[:5])}?' if similar else 'list_models() has all names'
        raise ValueError(f'name={name!r} is no model of this project; {hint}')
    return _models()[name]


def get_model(name: str, pretrained: bool | str = False) -> BaseModel:
    """Builds a classifier, detector or segmentor, in eval mode, on the CPU.

    Args:
        name: one of `list_models()`.
        pretrained: True for the published weights, or the path or address of a checkpoint. Without, the weights are
            random; `init_weights()` of a detector or segmentor then loads those that its config names for the backbone.

    Returns:
        The model; `model.cfg` is its config, as the libraries' own functions expect it.

    Raises:
        ValueError: no model has this name, or no weights of it were published.
    """
    entry = find_model(name)
    if pretrained is True:
        if entry.weights is None:
            raise ValueError(f'pretrained=True: no weights of {name} were published; give the path of a checkpoint')
        pretrained = entry.weights
    cfg = Config.fromfile(entry.config)
    settings = dict(cfg.model)
    if 'data_preprocessor' in cfg:  # where mmpretrain's configs have it
        settings.setdefault('data_preprocessor', cfg.data_preprocessor)
    import_module(f'{cfg.default_scope}.utils').register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(settings)
        if pretrained:
            load_checkpoint(model, pretrained, map_location='cpu')
    model.cfg = cfg
    return model.eval()


@cache
def register_models() -> None:
    """Makes the classifiers known to mmpretrain: to its `get_model`, `list_models` and inferencers."""
    from mmpretrain.apis import ModelHub

    for metafile in sorted(home().glob('configs/mmpretrain/*/metafile.yml')):
        ModelHub.register_model_index(metafile, config_prefix=home())


@cache
def _models() -> dict[str, Entry]:
    metafiles = [home() / path for path in load(home() / 'model-index.yml')['Import']]
    models = [model for metafile in metafiles for model in load(metafile)['Models']]
    return {m['Name']: Entry(m['Name'], home() / m['Config'], m.get('Weights')) for m in models}

"""mmpretrain beside transformers 5.

mmpretrain imports its image-and-text models when it finds transformers >= 4.28, and they import names that transformers
5 has moved or dropped: `import mmpretrain.models` fails, and with it whatever imports that, mmdet included. mmpretrain
has a way to do without them, placeholders that raise when built; here it is taken for transformers 5 as well.
"""

from types import ModuleType
from typing import NoReturn

from mmvig.compat.change import Change
from mmvig.compat.imports import after_import, distribution_version, installed

__all__ = ['apply']

CURE = 'pip install "transformers>=4.28,<5", if you need the image-and-text models of mmpretrain'


def apply() -> Change | None:
    """Have mmpretrain go without image-and-text models, where transformers is too new for them."""
    found = distribution_version('transformers')
    if found is None or int(found.partition('.')[0]) < 5 or not installed('mmpretrain'):
        return None
    after_import('mmpretrain.utils.dependency', _patch)
    return Change(
        name='mmpretrain models',
        cause=f'transformers {found} has moved names that the image-and-text models of mmpretrain import',
        action='mmpretrain registers its placeholders for those models (BLIP, CLIP, OFA, LLaVA and the like), '
        'which raise when built; all other models work',
        cure=CURE,
    )


def _patch(dependency: ModuleType) -> None:
    dependency.WITH_MULTIMODAL = False
    dependency.register_multimodal_placeholder = _register_placeholders


def _register_placeholders(names, registry) -> None:
    for name in names:

        def refuse(*args, _name=name, **kwargs) -> NoReturn:
            raise ImportError(f'{_name} of mmpretrain does not work with transformers 5 or newer: {CURE}')

        registry.register_module(name=name, module=refuse)

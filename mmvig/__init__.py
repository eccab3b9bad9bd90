"""ViG and ViG-H, the gated-linear-attention vision backbones, for mmpretrain, mmdetection and mmsegmentation."""

from mmvig import compat
from mmvig.compat.imports import after_import

__all__ = ['swap_backbone']
__version__ = '0.1.0'


def _make_addressable(config_utils) -> None:
    """Let `mmvig::...` config addresses resolve: MMEngine asserts that their package is listed here."""
    config_utils.MODULE2PACKAGE.setdefault('mmvig', 'mmvig')


after_import('mmengine.config.utils', _make_addressable)
compat.apply()


def __getattr__(name: str):
    """`mmvig.swap_backbone`, fetched when it is first asked for: torch and MMEngine are imported with it."""
    if name == 'swap_backbone':
        from mmvig.apis import swap_backbone

        return swap_backbone
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

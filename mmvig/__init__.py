"""ViG and ViG-H, the gated-linear-attention vision backbones, for mmpretrain, mmdetection and mmsegmentation."""

from mmengine.config.utils import MODULE2PACKAGE

from mmvig import compat

__version__ = '0.1.0'

MODULE2PACKAGE.setdefault('mmvig', 'mmvig')  # MMEngine asserts that the package of an `mmvig::...` address is listed here
compat.apply()

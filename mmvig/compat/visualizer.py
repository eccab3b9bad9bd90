"""MMEngine's pictures beside matplotlib before 3.11.

MMEngine draws in a figure that is a hundredth of a pixel wider and higher than the picture, lest matplotlib cut it to
a pixel less. Before 3.11 matplotlib rounds what an image fills up to whole pixels and stretches it to a column and a
row more than the figure shows: half of its pixels lie one off, and each further drawing moves them again. Here the axes
leave out the hundredth.
"""

from types import ModuleType

from mmvig.compat.change import Change
from mmvig.compat.imports import after_import, distribution_version

__all__ = ['apply']

# Pixels, taken off the axes: above the rounding errors of any size, and next to nothing for what is drawn.
MARGIN = 1e-6


def apply() -> Change | None:
    """Have MMEngine's visualizers keep every pixel in its place, where matplotlib would move them."""
    found = distribution_version('matplotlib')
    if found is None or tuple(map(int, found.split('.')[:2])) >= (3, 11):
        return None
    after_import('mmengine.visualization.visualizer', _patch)
    return Change(
        name='pictures',
        cause=f'matplotlib {found} moves pixels of an image by one in a figure of the size that MMEngine gives it',
        action="the axes of MMEngine's visualizers have the size of the image",
        cure='pip install "matplotlib>=3.11"',
    )


def _patch(visualizer: ModuleType) -> None:
    stock = visualizer.Visualizer.set_image

    def set_image(self, image) -> None:
        stock(self, image)
        width, height = self.fig_save.bbox.size
        self.ax_save.set_position((0, 0, (self.width - MARGIN) / width, (self.height - MARGIN) / height))

    visualizer.Visualizer.set_image = set_image

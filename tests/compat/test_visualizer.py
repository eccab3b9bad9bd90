"""Pictures of MMEngine's visualizer: what is not drawn upon stays as it is."""

import numpy as np
import pytest
from mmengine.visualization import Visualizer

from mmvig import compat
from mmvig.compat import visualizer as ours

ACTIVE = any(change.name == 'pictures' for change in compat.report())


@pytest.mark.skipif(not ACTIVE, reason='matplotlib 3.11 and newer leave pixels in their place')
def test_pixels_move_without_it(python):
    """The cause. Where this fails, the fix has had its day."""
    python("""
        import numpy as np
        from mmengine.visualization import Visualizer
        image = np.random.randint(0, 256, (115, 124, 3), np.uint8)
        visualizer = Visualizer()
        visualizer.set_image(image)
        assert not np.array_equal(visualizer.get_image(), image)
    """)


@pytest.mark.parametrize('size', [(115, 124), (480, 640), (333, 500), (29, 57), (1, 1), (10, 2000), (2000, 10)])
def test_pixels_stay(size: tuple[int, int]):
    image = np.random.randint(0, 256, (*size, 3), np.uint8)
    visualizer = Visualizer()
    for _ in range(2):  # a visualizer draws many pictures
        visualizer.set_image(image)
        visualizer.draw_binary_masks(np.zeros(size, bool))
        visualizer.set_image(visualizer.get_image())
        assert np.array_equal(visualizer.get_image(), image)


@pytest.mark.parametrize(
    ('version', 'acts'), [('3.10.9', True), ('3.9.0', True), ('3.11.0rc1', False), ('4.0.0', False), (None, False)]
)
def test_only_matplotlib_before_3_11_is_the_cause(version: str | None, acts: bool, monkeypatch):
    patched = []
    monkeypatch.setattr(ours, 'distribution_version', dict(matplotlib=version).get)
    monkeypatch.setattr(ours, 'after_import', lambda name, patch: patched.append(name))
    assert (ours.apply() is not None) == acts == bool(patched)

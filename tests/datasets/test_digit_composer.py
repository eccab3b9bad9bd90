import numpy as np
import pytest
from scipy import ndimage

from mmvig.datasets import digit_composer as composer


@pytest.fixture(scope='module')
def scans():
    return composer.load_scans()


@pytest.fixture(scope='module')
def pools(scans):
    return composer.split_scans(scans[1], seed=0)


def plain_canvas(height=200, width=260, level=128):
    return composer.Canvas(np.full((height, width, 3), level, np.float32), np.zeros((height, width), np.int32))


def test_split_deals_every_scan_to_one_side(scans, pools):
    targets = scans[1]
    dealt = [*pools['train'], *pools['test']]
    assert sorted(np.concatenate(dealt)) == list(range(1797))
    for digit in range(10):
        assert (targets[pools['train'][digit]] == digit).all()
        assert (targets[pools['test'][digit]] == digit).all()
        assert len(pools['test'][digit]) == pytest.approx(0.2 * (targets == digit).sum(), abs=0.5)


def test_split_follows_the_seed(scans, pools):
    assert all(map(np.array_equal, pools['test'], composer.split_scans(scans[1], seed=0)['test']))
    assert not all(map(np.array_equal, pools['test'], composer.split_scans(scans[1], seed=1)['test']))


@pytest.mark.parametrize('size', [128, 320, 640])
def test_scene(scans, pools, size):
    images, targets = scans
    for seed in range(8):
        scene = composer.compose_scene(np.random.default_rng(seed), images, pools['test'], size)
        height, width = scene.owner.shape
        assert scene.image.shape == (height, width, 3) and scene.image.dtype == np.uint8
        assert 0.79 * size <= max(height, width) <= size
        assert 1 <= max(height, width) / min(height, width) <= 2.02
        assert round(3 * size / 320) <= len(scene.digits) <= round(7 * size / 320)
        assert np.array_equal(np.unique(scene.owner), np.arange(len(scene.digits) + 1))
        for digit, scan in zip(scene.digits, scene.scans, strict=True):
            assert targets[scan] == digit
            assert scan in pools['test'][digit]


def test_scenes_vary(scans, pools):
    scenes = [composer.compose_scene(np.random.default_rng(n), scans[0], pools['train'], 320) for n in range(40)]
    heights = [rows.stop - rows.start for scene in scenes for rows, _ in ndimage.find_objects(scene.owner)]
    assert {digit for scene in scenes for digit in scene.digits} == set(range(10))
    assert len({scene.owner.shape for scene in scenes}) > 30
    assert {len(scene.digits) for scene in scenes} == {3, 4, 5, 6, 7}
    assert min(heights) < 30 and max(heights) > 100


def test_same_generator_same_scene(scans, pools):
    one, two, other = (
        composer.compose_scene(np.random.default_rng(n), scans[0], pools['train'], 320) for n in (5, 5, 6)
    )
    assert np.array_equal(one.image, two.image) and np.array_equal(one.owner, two.owner) and one.scans == two.scans
    assert one.scans != other.scans


@pytest.mark.parametrize(
    'texture', [composer.gradient, composer.clouds, composer.stripes, composer.checks, composer.blobs]
)
@pytest.mark.parametrize('shape', [(64, 150), (97, 61)])
def test_textures_span_the_range(texture, shape):
    for seed in range(5):
        field = texture(np.random.default_rng(seed), *shape)
        assert field.shape == shape
        assert field.min() >= 0 and field.max() <= 1
        assert field.max() - field.min() > 0.3


def test_every_digit_stays_visible(scans):
    rng = np.random.default_rng(0)
    canvas = plain_canvas()
    for scan in rng.choice(1797, 12):
        before = canvas.owner.copy(), len(canvas.areas)
        placed = composer.place_digit(rng, canvas, scans[0][scan], largest=80)
        assert len(canvas.areas) == before[1] + placed
        if not placed:
            assert np.array_equal(canvas.owner, before[0])
        assert np.array_equal(np.bincount(canvas.owner.ravel())[1:], canvas.visible)
        assert (canvas.visible >= 0.8 * canvas.areas).all()
    assert len(canvas.areas) >= 6
    assert (canvas.visible < canvas.areas).any(), 'nothing overlaps: the test shows nothing'


def test_every_digit_stands_out(scans):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        ground = composer.draw_background(rng, 200, 260)
        canvas = composer.Canvas(ground.copy(), np.zeros((200, 260), np.int32))
        assert composer.place_digit(rng, canvas, scans[0][seed], largest=80)
        mask = canvas.owner == 1
        ring = ndimage.binary_dilation(mask, iterations=2) & ~mask
        # where the ink is thickest the digit has its full colour
        thick = ndimage.distance_transform_edt(mask) > ndimage.distance_transform_edt(mask).max() - 1
        colour = composer.luma(canvas.image[thick]).mean()
        assert np.quantile(np.abs(composer.luma(ground[ring]) - colour), 0.2) >= 45


def test_no_digit_where_none_can_be_read(scans):
    rng = np.random.default_rng(0)
    canvas = plain_canvas()
    canvas.image[...] = 85 * rng.integers(0, 4, (200, 260, 1))  # whatever its colour, some neighbours are like it
    image = canvas.image.copy()
    assert not composer.place_digit(rng, canvas, scans[0][0], largest=80)
    assert np.array_equal(canvas.image, image) and not canvas.owner.any() and not len(canvas.areas)


def test_digits_are_the_same_shape_at_any_size(scans):
    for seed in range(10):
        small, large = (
            composer.render_digit(np.random.default_rng(seed), scans[0][seed], size)[1] for size in (32, 192)
        )
        small, large = (mask[ndimage.find_objects(mask.astype(int))[0]] for mask in (small, large))
        large = ndimage.zoom(large.astype(float), np.divide(small.shape, large.shape), order=1) >= 0.5
        assert (small & large).sum() / (small | large).sum() > 0.8


@pytest.mark.parametrize('size', [32, 192])
def test_edges_are_sharp_at_any_size(scans, size):
    for seed in range(10):
        opacity, mask = composer.render_digit(np.random.default_rng(seed), scans[0][seed], size)
        outline = (mask & ~ndimage.binary_erosion(mask)).sum()
        assert ((opacity > 0) & (opacity < 0.45)).sum() < 3 * outline


def test_turning_is_moderate(scans):
    bar = np.zeros((8, 8))
    bar[:, 3:5] = 1
    angles = []
    for seed in range(60):
        _, mask = composer.render_digit(np.random.default_rng(seed), bar, 64)
        y, x = np.argwhere(mask).T - np.argwhere(mask).mean(0)[:, None]
        angles.append(np.degrees(0.5 * np.arctan2(2 * (x * y).mean(), (y**2).mean() - (x**2).mean())))
    assert max(np.abs(angles)) < 36  # 25 degrees of turn and what the shear adds
    assert max(angles) > 15 and min(angles) < -15


def test_drop_stays_near_the_scene():
    rng = np.random.default_rng(0)
    beyond = 0
    for _ in range(200):
        window, part = composer.drop(rng, (40, 30), (100, 120))
        for window_side, part_side, length, side in zip(window, part, (40, 30), (100, 120), strict=True):
            assert 0 <= window_side.start < window_side.stop <= side
            assert 0 <= part_side.start < part_side.stop <= length
            assert part_side.stop - part_side.start == window_side.stop - window_side.start >= 0.9 * length
            beyond += window_side.stop - window_side.start < length
    assert beyond


def test_degrade_keeps_the_picture():
    rng = np.random.default_rng(0)
    image = np.full((64, 80, 3), 100, np.float32)
    image[:, 40:] = 200
    noisy = composer.degrade(rng, image)
    assert noisy.dtype == np.uint8 and 0 < noisy.astype(float).std(axis=0)[:20].mean() < 12
    assert noisy[:, :30].mean() == pytest.approx(100, abs=1) and noisy[:, 50:].mean() == pytest.approx(200, abs=1)

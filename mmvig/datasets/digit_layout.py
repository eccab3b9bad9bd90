"""What configs, error messages and the generator share about digit scenes: names, colours and places."""

__all__ = ['CLASSES', 'GENERATOR_COMMAND', 'PALETTE', 'SEG_CLASSES', 'SPLITS', 'expected_layout']

SPLITS = ('train', 'test')

CLASSES = ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')

# A label map holds 0 on the background and digit + 1 elsewhere. All eleven classes are scored as they are; under
# `reduce_zero_label=True`, ADE20K's habit, the ten digits alone are and the background is ignored.
SEG_CLASSES = ('background', *CLASSES)

PALETTE = (
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (210, 245, 60),
    (0, 128, 128),
)

GENERATOR_COMMAND = 'python tools/make_digit_scenes.py data/digit_scenes'


def expected_layout(root: str = 'data/digit_scenes') -> str:
    """The tree of a finished data set under `root`, as text for READMEs and error messages."""
    return f"""{root}/
    images/{{train,test}}/000001.jpg              the scenes
    annotations/instances_{{train,test}}.json     COCO: boxes and RLE masks of what is visible, categories '0'..'9'
    annotations/{{train,test}}/000001.png         label maps, named as their scene: 0 background, digit + 1 elsewhere
    crops/{{train,test}}/0..9/000001_1.jpg        one square crop for each annotated digit, in a folder for each class
    preview.png                                 some test scenes with boxes and masks drawn
    meta.json README.txt                        the arguments that made it, and this text"""

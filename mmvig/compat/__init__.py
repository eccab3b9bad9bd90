"""What today's torch, numpy, transformers and setuptools need from the OpenMMLab releases."""


def apply() -> None:
    """Does nothing yet."""

"""Registering everything at once, for callers that build modules outside a config."""

from importlib import import_module

__all__ = ['register_all_modules']


def register_all_modules() -> None:
    """Registers every module of scope `mmvig`; `mmengine.hub.get_model('mmvig::...')` calls this.

    The default scope is left alone: our configs build detectors, segmentors and classifiers of mmdet, mmseg and
    mmpretrain, whose own scope their `default_scope` names.
    """
    for package in ('mmvig.models', 'mmvig.engine'):
        import_module(package)

from mmvig.engine.checkpoint import CheckpointHook, WriteError
from mmvig.engine.compile import CompileHook
from mmvig.engine.interrupt import Interrupted, InterruptHook
from mmvig.engine.layer_decay import LayerDecayOptimWrapperConstructor
from mmvig.engine.progress import ProgressHook
from mmvig.engine.resume import ResumeHook
from mmvig.engine.runner import Runner

__all__ = [
    'CompileHook',
    'CheckpointHook',
    'InterruptHook',
    'Interrupted',
    'LayerDecayOptimWrapperConstructor',
    'ProgressHook',
    'ResumeHook',
    'Runner',
    'WriteError',
]

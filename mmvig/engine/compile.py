"""torch.compile for the backbone of whatever model a Runner runs."""

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper

from mmvig.engine.settings import SetupError
from mmvig.registry import HOOKS

__all__ = ['CompileHook', 'use_compile']


@HOOKS.register_module()
class CompileHook(Hook):
    """Compiles the backbone in place, before the first step; parameters, their names and checkpoints stay as they are.

    MMEngine's own switch, `compile=True` at the top of a config, compiles the `train_step` of the whole model instead.
    That of a detector depends on the number of objects and breaks into pieces at every assigner, so that it compiles
    again for batch after batch; and it leaves validation and tests alone. The backbone is where the time goes, and is
    one graph.

    Args:
        module: the dotted name of what is compiled, in the model without its wrappers.
        dynamic: as in `torch.compile`. None compiles for the first size, and for any size once there is a second; True
            for any size at once, which suits detectors; False for each size, up to PyTorch's limit of eight.
        mode: as in `torch.compile`. 'reduce-overhead' uses CUDA graphs, for small batches of one size.
        fullgraph: stop where the module is not one graph, or where PyTorch's limit is reached, instead of going on
            without compiling.
        backend: as in `torch.compile`.

    Raises:
        SetupError: the model has no such module.
    """

    priority = 'VERY_HIGH'

    def __init__(
        self,
        module: str = 'backbone',
        dynamic: bool | None = None,
        mode: str = 'default',
        fullgraph: bool = False,
        backend: str = 'inductor',
    ) -> None:
        self.module = module
        self.settings = dict(dynamic=dynamic, mode=mode, fullgraph=fullgraph, backend=backend)
        self._compiled = None

    def before_run(self, runner) -> None:
        model, wrapped = runner.model, is_model_wrapper(runner.model)
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        try:
            part = model.get_submodule(self.module)
        except AttributeError as error:
            names = [name for name, _ in model.named_children()]
            raise SetupError(
                f'CompileHook: {type(model).__name__} has no module {self.module!r}; it has {names}'
            ) from error
        if part is self._compiled:  # a Runner that trains and then tests calls this twice
            return
        if wrapped and any(getattr(child, 'with_cp', False) for child in part.modules()):
            # Cutting the graph at the buckets of gradients, which overlaps their exchange with the backward pass, is
            # not possible where blocks are recomputed: PyTorch refuses both at once.
            torch._dynamo.config.optimize_ddp = False
        part.compile(**self.settings)
        self._compiled = part
        runner.logger.info(f'{self.module} ({type(part).__name__}) compiles in its first step: {self.settings}')


def use_compile(cfg: Config) -> None:
    """Adds a CompileHook with its defaults to a config, unless it has one."""
    hooks = list(cfg.get('custom_hooks') or [])
    if not any(hook.get('type') in ('mmvig.CompileHook', 'CompileHook') for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type='mmvig.CompileHook')]

"""Few parameter groups: those that an optimizer treats alike, as one."""

import torch

__all__ = ['merge_param_groups']


def merge_param_groups(optimizer: torch.optim.Optimizer) -> None:
    """Join the groups of a new optimizer that differ in nothing but their parameters, in place.

    MMEngine's constructors make a group of every parameter as soon as one has an option of its own. An optimizer steps
    group by group, so that a GPU gets some ten launches for each of several hundred groups where it needs ten in all.
    What a step computes stays the same.

    A checkpoint whose optimizer has as many groups as there were before, MMEngine's for instance, loads: the optimizer
    goes back to these.
    """
    apart = [dict(group) for group in optimizer.param_groups]
    together: dict[tuple, dict] = {}
    for group in apart:
        settings = {name: value for name, value in group.items() if name != 'params'}
        key = tuple(sorted((name, repr(value)) for name, value in settings.items()))
        together.setdefault(key, {'params': [], **settings})['params'].extend(group['params'])
    if len(together) == len(apart):
        return
    optimizer.param_groups[:] = together.values()

    def part(optimizer: torch.optim.Optimizer, state_dict: dict) -> None:
        if len(state_dict['param_groups']) == len(apart) != len(optimizer.param_groups):
            optimizer.param_groups[:] = apart

    optimizer.register_load_state_dict_pre_hook(part)

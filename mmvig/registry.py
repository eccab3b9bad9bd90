"""The registries of scope `mmvig`: children of MMEngine's, so that `type='mmvig.ViGH'` resolves from any config.

`Registry.get` imports `{scope}.registry` and then its `locations`, hence no config needs `custom_imports`.
"""

from mmengine import registry as root

__all__ = ['HOOKS', 'MODELS', 'OPTIM_WRAPPER_CONSTRUCTORS']

HOOKS = root.Registry('hook', parent=root.HOOKS, scope='mmvig', locations=['mmvig.engine'])
MODELS = root.Registry('model', parent=root.MODELS, scope='mmvig', locations=['mmvig.models'])
OPTIM_WRAPPER_CONSTRUCTORS = root.Registry(
    'optim wrapper constructor',
    parent=root.OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmvig',
    locations=['mmvig.engine'],
)

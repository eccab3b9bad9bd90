"""When the stand-in for `mmcv._ext` is served, and what it refuses."""

import pytest

from mmvig.compat import mmcv_ext


def test_operators_are_missing_without_it(python):
    """The cause. Where this fails, a real extension is installed or mmcv no longer needs one."""
    python("""
        try:
            import mmcv.ops
        except ModuleNotFoundError as error:
            assert error.name == 'mmcv._ext'
        else:
            sys.exit('mmcv.ops imports')
    """)


def test_it_is_served_last_and_once(python):
    python("""
        import mmvig
        from mmvig import compat
        assert [change.name for change in compat.report()].count('mmcv operators') == 1
        assert sys.meta_path[-1].name == 'mmcv._ext' and 'mmcv' not in sys.modules
        import mmcv.ops, mmcv._ext
        from importlib.util import find_spec
        assert find_spec('mmcv._ext') is mmcv._ext.__spec__
        assert 'torchvision' in mmcv.ops.get_compiler_version()
        assert 'torchvision' in mmcv.ops.get_compiling_cuda_version()
    """)


def test_a_real_extension_is_left_alone(python, tmp_path):
    package = tmp_path / 'site' / 'mmcv'
    package.mkdir(parents=True)
    (package / '__init__.py').touch()
    (package / '_ext.py').write_text('real = True')
    python(
        """
        import mmvig
        from mmvig import compat
        assert not any(change.name == 'mmcv operators' for change in compat.report())
        import mmcv._ext
        assert mmcv._ext.real
        """,
        path=tmp_path / 'site',
    )


def test_nothing_is_served_without_mmcv(python):
    python(
        """
        from mmvig import compat
        assert not any(change.name == 'mmcv operators' for change in compat.report())
        """,
        block=('mmcv',),
    )


def test_every_other_operator_says_what_it_needs():
    import mmcv._ext
    import torch
    from mmcv.ops import box_iou_rotated

    with pytest.raises(NotImplementedError, match="'box_iou_rotated' is a compiled operator of mmcv") as caught:
        box_iou_rotated(torch.zeros(1, 5), torch.zeros(1, 5))
    assert mmcv_ext.CURE in str(caught.value)
    with pytest.raises(AttributeError):
        _ = mmcv._ext.__path__


def test_offset_learning_rates_are_honoured():
    """MMEngine looks for deformable convolutions only where it finds mmcv's extension."""
    from mmcv.ops import ModulatedDeformConv2dPack
    from mmengine.optim import build_optim_wrapper
    from torch import nn

    model = nn.Sequential(ModulatedDeformConv2dPack(2, 2, 3))
    wrapper = dict(optimizer=dict(type='SGD', lr=1.0), paramwise_cfg=dict(dcn_offset_lr_mult=0.1))
    groups = build_optim_wrapper(model, dict(type='OptimWrapper', **wrapper)).optimizer.param_groups
    offsets = {id(parameter) for parameter in model[0].conv_offset.parameters()}
    assert {group['lr'] for group in groups if id(group['params'][0]) in offsets} == {0.1}
    assert {group['lr'] for group in groups if id(group['params'][0]) not in offsets} == {1.0}

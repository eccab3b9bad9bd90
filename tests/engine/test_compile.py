"""CompileHook in a Runner: what it compiles, once, without a trace in results and checkpoints."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseTTAModel, MMDistributedDataParallel
from torch import nn
from torch._dynamo.utils import counters

from mmvig.engine import CompileHook, Runner
from mmvig.engine.compile import use_compile
from mmvig.engine.settings import SetupError


class Linear(nn.Linear):
    """`Module.compile` passes over the modules of torch.nn themselves."""

    def forward(self, x):
        return super().forward(x)


@pytest.fixture(autouse=True)
def _fresh(toy, monkeypatch):
    monkeypatch.setattr(toy, 'nn', SimpleNamespace(**{**vars(nn), 'Linear': Linear}))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def with_hook(toy_config, work_dir, **settings):
    cfg = toy_config(work_dir, **settings)
    cfg.custom_hooks.append(dict(type='mmvig.CompileHook', module='block', backend='eager', fullgraph=True))
    return cfg


def test_training_is_the_same_and_goes_on(toy_config, train):
    expected = train(toy_config('eager'))
    assert train(with_hook(toy_config, 'whole')) == expected
    assert 0 < counters['stats']['unique_graphs'] <= 4  # two sizes of batches, in training and validation
    eager, compiled = (
        torch.load(toy_config(d).work_dir + '/iter_18.pth', weights_only=False) for d in ('eager', 'whole')
    )
    assert compiled['state_dict'].keys() == eager['state_dict'].keys()
    resumed = with_hook(toy_config, 'resumed', resume=True, load_from=toy_config('whole').work_dir + '/iter_8.pth')
    assert train(resumed) == {iteration: loss for iteration, loss in expected.items() if iteration >= 8}


def test_compiles_once_for_training_and_test(toy_config):
    runner = Runner.from_cfg(with_hook(toy_config, 'run', **{'train_cfg.max_epochs': 1}))
    runner.train()
    compiled = runner.model.block._compiled_call_impl
    runner.test()
    assert runner.model.block._compiled_call_impl is compiled is not None


class Wrapper(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        return data_samples_list


def test_looks_inside_wrappers(toy_config):
    runner = Runner.from_cfg(toy_config())
    model = runner.model
    runner.model = Wrapper(model)
    CompileHook(module='embed.0').before_run(runner)
    assert model.embed[0]._compiled_call_impl is not None and model.block._compiled_call_impl is None


@torch._dynamo.config.patch(optimize_ddp=True)  # not monkeypatch, which leaves the setting deleted
def test_recomputed_blocks_in_ddp(toy_config, tmp_path):
    """PyTorch does not compile these with its graphs cut at the buckets of gradients."""
    runner = Runner.from_cfg(toy_config())
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = runner.model
        runner.model = MMDistributedDataParallel(model)
        CompileHook(module='block').before_run(runner)
        assert torch._dynamo.config.optimize_ddp is True
        model.block.with_cp = True
        CompileHook(module='block').before_run(runner)
        assert torch._dynamo.config.optimize_ddp is False
    finally:
        torch.distributed.destroy_process_group()


def test_names_what_is_missing(toy_config):
    runner = Runner.from_cfg(toy_config())
    with pytest.raises(SetupError, match="ToyModel has no module 'backbone'; it has .*'embed', 'block', 'head'"):
        CompileHook().before_run(runner)


def test_use_compile():
    cfg = Config(dict(custom_hooks=[dict(type='EMAHook')]))
    use_compile(cfg)
    use_compile(cfg)
    assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook', 'mmvig.CompileHook']
    own = Config(dict(custom_hooks=[dict(type='mmvig.CompileHook', dynamic=True)]))
    use_compile(own)
    assert own.custom_hooks == [dict(type='mmvig.CompileHook', dynamic=True)]

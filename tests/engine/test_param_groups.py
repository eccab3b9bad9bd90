"""Groups that an optimizer treats alike are one, and nothing else changes."""

import copy

import pytest
import torch
from mmengine.optim import build_optim_wrapper

from mmvig.engine import Runner
from mmvig.engine.param_groups import merge_param_groups

PARAMWISE = dict(flat_decay_mult=0.0, custom_keys={'0.weight': dict(lr_mult=0.1)})


@pytest.fixture
def make():
    def make(merged: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(4)))
        cfg = dict(optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.05), paramwise_cfg=PARAMWISE)
        optimizer = build_optim_wrapper(model, cfg).optimizer
        if merged:
            merge_param_groups(optimizer)
        return model, optimizer

    return make


def steps(model, optimizer, count):
    for i in range(count):
        optimizer.zero_grad()
        model(torch.full((2, 3), float(i + 1))).square().sum().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_merged_steps_are_the_same(make):
    (model, optimizer), (apart_model, apart) = make(True), make(False)
    assert [len(group['params']) for group in optimizer.param_groups] == [1, 4, 3] and len(apart.param_groups) == 8
    assert {(group['lr'], group['weight_decay']) for group in optimizer.param_groups} == {
        (0.1 * 0.1, 0.05),
        (0.1, 0.0),
        (0.1, 0.05),
    }
    assert steps(model, optimizer, 3).equal(steps(apart_model, apart, 3))


@pytest.mark.parametrize('saved_merged', [True, False])
def test_checkpoints_of_either_kind_load(saved_merged, make):
    model, optimizer = make(saved_merged)
    steps(model, optimizer, 2)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    want = steps(model, optimizer, 2)
    model, optimizer = make(True)
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    assert len(optimizer.param_groups) == (3 if saved_merged else 8)
    assert steps(model, optimizer, 2).equal(want)


def test_groups_that_differ_stay(make):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD([dict(params=[p], lr=i + 1.0) for i, p in enumerate(model.parameters())])
    before = list(optimizer.param_groups)
    merge_param_groups(optimizer)
    assert all(a is b for a, b in zip(before, optimizer.param_groups, strict=True))


def test_the_runner_merges(toy_config):
    changes = {'train_cfg.max_epochs': 1, 'optim_wrapper.paramwise_cfg': dict(flat_decay_mult=0.0)}
    runner = Runner.from_cfg(toy_config(**changes))
    runner.train()
    groups = runner.optim_wrapper.optimizer.param_groups
    settings = [(group['lr'], group['weight_decay']) for group in groups]
    assert len(settings) == len(set(settings)) < len(list(runner.model.parameters()))

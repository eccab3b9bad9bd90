import io
import re
import sys
import time

import pytest

from mmvig.engine import Runner
from mmvig.engine.progress import Display, Pace, ProgressHook


def run(toy_config, **settings) -> Runner:
    runner = Runner.from_cfg(toy_config(**settings))
    runner.train()
    return runner


def test_lines_tell_iteration_epoch_loss_rate_speed_and_time_left(toy_config, capsys):
    run(toy_config, **{'default_hooks.progress': dict(type='mmvig.ProgressHook', style='lines', interval=0)})
    lines = capsys.readouterr().out.splitlines()
    train = [line for line in lines if line.startswith('train')]
    assert [re.search(r'iter (\d+)/18', line)[1] for line in train] == [str(i) for i in range(1, 19)]
    wanted = r'train  iter 10/18  epoch 2/3  left \d:\d\d:\d\d  loss [\d.]+  lr 5.00e-03  [\d.]+ (s/iter|iter/s)'
    assert re.match(wanted, train[9])
    assert 'left' not in train[0]
    validated = [line for line in lines if line.startswith('val') and 'toy/mean' in line]
    assert [re.match(r'val  epoch (\d)  toy/mean [\d.]+$', line)[1] for line in validated] == ['1', '2', '3']
    assert sum('computing the metrics' in line for line in lines) == 3


def test_lines_are_seconds_apart(toy_config, capsys):
    run(toy_config, **{'default_hooks.progress': dict(type='mmvig.ProgressHook', style='lines', interval=60)})
    train = [line for line in capsys.readouterr().out.splitlines() if line.startswith('train')]
    assert [re.search(r'iter (\S+)', line)[1] for line in train] == ['1/18', '18/18']


def test_iterations_are_not_called_epochs(toy_config, capsys):
    run(toy_config, train_cfg=dict(by_epoch=False, max_iters=7, val_interval=3))
    said = capsys.readouterr().out
    assert 'epoch' not in said
    assert re.findall(r'val  iter (\d)  toy', said) == ['3', '6', '7']


def test_bar_on_a_terminal(toy_config, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, 'stdout', terminal := Terminal())
    monkeypatch.setenv('TERM', 'xterm')
    runner = run(toy_config)
    text = re.sub(r'\x1b\[[\d;?]*[A-Za-z]', '', terminal.getvalue())
    assert 'iter 18/18  epoch 3/3' in text and 'val' in text and '━' in text
    assert sys.stdout is terminal
    assert all(
        handler.stream is terminal for handler in runner.logger.handlers if type(handler).__name__ != 'FileHandler'
    )


def test_time_left_includes_the_validations_to_come(toy_config):
    runner = Runner.from_cfg(toy_config(train_cfg=dict(by_epoch=True, max_epochs=7, val_interval=3, val_begin=2)))
    runner.train_loop, runner.val_loop  # noqa: B018  built on access
    hook = next(hook for hook in runner.hooks if isinstance(hook, ProgressHook))
    hook._train_pace._durations.append(2.0)
    seen = []
    for epoch in range(7):
        runner.train_loop._epoch = epoch
        seen.append(hook._training_left(runner, done=40))
    # 2 iterations; validations after the epochs 3, 6 and 7 of 10 images, 2.5 batches of training's 22 / 6 images
    one = 10 / (22 / 6) * 2.0 / 3
    assert seen == pytest.approx([4 + 3 * one] * 3 + [4 + 2 * one] * 3 + [4 + one])
    hook._validation_seconds = 50.0
    assert hook._training_left(runner, done=40) == pytest.approx(4 + 50)


def test_pace_forgets_the_warm_up(monkeypatch):
    now = iter([0.0, 10.0, 11.0, 12.0])
    monkeypatch.setattr(time, 'monotonic', lambda: next(now))
    pace = Pace()
    pace.start()
    pace.tick()
    assert pace.seconds == 10
    pace.tick()
    pace.tick()
    assert pace.seconds == 1 and pace.text() == '1.00 s/iter' and pace.left(61.4) == 'left 0:01:01'


def test_a_failing_run_gives_the_terminal_back(toy_config, monkeypatch):
    runner = Runner.from_cfg(toy_config())
    monkeypatch.setattr(runner.model, 'train_step', lambda *args, **kwargs: 1 / 0)
    stdout = sys.stdout
    with pytest.raises(ZeroDivisionError):
        runner.train()
    assert sys.stdout is stdout


def test_unknown_style():
    with pytest.raises(ValueError, match="style must be 'auto', 'bar' or 'lines', got 'dots'"):
        ProgressHook(style='dots')


def test_display_without_a_runner(capsys):
    display = Display(style='lines', interval=0)
    display.open()
    for done in (1, 2, 3):
        display.tick('images', done, 3)
    display.note('one was', 'skipped')
    display.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split('  ')[1] for line in lines[:3]] == ['iter 1/3', 'iter 2/3', 'iter 3/3']
    assert lines[3] == 'one was  skipped'

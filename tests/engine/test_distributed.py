"""Two processes of gloo train as one does: small ViG-H by MMEngine's two runners."""

from importlib import import_module

import pytest
import torch

from mmvig.compat.checkpoint_loading import load_checkpoint_file

EPOCHS, BATCHES = 2, 4


@pytest.fixture
def vig(toy):
    return import_module('distributed_vig')


def read(folder, suffix: str) -> torch.Tensor:
    words = [line.split() for line in (folder / f'losses{suffix}.txt').read_text().splitlines()]
    return torch.tensor([float.fromhex(loss) for _, _, loss in words], dtype=torch.float64)


def check(vig, folder, alone, names) -> None:
    """Each process's loss is of its half of the batch; their mean, and the weights, are those of one process."""
    for name in names:
        settings = {key: value for key, value in vig.CASES[name].items() if key in ('accumulative_counts', 'compile')}
        one = alone / '-'.join(settings) / 'run'
        if not one.exists():
            vig.train(str(one), **settings)
        want, (first, second) = read(one, ''), (read(folder / name, rank) for rank in '01')
        assert len(want) == EPOCHS * BATCHES and want[-1] != want[0]
        assert not torch.allclose(first, second, rtol=1e-3)
        torch.testing.assert_close((first + second) / 2, want, rtol=1e-10, atol=0)
        # FlexibleRunner leaves the wrapper's prefix, which loading takes off
        got, want = (load_checkpoint_file(path / f'epoch_{EPOCHS}.pth')['state_dict'] for path in (folder / name, one))
        got = {key.removeprefix('module.'): value for key, value in got.items()}
        assert got.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=1e-7, atol=1e-9)


def test_two_processes_train_as_one(vig, launch, tmp_path):
    names = ['ddp', 'accumulation', 'checkpointing', 'flexible']
    assert launch('distributed_vig.py', tmp_path / 'two', *names) == [0, 0]
    check(vig, tmp_path / 'two', tmp_path / 'one', names)


@pytest.mark.slow
def test_compiled(vig, launch, tmp_path):
    assert launch('distributed_vig.py', tmp_path / 'two', 'compiled', timeout=500) == [0, 0]
    check(vig, tmp_path / 'two', tmp_path / 'one', ['compiled'])


def test_one_output_or_all_use_all_parameters(launch, tmp_path):
    assert launch('distributed_vig.py', tmp_path, 'subsets') == [0, 0]

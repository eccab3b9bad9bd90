"""The shell scripts: what they run, with which words, and in how many processes."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / 'tools'
OPTIONS = ['--cfg-options', 'train_cfg.max_epochs=2', 'name=two words']

# What stands in for `python` and `srun`: it writes down its words.
STUB = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
Path(os.environ['SAID']).write_text(json.dumps(sys.argv))
"""
# What stands in for tools/train.py: MMEngine's launcher asks for a GPU.
TOOL = """
import json, os, sys
from pathlib import Path
import torch
torch.distributed.init_process_group('gloo')
ranks = torch.tensor([1 + torch.distributed.get_rank()])
torch.distributed.all_reduce(ranks)
Path(os.environ['SAID'] + os.environ['RANK']).write_text(json.dumps([ranks.item(), *sys.argv[1:]]))
torch.distributed.destroy_process_group()
"""


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Runs a script with stubs of `python` and `srun`: (what was called, with which words)."""
    for name in ('python', 'srun'):
        (tmp_path / 'bin').mkdir(exist_ok=True)
        (tmp_path / 'bin' / name).write_text(STUB)
        (tmp_path / 'bin' / name).chmod(0o755)
    for name in ('NNODES', 'NODE_RANK', 'PORT', 'MASTER_ADDR', 'GPUS', 'GPUS_PER_NODE', 'CPUS_PER_TASK', 'SRUN_ARGS'):
        monkeypatch.delenv(name, raising=False)

    def run(script: str, *arguments: str, **variables: str) -> tuple[str, list[str]]:
        path = f'{tmp_path / "bin"}{os.pathsep}{os.environ["PATH"]}'
        said = tmp_path / 'said.json'
        environment = {**os.environ, 'PATH': path, 'SAID': str(said), **variables}
        subprocess.run([TOOLS / script, *arguments], env=environment, check=True)
        command, *words = json.loads(said.read_text())
        return Path(command).name, words

    return run


def test_dist_train(launch):
    command, words = launch('dist_train.sh', 'config.py', '4', *OPTIONS)
    assert command == 'python' and words[:2] == ['-m', 'torch.distributed.run']
    machines = ['--nnodes=1', '--node_rank=0', '--master_addr=127.0.0.1', '--master_port=29500', '--nproc_per_node=4']
    assert words[2:7] == machines
    assert words[7:] == [str(TOOLS / 'train.py'), 'config.py', '--launcher', 'pytorch', *OPTIONS]


def test_dist_test_on_several_machines(launch):
    variables = dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='first', PORT='1234')
    _, words = launch('dist_test.sh', 'config.py', 'weights.pth', '8', '--tta', **variables)
    machines = ['--nnodes=2', '--node_rank=1', '--master_addr=first', '--master_port=1234', '--nproc_per_node=8']
    assert words[2:7] == machines
    assert words[7:] == [str(TOOLS / 'test.py'), 'config.py', 'weights.pth', '--launcher', 'pytorch', '--tta']


@pytest.mark.parametrize('work_dir', [[], ['work dir']])
def test_slurm_train(launch, work_dir):
    command, words = launch('slurm_train.sh', 'part', 'job', 'config.py', *work_dir, *OPTIONS, SRUN_ARGS='-x a -t 9')
    assert command == 'srun' and {'--partition=part', '--job-name=job', '-x', 'a', '-t', '9'} < set(words)
    assert {'--gres=gpu:8', '--ntasks=8', '--ntasks-per-node=8', '--cpus-per-task=5'} < set(words)
    rest = words[words.index('python') :]
    assert rest[:5] == ['python', '-u', str(TOOLS / 'train.py'), 'config.py', '--launcher']
    assert rest[5:] == ['slurm', *(['--work-dir', *work_dir] if work_dir else []), *OPTIONS]


@pytest.mark.parametrize(
    ('variables', 'asked'),
    [
        (dict(GPUS='2'), ['--gres=gpu:2', '--ntasks=2', '--ntasks-per-node=2']),
        (dict(GPUS='8', GPUS_PER_NODE='4'), ['--gres=gpu:4', '--ntasks=8', '--ntasks-per-node=4']),
    ],
)
def test_slurm_nodes(launch, variables, asked):
    _, words = launch('slurm_train.sh', 'part', 'job', 'config.py', **variables)
    assert words[2:5] == asked


@pytest.mark.parametrize(
    ('script', 'arguments'),
    [
        ('dist_train.sh', ['config.py']),
        ('dist_train.sh', ['config.py', '--resume']),
        ('dist_train.sh', ['config.py', '0']),
        ('dist_test.sh', ['config.py', '8']),
        ('dist_test.sh', ['config.py', 'weights.pth', 'eight']),
        ('slurm_train.sh', ['part', 'job']),
    ],
)
def test_wrong_arguments(script, arguments):
    done = subprocess.run([TOOLS / script, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('usage: ') and 'CONFIG' in done.stderr and not done.stdout


def test_two_processes_meet(tmp_path):
    shutil.copy(TOOLS / 'dist_train.sh', tmp_path)
    (tmp_path / 'train.py').write_text(TOOL)
    with socket.socket() as free:
        free.bind(('', 0))
        port = str(free.getsockname()[1])
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    environment = {**os.environ, 'PATH': path, 'PORT': port, 'SAID': str(tmp_path / 'said'), 'OMP_NUM_THREADS': '1'}
    command = [tmp_path / 'dist_train.sh', 'config.py', '2', *OPTIONS]
    subprocess.run(command, env=environment, check=True, timeout=120)
    for rank in '01':
        said = json.loads((tmp_path / f'said{rank}').read_text())
        assert said == [1 + 2, 'config.py', '--launcher', 'pytorch', *OPTIONS]

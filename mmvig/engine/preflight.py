"""What can be known to fail before data are read and models built."""

import os
import tempfile
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

from mmvig.datasets.digit_layout import GENERATOR_COMMAND, expected_layout
from mmvig.engine.config_diff import compare, parse
from mmvig.engine.resume import latest_checkpoint, load_for_resume
from mmvig.engine.settings import SetupError

__all__ = ['check_paths', 'prepare_resume']

DOWNLOADED = ('CIFAR10', 'CIFAR100', 'FashionMNIST', 'MNIST')  # mmpretrain fetches these itself
FOLDER_FOR_EACH_SPLIT = ('ImageNet', 'ImageNet21k')
OF_THE_MODEL = ('model', 'data_preprocessor')
OF_THE_START = ('init_cfg', 'pretrained')  # of no effect once the weights come from a checkpoint
OF_THE_CALL = ('launcher', 'load_from', 'resume', 'work_dir')


def check_paths(cfg: Config, *parts: str) -> None:
    """Looks for every local file and folder that a run reads, and for a work directory that it can write to.

    Args:
        cfg: its `work_dir` and `load_from`, and
        parts: of its data loaders and evaluators those named: 'train', 'val', 'test'; with 'train', also the weights
            that its model starts from.

    Raises:
        SetupError: lists everything that is missing.
    """
    problems = [*_unwritable(cfg.work_dir), *_missing_weights(cfg, with_model='train' in parts)]
    for part in parts:
        for section in (f'{part}_dataloader', f'{part}_evaluator'):
            problems += _missing_data(cfg.get(section) or {}, section)
    if problems:
        raise SetupError('\n'.join(dict.fromkeys(problems)))


def _unwritable(folder: str) -> Iterator[str]:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield f'work_dir: {folder} cannot be written to ({error.strerror}); name another one with --work-dir.'


def _missing_weights(cfg: Config, with_model: bool) -> Iterator[str]:
    for name, value in _walk(dict(load_from=cfg.get('load_from'), model=cfg.model if with_model else None)):
        is_weights = name == 'load_from' or name.endswith(('init_cfg.checkpoint', 'pretrained'))
        if is_weights and _is_local(value) and not os.path.isfile(os.path.expanduser(value)):
            yield f'{name}: there is no file {value} in {os.getcwd()}.'


def _missing_data(section: Any, name: str) -> Iterator[str]:
    """One problem for each dataset, or metric, that misses something; it shows all that the config expects there."""
    for key, node in [(name, section), *_walk(section, f'{name}.')]:
        if not isinstance(node, dict) or node.get('type') in DOWNLOADED or node.get('backend_args'):
            continue
        root, prefix = node.get('data_root') or '', node.get('data_prefix')
        if not prefix and node.get('type') in FOLDER_FOR_EACH_SPLIT:
            prefix = node.get('split')
        expected = {'ann_file': node.get('ann_file')}
        if isinstance(prefix, dict):
            expected |= {f'data_prefix.{kind}': path for kind, path in prefix.items()}
        else:
            expected['data_prefix'] = prefix
        paths = {setting: os.path.join(root, path) for setting, path in expected.items() if _is_local(path)}
        if root:
            paths = {'data_root': root, **paths}
        if not _is_local(root or '.') or all(map(os.path.exists, paths.values())):
            continue
        lines = [f'{key}: the data are not where the config expects them, seen from {os.getcwd()}:']
        lines += [
            f'  {"found  " if os.path.exists(p) else "missing"}  {p}  ({setting})' for setting, p in paths.items()
        ]
        if 'digit' in root:
            root = root.rstrip('/')
            command = GENERATOR_COMMAND.replace('data/digit_scenes', root)
            lines += ['Make them with', f'  {command}', 'which writes', f'  {expected_layout(root)}']
        elif root:
            lines.append(f'If they are elsewhere: --cfg-options {key}.data_root=...')
        yield '\n'.join(lines)


def _walk(node: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything inside `node`."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, value in items:
        yield f'{prefix}{key}', value
        yield from _walk(value, f'{prefix}{key}.')


def _is_local(path: Any) -> bool:
    return isinstance(path, str) and path != '' and '://' not in path


def prepare_resume(cfg: Config, checkpoint: str) -> list[str]:
    """Sets `cfg` to go on from a checkpoint, or from the newest one of its `work_dir` ('auto'), if there is one.

    Returns:
        What the user should know, in lines.

    Raises:
        SetupError: there is no such file, training cannot go on from it, or it holds another model.
    """
    path = latest_checkpoint(cfg.work_dir) if checkpoint == 'auto' else checkpoint
    if path is None:
        return [f'--resume: {cfg.work_dir} holds no checkpoint to go on from; starting from the beginning.']
    try:
        meta = load_for_resume(path)['meta']
        differences = compare(parse(meta['cfg']), cfg)
    except (OSError, RuntimeError, ValueError) as error:
        raise SetupError(f'--resume: {error}') from error

    def listed(names: list[str]) -> list[str]:
        return [f'  {name}: {differences[name][0]} -> {differences[name][1]}' for name in names]

    model = [
        name
        for name in differences
        if name.split('.')[0] in OF_THE_MODEL and not set(OF_THE_START).intersection(name.split('.'))
    ]
    if model:
        lines = [
            f'--resume: the config describes another model than {path} was trained with (checkpoint -> config):',
            *listed(model),
            'Restore these settings, or start a new run from its weights without --resume: '
            f'--cfg-options load_from={path}',
        ]
        raise SetupError('\n'.join(lines))
    seed = (cfg.get('randomness') or {}).get('seed')
    ignored = {name for name in differences if name in OF_THE_CALL or (name == 'randomness.seed' and seed is None)}
    cfg.randomness = dict(cfg.get('randomness') or {}, seed=meta['seed'])
    cfg.load_from, cfg.resume = str(path), True
    lines = [f'Going on from {path}: epoch {meta["epoch"]}, iteration {meta["iter"]}.']
    if others := [name for name in differences if name not in ignored]:
        lines += [
            'The config has changed since (checkpoint -> config). The seed and the state of the optimizer and of the '
            "schedules remain the checkpoint's, the rest is the config's:",
            *listed(others),
        ]
    return lines

"""The config that a checkpoint was trained with, read without running it, and its differences to another one."""

import ast
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

__all__ = ['compare', 'parse']

ABSENT = '(not set)'


def parse(text: str) -> dict[str, Any]:
    """The settings of an MMEngine config dump (`Config.pretty_text`), which is Python source.

    MMEngine would execute it. Here literals and `dict(...)` calls are read, and any other expression stands as its
    source text, so that a checkpoint of unknown origin can be looked at.

    Raises:
        ValueError: `text` is no such dump.
    """
    settings = {}
    try:
        statements = ast.parse(text).body
    except SyntaxError as error:
        raise ValueError(f'no dump of a config: {error}') from error
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            settings[statement.targets[0].id] = _value(statement.value)
    return settings


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name('dict'), args=args, keywords=keywords):
            inside = {name: value for arg in args for name, value in _value(arg).items()}
            return inside | {keyword.arg: _value(keyword.value) for keyword in keywords}
        case ast.Dict(keys=keys, values=values):
            return {_value(key): _value(value) for key, value in zip(keys, values)}
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def compare(before: dict[str, Any], after: Config) -> dict[str, tuple[str, str]]:
    """Dotted name -> (value in `before`, value in `after`) of each setting that differs."""
    old, new = dict(_leaves(before)), dict(_leaves(parse(after.pretty_text)))
    names = [*old, *(name for name in new if name not in old)]
    return {name: (old.get(name, ABSENT), new.get(name, ABSENT)) for name in names if old.get(name) != new.get(name)}


def _leaves(value: Any, name: str = '') -> Iterator[tuple[str, str]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        yield name, repr(value)
    for key, item in items:
        yield from _leaves(item, f'{name}.{key}' if name else str(key))

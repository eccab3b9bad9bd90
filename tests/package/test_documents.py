"""What the documents tell people to type: every command is parsed by what would run it, its config is read with its
options, and Python is run, or, where it needs files that are not here, its imports and calls are checked."""

import argparse
import ast
import contextlib
import inspect
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import mmengine.config.utils
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from packaging.requirements import Requirement
from torch.distributed.run import get_args_parser

import mmvig  # noqa: F401  before the OpenMMLab libraries
from mmvig.engine.settings import load_config

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), *ROOT.glob('configs/**/README.md'), ROOT / 'kernels/README.md']
)
MAKEFILE = (ROOT / 'Makefile').read_text()
EXTRAS = re.findall(r'^(\w+) = \[', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)
FENCE = re.compile(r'^( *)```(\S*)\n(.*?)^ *```$', re.MULTILINE | re.DOTALL)
INLINE = re.compile(r'(?<!`)`((?:python|make|pip|torchrun|source) [^`]+)`(?!`)')
# Python that names one of these needs files or downloads: its calls are compared with the signatures instead.
NOT_HERE = ('.pth', '.jpg', 'pretrained=True', "'cuda'")
B, H, W, NH, K, C, R = 2, 4, 5, 3, 4, 24, 16
# The tensors that the operator's examples name.
TENSORS = dict.fromkeys(('q', 'k', 'v', 'x_fwd', 'x_bwd', 'g_fwd', 'g_bwd'), (B, H * W, NH, K))
TENSORS |= dict(x=(B, H, W, C), branch=(B, H, W, C), pos_embed=(1, H, W, C), projected=(B, H * W, 3 * C + R))
TENSORS |= dict.fromkeys(('bias', 'norm_weight', 'norm_bias'), (C,))
TENSORS |= dict(fc1_weight=(4 * C, C), fc2_weight=(C, 2 * C), image=(B, H, W, 3))
TENSORS |= dict(weight=(C, 1, 3, 3), taps=(C, 3, 3, 3))
MIXER = ((C, R), (C,), (C,), (C // NH,), (C // NH,))  # `parameters`
FIRST_HALF = ((C, 1, 3, 3), (2 * C, C), (C, C), (R, C), *MIXER, (C, C))  # `weights`


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f'{self.page.relative_to(ROOT)}:{self.line}'


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            if match[2] in languages:
                code = '\n'.join(line.removeprefix(match[1]) for line in match[3].splitlines())
                found.append(Block(page, text[: match.start()].count('\n') + 2, match[2], code))
    return found


def commands() -> list[Block]:
    """One command each, from fenced blocks and from the running text, which also names tools without arguments."""
    found = []
    for block in blocks('shell', 'bash'):
        text = re.sub(r'\\\n', lambda _: ' ', block.text)
        lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith('#')]
        found += [block._replace(text=line) for line in lines]
    for page in PAGES:
        text = page.read_text()
        prose = FENCE.sub(lambda match: '\n' * match[0].count('\n'), text)
        for match in INLINE.finditer(prose):
            line = prose[: match.start()].count('\n') + 1
            found.append(Block(page, line, 'inline', ' '.join(match[1].split())))
    return found


def test_blocks_say_what_they_are():
    """A block of another language would be left out of all that follows."""
    for page in PAGES:
        languages = {match[2] for match in FENCE.finditer(page.read_text())}
        assert languages <= {'shell', 'bash', 'python', 'text', 'bibtex'}, page
        assert page.read_text().count('```') == 2 * len(FENCE.findall(page.read_text())), page
    assert len(commands()) > 60 and len(blocks('python')) > 12


# Commands


class Asked(Exception):
    """A script wants its arguments parsed, by this parser."""


@cache
def parser_of(script: Path) -> argparse.ArgumentParser:
    """The parser that a script makes; it gets no further."""

    def stop(parser: argparse.ArgumentParser, *_):
        raise Asked(parser)

    try:
        with (
            mock.patch.object(argparse.ArgumentParser, 'parse_args', stop),
            mock.patch.object(sys, 'path', [str(script.parent), *sys.path]),
        ):
            runpy.run_path(str(script), run_name='__main__')
    except Asked as asked:
        return asked.args[0]
    raise AssertionError(f'{script} did not ask for its arguments')


def parse(script: Path, words: list[str]) -> argparse.Namespace:
    """What the parser of `script` makes of these words.

    Raises:
        ValueError: it does not take them; the message is argparse's.
    """
    if 'argparse' not in script.read_text():  # it takes none
        if words:
            raise ValueError(f'{script.name} takes no arguments, and here are {words}')
        return argparse.Namespace()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return parser_of(script).parse_args(words)
    except SystemExit as end:
        if end.code:
            raise ValueError(printed.getvalue()) from None
        return argparse.Namespace()  # --help


@cache
def check_config(config: str, options: tuple, backbone: str | None, undilate: bool) -> None:
    load_config(
        config,
        options=dict(options),
        work_dir=None,
        launcher='none',
        backbone=backbone,
        undilate=undilate,
        say=lambda *_: None,
    )


def check_script(path: str, words: list[str], files: Path, mention: bool = False) -> None:
    script = ROOT / path
    assert script.is_file(), f'there is no {path}'
    if mention and not words:
        return
    arguments = parse(script, words)
    if config := getattr(arguments, 'config', None):
        here = config if '::' in config else next((p for p in (ROOT / config, files / config) if p.is_file()), None)
        assert here, f'there is no config {config}'
        options = tuple((key, value) for key, value in (getattr(arguments, 'cfg_options', None) or {}).items())
        check_config(str(here), options, getattr(arguments, 'backbone', None), getattr(arguments, 'undilate', False))


def check_make(words: list[str]) -> None:
    targets = re.search(r'^\.PHONY: (.*) FORCE$', MAKEFILE, re.MULTILINE).group(1).split()
    for word in words:
        name, is_variable, _ = word.partition('=')
        known = re.findall(r'^ *(\w+) \??:?= ', MAKEFILE, re.MULTILINE) if is_variable else targets
        assert name in known, f'make knows no {name}'


def check_pip(words: list[str]) -> None:
    verb, *rest = words
    assert verb in ('install', 'uninstall'), verb
    for word in rest:
        if word.startswith('.'):
            assert set(re.findall(r'\w+', word)) <= set(EXTRAS), word
        elif not word.startswith('mmvig-'):
            assert word in ('--no-build-isolation', '--editable', '--upgrade') or Requirement(word), word


def check_command(text: str, files: Path, mention: bool = False) -> None:
    """Raises for a command that would not run where its data and its hardware are."""
    words = shlex.split(text, comments=True)
    while words and re.match(r'[A-Z_]+=', words[0]):
        del words[0]
    match words:
        case ['make', *rest]:
            check_make(rest)
        case ['pip', *rest] | ['python', '-m', 'pip', *rest]:
            check_pip(rest)
        case ['python', '-c', code]:
            check_python(code)
        case ['python' | 'python3', '-m', 'venv', _]:
            pass
        case ['python', '-m', 'mmvig'] | ['python', '-m', 'mmvig', 'TOOL']:
            pass
        case ['python', '-m', 'mmvig', tool, *rest]:
            check_script(f'tools/{tool}.py', rest, files, mention)
        case ['python', '-m', 'build', *rest]:
            assert rest in ([], ['--no-isolation'])
        case ['python', path, *rest]:
            check_script(path, rest, files, mention)
        case ['torchrun', *rest]:
            launched = get_args_parser().parse_args(rest)
            check_script(launched.training_script, launched.training_script_args, files)
        case ['bash', path, config, gpus, *rest] if path in ('tools/dist_train.sh', 'tools/dist_test.sh'):
            assert (ROOT / path).is_file() and gpus.isdigit()
            check_script(path.replace('dist_', '').replace('.sh', '.py'), [config, *rest], files)
        case ['source', path]:
            assert re.fullmatch(r'[\w.-]+/bin/activate', path)
        case ['cd' | 'mkdir', _] | ['git', 'clone', _] | ['git', 'clone', _, _]:
            pass
        case _:
            raise ValueError(f'a command that this test cannot check: teach it to check_command: {text}')


@pytest.fixture(scope='module', autouse=True)
def _read_metafiles_once() -> Iterator[None]:
    """MMEngine reads all metafiles of a library for each `library::...`."""
    with mock.patch.object(mmengine.config.utils, 'load', cache(mmengine.config.utils.load)):
        yield


@pytest.fixture(scope='session')
def files(tmp_path_factory) -> Path:
    """The files whose contents the documents show, under the names in their first lines: `# name.py`."""
    folder = tmp_path_factory.mktemp('documents')
    for block in blocks('python'):
        if name := re.match(r'# ([\w.-]+\.py)\n', block.text):
            assert not (folder / name[1]).exists(), f'{block}: {name[1]} is shown twice'
            (folder / name[1]).write_text(block.text)
    return folder


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands(page, files):
    for command in commands():
        if command.page == page:
            try:
                check_command(command.text, files, mention=command.language == 'inline')
            except Exception as error:
                raise AssertionError(f'{command}: {command.text}\n{error or repr(error)}') from error


COCO = 'configs/mmdet/vigh/mask-rcnn_vigh-gla-tiny_fpn_1x_coco.py'
RETINANET = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'


@pytest.mark.parametrize(
    'command, reason',
    [
        (f'python tools/train.py {COCO} --no-such-flag', 'unrecognized arguments: --no-such-flag'),
        ('python tools/train.py', 'required: config'),
        ('python tools/train.py configs/no-such-config.py', 'there is no config'),
        ('python tools/train.py mmdet::retinanet/no-such-config.py', 'has no config'),
        (f'python tools/train.py {RETINANET} --cfg-options train_cfg.no_such_key=1', 'matches nothing'),
        (f'python tools/train.py {RETINANET} --backbone no-such-backbone', 'no-such-backbone'),
        ('python tools/no_such_tool.py', 'there is no tools/no_such_tool.py'),
        ('python tools/doctor.py --verbose', 'takes no arguments'),
        (f'torchrun --nproc_per_node 8 tools/train.py {RETINANET} --launched pytorch', 'unrecognized arguments'),
        ('python -m mmvig no_such_tool', 'there is no tools/no_such_tool.py'),
        ('make no-such-target', 'make knows no no-such-target'),
        ('make quickstart NO_SUCH=1', 'make knows no NO_SUCH'),
        ('pip install ".[no_such_extra]"', 'no_such_extra'),
        ('python -c "from mmvig.apis import no_such_function"', 'cannot import name'),
        ('python -c "import mmvig; mmvig.swap_backbone(1, 2, 3)"', 'too many positional'),
        ('conda install mmvig', 'cannot check'),
    ],
)
def test_what_does_not_exist_fails(command, reason, files):
    with pytest.raises(Exception, match=reason):
        check_command(command, files)


# Python


def check_python(code: str) -> None:
    """Runs the imports and compares every call of something imported with its signature."""
    tree, names = ast.parse(code), {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), '<document>', 'exec'), names)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not re.fullmatch(r'[\w.]+', name := ast.unparse(node.func)):
            continue
        if name.split('.')[0] in names:
            called = eval(name, names)  # raises where there is no such attribute
            try:
                signature = inspect.signature(called)
            except ValueError:  # some of torch's own have none
                continue
            unpacked = any(isinstance(argument, ast.Starred) for argument in node.args)
            bind = signature.bind_partial if unpacked else signature.bind
            given = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
            bind(*given, **{keyword.arg: None for keyword in node.keywords if keyword.arg})  # TypeError


@pytest.mark.parametrize('block', blocks('python'), ids=str)
def test_python(block, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if '_base_ =' in block.text:
        name = re.match(r'# ([\w.-]+\.py)\n', block.text)
        path = files / (name[1] if name else f'{block.line}.py')
        path.write_text(block.text)
        check_model(Config.fromfile(path))
        return
    check_python(block.text)
    if not any(word in block.text for word in NOT_HERE):
        names = {name: -torch.rand(shape) for name, shape in TENSORS.items()}
        for name, shapes in (('parameters', MIXER), ('weights', FIRST_HALF)):
            names[name] = [torch.rand(shape) for shape in shapes]
        exec(compile(block.text, str(block), 'exec'), names)


def check_model(config: Config) -> None:
    """Where the config names a backbone of ours, it can be built and what reads it has its widths."""
    init_default_scope(config.default_scope)
    if config.model.backbone.type.startswith('mmvig.'):
        with torch.device('meta'):
            backbone = MODELS.build(dict(config.model.backbone, init_cfg=None))
        reader = config.model.get('neck', config.model.get('decode_head', {}))
        if 'in_channels' in reader:
            assert list(backbone.out_channels) == list(reader.in_channels)


# Links, names and messages


def anchors(page: Path) -> set[str]:
    """Of the headings, as the hosting site and MkDocs make them of plain words."""
    headings = re.findall(r'^#+ (.*)$', FENCE.sub('', page.read_text()), re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading.lower()).strip().replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', FENCE.sub('', page.read_text())):
        if '://' not in target:
            path, _, anchor = target.partition('#')
            file = (page.parent / path).resolve() if path else page
            assert file.exists() and file.is_relative_to(ROOT), f'{page}: {target}'
            assert not anchor or anchor in anchors(file), f'{page}: {target}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_addresses_are_there(page):
    text = page.read_text()
    assert not [path for path in re.findall(r'\btools/\w+\.(?:py|sh)\b', text) if not (ROOT / path).is_file()]
    addresses = re.findall(r'mmvig::([\w/.-]+\.py)', text)
    assert all((ROOT / 'configs' / address).is_file() for address in addresses)


def test_tree_of_the_readme():
    readme = (ROOT / 'README.md').read_text()
    tree = re.search(r'## Where things are\n\n```text\n(.*?)```', readme, re.DOTALL).group(1)
    assert all((ROOT / line.split()[0]).is_dir() for line in tree.splitlines())


def strings() -> Iterator[str]:
    """The fixed parts of every string in the sources."""
    for folder in ('mmvig', 'kernels', 'tools'):
        for path in (ROOT / folder).rglob('*.py'):
            if '.mim' not in path.parts:
                for node in ast.walk(ast.parse(path.read_text())):
                    if isinstance(node, ast.Constant) and isinstance(node.value, str):
                        yield node.value


def test_messages_of_the_questions_are_real():
    """Headings under "Messages of mmvig" quote our errors, `...` for what varies."""
    page = (ROOT / 'docs' / 'faq.md').read_text()
    section = page.partition('## Messages of mmvig\n')[2].partition('\n## ')[0]
    quotes = re.findall(r'^### `(.*)`$', section, re.MULTILINE)
    source = '\n'.join(strings())
    assert len(quotes) > 8
    missing = [part for quote in quotes for part in quote.split('...') if part.strip() and part.strip() not in source]
    assert not missing


def test_issue_templates_and_citation_are_forms():
    from yaml import safe_load

    forms = sorted((ROOT / '.github' / 'ISSUE_TEMPLATE').glob('*.yml'))
    assert len(forms) >= 3
    for form in forms:
        content = safe_load(form.read_text())
        if form.stem != 'config':
            assert {'name', 'description', 'body'} <= content.keys()
            assert all(part['type'] == 'markdown' or part['attributes']['label'] for part in content['body'])
            ids = [part['id'] for part in content['body'] if 'id' in part]
            assert len(ids) == len(set(ids))
    citation = safe_load((ROOT / 'CITATION.cff').read_text())
    assert {'cff-version', 'message', 'title', 'authors', 'preferred-citation'} <= citation.keys()
    assert citation['version'] == mmvig.__version__

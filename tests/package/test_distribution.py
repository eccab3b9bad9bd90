"""The wheel, the sdist and the editable installation: what they hold, and that `mmvig::...` resolves from them."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PIP_INTO = (sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target')
NANO = 'mmdet/digits/mask-rcnn_vigh-gla-nano_fpn_quickstart_digits.py'
CONFIG = 'mmdet/vigh/mask-rcnn_vigh-gla-tiny_fpn_1x_coco.py'

# Run from an unrelated folder, in a process that sees `{site}` before the packages of this environment.
USE = f"""
import site
site.addsitedir({{site!r}})
site.addsitedir({sysconfig.get_path('purelib')!r})
import mmvig, bigla
from mmengine.config import Config
from mmengine.hub import get_config, get_model
from mmengine.registry import MODELS, DefaultScope
assert mmvig.__file__.startswith({{home!r}}) and bigla.__file__.startswith({{home!r}}), (mmvig.__file__, bigla.__file__)
open('leaf.py', 'w').write("_base_ = 'mmvig::{CONFIG}'")
for config in (Config.fromfile('leaf.py'), get_config('mmvig::{CONFIG}')):
    assert config.model.backbone.type == 'mmvig.ViGH'
    with DefaultScope.overwrite_default_scope('mmdet'):
        backbone = MODELS.build(dict(type='mmvig.ViGH', arch=config.model.backbone.arch))
    assert list(backbone.out_channels) == config.model.neck.in_channels
assert type(get_model('mmvig::{NANO}')).__name__ == 'MaskRCNN'
from mmvig.apis import find_model, list_models
assert len(list_models()) > 80
for entry in map(find_model, list_models()):
    assert entry.config.is_file() and str(entry.config).startswith({{home!r}}), entry
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='session')
def source(tmp_path_factory) -> Path:
    """A copy of what the packages are built from: building writes beside the sources."""
    copy = tmp_path_factory.mktemp('source')
    junk = shutil.ignore_patterns('__pycache__', '.mim')
    for folder in ('mmvig', 'kernels', 'configs', 'tools', 'requirements'):
        shutil.copytree(ROOT / folder, copy / folder, ignore=junk)
    for name in ('LICENSE', 'MANIFEST.in', 'Makefile', 'README.md', 'model-index.yml', 'pyproject.toml', 'setup.py'):
        shutil.copy2(ROOT / name, copy)
    return copy


@pytest.fixture(scope='session')
def built(source) -> Path:
    """The folder of the sdist, and of the wheel that is built from it."""
    run(sys.executable, '-m', 'build', '--no-isolation', cwd=source)
    return source / 'dist'


@pytest.fixture(scope='session')
def wheel(built) -> Path:
    (wheel,) = built.glob('*.whl')
    return wheel


@pytest.fixture(scope='session')
def editable(source, tmp_path_factory) -> Path:
    """What `pip install --editable` makes of `source` and installs."""
    out = tmp_path_factory.mktemp('editable')
    build = 'import sys; from setuptools.build_meta import build_editable as build; build(sys.argv[1])'
    run(sys.executable, '-c', build, out, cwd=source)
    (wheel,) = out.glob('*.whl')
    return wheel


def test_wheel_holds_packages_and_configs_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split('/')[0].split('-')[0] for name in names} == {'mmvig', 'bigla'}
    for folder, home in (('mmvig', 'mmvig'), ('kernels/bigla', 'bigla')):
        sources = (ROOT / folder).rglob('*.py')
        wanted = {f'{home}/{path.relative_to(ROOT / folder)}' for path in sources if '.mim' not in path.parts}
        assert wanted <= names
    for folder in ('configs', 'tools'):
        assert {f'mmvig/.mim/{path.relative_to(ROOT)}' for path in (ROOT / folder).rglob('*.py')} <= names
    assert 'mmvig/.mim/model-index.yml' in names
    assert not [name for name in names if 'test_' in name or '__pycache__' in name]


def test_sdist_holds_files_only(built):
    """A link into the source tree would be dead elsewhere."""
    (sdist,) = built.glob('*.tar.gz')
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if not (member.isfile() or member.isdir())]
    names = {member.name.partition('/')[2] for member in members}
    assert {'setup.py', f'configs/{CONFIG}', 'kernels/bigla/api.py', 'requirements/runtime.txt', 'LICENSE'} <= names
    assert not [name for name in names if '.mim' in name]


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith('.dist-info/METADATA')]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata['Name'] == 'mmvig'
    assert metadata['License-Expression'] == 'Apache-2.0'
    assert set(metadata['Requires-Python'].split(',')) == {'>=3.10', '<3.14'}
    requirements = [Requirement(line) for line in metadata.get_all('Requires-Dist')]
    always = {requirement.name: requirement for requirement in requirements if requirement.marker is None}
    assert str(always['torch'].specifier) == '>=2.4'
    # a fork under another distribution name must be able to serve the imports
    assert not [name for name in always if canonicalize_name(name).startswith(('mm', 'onedl', 'openmim', 'opencv'))]
    assert {'mmdet', 'mmseg', 'mmpretrain', 'all'} <= set(metadata.get_all('Provides-Extra'))
    for extra in ('mmdet', 'mmseg', 'mmpretrain'):
        names = {r.name for r in requirements if r.marker and r.marker.evaluate({'extra': extra})}
        assert {'mmengine', 'mmcv-lite'} <= names and 'mmcv' not in names


@pytest.mark.parametrize('kind', ['wheel', 'editable'])
def test_addresses_and_types_resolve(kind, source, request, tmp_path):
    site, cwd = tmp_path / 'site', tmp_path / 'elsewhere'
    cwd.mkdir()
    home = source if kind == 'editable' else site
    package = request.getfixturevalue(kind)
    run(*PIP_INTO, site, package, cwd=cwd)
    run(sys.executable, '-S', '-c', USE.format(site=str(site), home=str(home)), cwd=cwd)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quickstart_of_an_installed_wheel(wheel, tmp_path):
    """In an empty folder, without a clone; PYTHONPATH goes before the packages of this environment."""
    site, cwd = tmp_path / 'site', tmp_path / 'elsewhere'
    cwd.mkdir()
    run(*PIP_INTO, site, wheel, cwd=cwd)
    command = (sys.executable, '-m', 'mmvig')
    assert str(site / 'mmvig' / '.mim' / 'tools') in run(*command, cwd=cwd, PYTHONPATH=str(site))
    run(*command, 'quickstart', '--short', cwd=cwd, PYTHONPATH=str(site))
    results = cwd / 'work_dirs' / 'quickstart-short'
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= json.loads((results / 'metrics.json').read_text()).keys()
    assert (results / 'training.png').is_file() and list((results / 'predictions').glob('*.jpg'))
    dump = (results / 'mask-rcnn_vigh-gla-nano_fpn_quickstart_digits.py').read_text()
    assert str(ROOT) not in dump


def test_editable_installation_follows_the_configs(editable, source):
    """`mmvig/.mim` links to the folders, so a config that is written later has an address too."""
    late = source / 'configs' / 'late.py'
    late.write_text('')
    assert (source / 'mmvig' / '.mim' / 'configs' / 'late.py').samefile(late)


@pytest.mark.parametrize('package', ['mmvig', 'bigla'])
def test_import_is_light(package, tmp_path):
    heavy = {'triton', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'transformers'}
    code = 'import sys, torch; before = set(sys.modules); import {}; print(*set(sys.modules) - before)'
    assert not heavy & set(run(sys.executable, '-c', code.format(package), cwd=tmp_path).split())

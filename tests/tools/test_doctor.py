"""`tools/doctor.py` here, in an environment of nothing but Python, and in broken ones."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import mmengine
import pytest

from mmvig.compat import doctor

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools' / 'doctor.py'


def run(*command: str, **environ: str) -> tuple[int, str]:
    environ = os.environ | environ | {'COLUMNS': '200'}
    result = subprocess.run([sys.executable, '-W', 'ignore', *command], env=environ, capture_output=True, text=True)
    assert 'Traceback' not in result.stderr, result.stderr
    return result.returncode, result.stdout


def run_blocked(*blocked: str) -> tuple[int, str]:
    """Where these modules cannot be imported."""
    code = (
        f'import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n'
        'from mmvig.compat.doctor import main; raise SystemExit(main())'
    )
    return run('-c', code)


def test_this_environment():
    status, text = run(str(TOOL))
    assert status == 0, text
    found = {name: version(name) for name in ('torch', 'torchvision', 'numpy')} | dict(mmengine=mmengine.__version__)
    for name, release in found.items():
        assert re.search(rf'{name} .*{re.escape(release)}', text), name
    assert 'PROBLEM' not in text and text.rstrip().endswith('training and testing work here')


def test_nothing_but_python():
    """-S leaves out the installed packages, and PYTHONPATH any others."""
    status, text = run('-S', str(TOOL), PYTHONPATH=str(ROOT))
    assert status == 1
    for line in ('PROBLEM    torch is not installed', 'PROBLEM    none of mmdet, mmseg and mmpretrain works'):
        assert line in text
    assert 'pip install torch torchvision' in text and 'mmcv operators' not in text


def test_nothing_but_python_and_torch():
    names = ('cv2', 'mmcv', 'mmdet', 'mmengine', 'mmpretrain', 'mmseg', 'numpy', 'rich', 'torchvision')
    status, text = run_blocked(*names)
    assert status == 1
    assert re.search(r'^torch  .*\d', text, re.MULTILINE) and '┃' not in text
    assert 'PROBLEM    mmengine' in text


def library(**kwargs) -> doctor.Library:
    fields = dict(name='json', distributions=('json',), purpose='tests', cure='pip install it', modules=('json',))
    return doctor.Library(**(fields | kwargs))


def check(library: doctor.Library, **kwargs) -> tuple[bool, list[doctor.Part], list[doctor.Problem]]:
    parts, problems = [], []
    return doctor._check_library(library, parts, problems, **kwargs), parts, problems


@pytest.mark.parametrize('working', [0, 1, 2])
def test_one_task_library_is_enough(working: int, monkeypatch):
    for group in ('ESSENTIAL', 'EXTRAS'):
        monkeypatch.setattr(doctor, group, ())
    absent = library(name='mm_absent', modules=('mm_absent',))
    monkeypatch.setattr(doctor, 'TASKS', (library(),) * working + (absent,) * (3 - working))
    _, problems = doctor.examine()
    assert any(problem.essential for problem in problems) == (working == 0)


def test_a_missing_library():
    missing = library(name='mm_absent', modules=('mm_absent',))
    works, [part], [problem] = check(missing, essential=True)
    assert not works and part.version is None and not part.works
    assert problem == doctor.Problem('mm_absent is not installed (tests)', 'pip install it', essential=True)
    works, [part], problems = check(missing)
    assert not works and part.works and not problems


@pytest.mark.parametrize(
    ('raised', 'cure'),
    [
        ('ImportError("libGL.so.1: cannot open shared object file")', 'opencv-python-headless'),
        ('RuntimeError("operator torchvision::nms does not exist")', 'pip install --upgrade torch torchvision'),
        ('AssertionError("MMCV==2.2.0 is used but incompatible.")', 'mmcv-lite==2.1.0'),
        ('AssertionError("MMEngine==0.7.0 is used but incompatible.")', 'mmengine==0.10.7'),
        ('ModuleNotFoundError("No module named \'shapely\'")', 'pip install shapely'),
        ('ModuleNotFoundError("No module named \'imgaug\'")', 'pip install imaug'),
        ('SystemError("odd")', 'pip install it'),
    ],
)
def test_a_broken_library(raised: str, cure: str, tmp_path, monkeypatch):
    (tmp_path / 'mm_broken.py').write_text(f'raise {raised}')
    monkeypatch.syspath_prepend(tmp_path)
    works, [part], [problem] = check(library(name='mm_broken', modules=('mm_broken',)), essential=True)
    assert not works and not part.works and problem.essential
    assert problem.what.startswith('mm_broken is installed and does not import: ') and cure in problem.cure


def test_two_distributions_of_one_module(monkeypatch):
    monkeypatch.setattr(doctor, 'distribution_version', dict(a='1', b='2').get)
    works, [part], [problem] = check(library(distributions=('a', 'b')))
    assert works and part.version == '1 (a)'
    assert problem.what == 'a and b both install json and overwrite each other'
    assert problem.cure == 'pip uninstall a b; pip install it'


@pytest.mark.parametrize(('release', 'works'), [((3, 9), False), ((3, 10), True), ((3, 13), True), ((3, 14), False)])
def test_python_versions(release: tuple[int, int], works: bool, monkeypatch):
    parts, problems = [], []
    monkeypatch.setattr(doctor.sys, 'version_info', (*release, 0, 'final', 0))
    doctor._check_python(parts, problems)
    assert parts[0].works == works and any('Python' in problem.what for problem in problems) != works


def test_distutils_without_setuptools(monkeypatch):
    problems = []
    monkeypatch.setattr(doctor, 'installed', lambda name: name != 'distutils')
    doctor._check_python([], problems)
    assert problems == [
        doctor.Problem('MMEngine reports its environment through distutils', 'pip install setuptools', True)
    ]

"""What is installed, what mmvig stands in for, and what will not work: the findings behind `tools/doctor.py`.

Nothing here needs more than Python: a missing or broken package is a finding, never an exception.
"""

import importlib
import sys
import warnings
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import mmvig
from mmvig import compat
from mmvig.compat import mmcv_ext
from mmvig.compat.imports import distribution_version, installed

__all__ = ['Part', 'Problem', 'examine', 'main']


class Part(NamedTuple):
    """A line of the table: a part, the version found or None, what it is, and whether it works."""

    name: str
    version: str | None
    remark: str
    works: bool = True


class Problem(NamedTuple):
    """What does not work, what to do about it, and whether no training is possible before that is done."""

    what: str
    cure: str
    essential: bool = False


class Library(NamedTuple):
    """A library by its import name, with the distributions that bring it and the modules whose import proves it."""

    name: str
    distributions: tuple[str, ...]
    purpose: str
    cure: str
    modules: tuple[str, ...]


ESSENTIAL = (
    Library('numpy', ('numpy',), 'arrays', 'pip install numpy', ('numpy',)),
    Library('torch', ('torch',), 'tensors', 'pip install torch torchvision', ('torch',)),
    Library('torchvision', ('torchvision',), 'detection operators', 'pip install torchvision', ('torchvision.ops',)),
    Library(
        'cv2',
        ('opencv-python-headless', 'opencv-python'),
        'reading images',
        'pip install opencv-python-headless',
        ('cv2',),
    ),
    Library(
        'mmengine',
        ('mmengine', 'mmengine-lite', 'onedl-mmengine'),
        'training and testing loops',
        'pip install mmengine==0.10.7',
        ('mmengine.runner',),
    ),
    Library(
        'mmcv',
        ('mmcv-lite', 'mmcv', 'onedl-mmcv'),
        'data transforms, operators',
        'pip install mmcv-lite==2.1.0',
        ('mmcv', 'mmcv.ops'),
    ),
)
TASKS = (
    Library(
        'mmdet',
        ('mmdet', 'onedl-mmdetection'),
        'detection',
        'pip install mmdet==3.3.0 pycocotools',
        ('mmdet.datasets', 'mmdet.models'),
    ),
    Library(
        'mmseg',
        ('mmsegmentation', 'onedl-mmsegmentation'),
        'segmentation',
        'pip install mmsegmentation==1.2.2',
        ('mmseg.datasets', 'mmseg.models'),
    ),
    Library(
        'mmpretrain',
        ('mmpretrain', 'onedl-mmpretrain'),
        'classification',
        'pip install mmpretrain==1.2.0',
        ('mmpretrain.datasets', 'mmpretrain.models'),
    ),
)
EXTRAS = (  # looked up, not imported
    Library('triton', ('triton',), 'fast kernels on GPUs', 'pip install triton', ()),
    Library('pycocotools', ('pycocotools',), 'COCO data and AP', 'pip install pycocotools', ()),
    Library('sklearn', ('scikit-learn',), 'the scans of the digit scenes', 'pip install scikit-learn', ()),
    Library('transformers', ('transformers',), 'image-and-text models of mmpretrain, if you want them', '', ()),
    Library('setuptools', ('setuptools',), 'building packages', '', ()),
)
# Where `pip install` of the module's name would bring something else: onedl-mmdetection imports the heir of imgaug.
RENAMED = {'imgaug': 'imaug'}


def examine() -> tuple[list[Part], list[Problem]]:
    """Look at every part of this environment, by importing it."""
    parts = [Part('mmvig', mmvig.__version__, 'this project')]
    problems: list[Problem] = []
    _check_python(parts, problems)
    for library in ESSENTIAL:
        _check_library(library, parts, problems, essential=True)
    working = [_check_library(library, parts, problems) for library in TASKS]
    if not any(working):
        problems.append(Problem('none of mmdet, mmseg and mmpretrain works', TASKS[0].cure, essential=True))
    for library in EXTRAS:
        version = _version(library)
        parts.append(Part(library.name, version, library.purpose))
        if version is None and library.cure:
            problems.append(Problem(f'{library.name} is not installed ({library.purpose})', library.cure))
    _check_devices(parts)
    _check_operators(parts, problems)
    _check_numpy(problems)
    return parts, problems


def _check_python(parts: list[Part], problems: list[Problem]) -> None:
    fits = (3, 10) <= sys.version_info[:2] <= (3, 13)
    parts.append(Part('Python', sys.version.split()[0], sys.executable, fits))
    if not fits:
        problems.append(Problem('OpenMMLab runs on Python 3.10 to 3.13', 'make an environment of Python 3.11', True))
    if not installed('distutils'):
        problems.append(Problem('MMEngine reports its environment through distutils', 'pip install setuptools', True))


def _check_library(library: Library, parts: list[Part], problems: list[Problem], essential: bool = False) -> bool:
    """Whether a library works; one that is there and does not is a problem, and so is a missing one if essential."""
    version = _version(library)
    if version is None and not installed(library.name):
        parts.append(Part(library.name, None, library.purpose, not essential))
        if essential:
            problems.append(Problem(f'{library.name} is not installed ({library.purpose})', library.cure, True))
        return False
    both = [name for name in library.distributions if distribution_version(name)]
    if len(both) > 1:
        what = f'{" and ".join(both)} both install {library.name} and overwrite each other'
        problems.append(Problem(what, f'pip uninstall {" ".join(both)}; {library.cure}'))
    errors = [error for _, error in map(_import, library.modules) if error]
    parts.append(Part(library.name, version or 'unknown version', library.purpose, not errors))
    if errors:
        what = f'{library.name} is installed and does not import: {errors[0]}'
        problems.append(Problem(what, _known_cure(errors[0]) or library.cure, essential))
    return not errors


def _import(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and the reason on one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return importlib.import_module(name), ''
    except Exception as error:  # versions asserted, a library of the system missing: all of it is for the report
        return None, ' '.join(f'{type(error).__name__}: {error}'.split())


def _known_cure(error: str) -> str | None:
    """The cure for failures that many have met."""
    if 'libGL' in error:
        return 'pip uninstall opencv-python; pip install opencv-python-headless, which needs no display'
    if 'torchvision::' in error or 'undefined symbol' in error:
        return 'install packages built for one another: pip install --upgrade torch torchvision, and mmcv-lite for mmcv'
    if 'MMCV==' in error:
        return 'pip uninstall mmcv mmcv-lite; pip install mmcv-lite==2.1.0'
    if 'MMEngine==' in error:
        return 'pip install mmengine==0.10.7'
    if missing := error.partition('No module named ')[2].strip('\'"'):
        package = missing.partition('.')[0]
        return f'pip install {RENAMED.get(package, package)}'
    return None


def _check_devices(parts: list[Part]) -> None:
    torch, _ = _import('torch')
    if torch is None:
        return
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        name = f'{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, compute capability {major}.{minor}'
        parts.append(Part('GPU', f'CUDA {torch.version.cuda}', name))
    elif torch.version.cuda:
        parts.append(
            Part('GPU', None, f'torch is built for CUDA {torch.version.cuda} and sees no GPU: runs on the CPU')
        )
    else:
        parts.append(Part('GPU', None, 'torch is built for the CPU alone'))


def _check_operators(parts: list[Part], problems: list[Problem]) -> None:
    """Whether mmcv's operators are compiled or stood in for."""
    if not installed('mmcv'):
        return
    if mmcv_ext.has_real_extension():
        parts.append(Part('mmcv operators', 'compiled', "mmcv's own", not _import('mmcv._ext')[1]))
        return
    parts.append(Part('mmcv operators', 'stand-in', 'enough for the usual detectors', not _import('mmcv._ext')[1]))
    problems.append(
        Problem(
            'operators without a stand-in raise when they are called: rotated boxes, CARAFE, PSANet, '
            'masked convolution, point clouds and others that the usual configs do without',
            mmcv_ext.CURE,
        )
    )


def _check_numpy(problems: list[Problem]) -> None:
    numpy, _ = _import('numpy')
    if numpy is not None and not hasattr(numpy, 'in1d') and find_spec('mmpretrain'):
        what = 'the retrieval metrics of mmpretrain use np.in1d, which numpy 2.4 removed'
        problems.append(Problem(what, 'pip install "numpy<2.4", if you train for retrieval'))


def _version(library: Library) -> str | None:
    """The version that is installed, with the name of its distribution where that is not the import name."""
    for name in library.distributions:
        if version := distribution_version(name):
            return version if name == library.name else f'{version} ({name})'
    return None


# Telling it


def main() -> int:
    """Print the findings; 0 where everything essential works, 1 otherwise."""
    parts, problems = examine()
    lines = []
    for change in compat.report():
        lines += [('mended', change.name, 'green'), ('why', change.cause, ''), ('how', change.action, '')]
        lines += [('cure', change.cure, ''), ('', '', '')]
    for problem in sorted(problems, key=lambda problem: problem.essential):
        label, style = ('PROBLEM', 'bold red') if problem.essential else ('limited', 'yellow')
        lines += [(label, problem.what, style), ('cure', problem.cure, ''), ('', '', '')]
    if repairs := sum(problem.essential for problem in problems):
        lines.append(('not ready', f'{repairs} to repair before anything trains: see PROBLEM above', 'bold red'))
    else:
        lines.append(('ready', 'training and testing work here', 'bold green'))
    show = _show_rich if installed('rich') else _show_plain
    show(parts, lines)
    return int(repairs > 0)


def _show_rich(parts: list[Part], lines: list[tuple[str, str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table('part', 'found', 'what it is for')
    for part in parts:
        style = 'green' if part.version and part.works else 'yellow' if part.works else 'bold red'
        table.add_row(part.name, Text(part.version or 'none', style), Text(part.remark))
    notes = Table.grid(padding=(0, 2))
    for label, text, style in lines:
        notes.add_row(Text(label, style or 'dim'), Text(text, style))
    Console().print(table, notes, sep='\n')


def _show_plain(parts: list[Part], lines: list[tuple[str, str, str]]) -> None:
    for part in parts:
        print(f'{part.name:<16}{(part.version or "none") + ("" if part.works else " (!)"):<32}{part.remark}')
    print()
    for label, text, _ in lines:
        print(f'{label:<11}{text}'.rstrip())

"""The one step that pyproject.toml cannot state: `mmvig/.mim`, where MMEngine looks for the configs of a package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM = ('configs', 'tools', 'model-index.yml')


class BuildWithMim(build_py):
    """Adds `mmvig/.mim`: copies in a wheel, links in the source tree for an editable installation."""

    def run(self) -> None:
        super().run()
        home = ROOT if self.editable_mode else Path(self.build_lib)
        mim = home / 'mmvig' / '.mim'
        shutil.rmtree(mim, ignore_errors=True)  # a config deleted since the last build must not live on
        mim.mkdir(parents=True)
        for name in MIM:
            if self.editable_mode:
                (mim / name).symlink_to(Path('..', '..', name))
            elif (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, mim / name, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy2(ROOT / name, mim / name)


setup(cmdclass={'build_py': BuildWithMim})

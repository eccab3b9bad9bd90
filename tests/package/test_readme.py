"""What the README tells people to type."""

import re
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import mmvig  # noqa: F401  before the OpenMMLab libraries

ROOT = Path(__file__).parents[2]
README = (ROOT / 'README.md').read_text()


def test_config_swap(tmp_path):
    (example,) = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    (tmp_path / 'config.py').write_text(example)
    config = Config.fromfile(tmp_path / 'config.py')
    init_default_scope(config.default_scope)
    backbone = MODELS.build(config.model.backbone)
    assert list(backbone.out_channels) == config.model.neck.in_channels


def test_commands_and_files_are_there():
    makefile = (ROOT / 'Makefile').read_text()
    targets = set(re.findall(r'^([a-z-]+):', makefile, re.MULTILINE))
    assert {'quickstart', 'test'} <= set(re.findall(r'(?:^|`)make ([a-z-]+)', README, re.MULTILINE)) <= targets
    assert not [path for path in re.findall(r'\btools/\w+\.py', README) if not (ROOT / path).is_file()]
    addresses = re.findall(r'mmvig::([\w/.-]+\.py)', README)
    assert addresses and all((ROOT / 'configs' / address).is_file() for address in addresses)
    tree = re.search(r'## Where things are\n\n```\n(.*?)```', README, re.DOTALL).group(1)
    assert all((ROOT / line.split()[0]).is_dir() for line in tree.splitlines())
    extras = set(re.findall(r'`?\[(mm\w+|all)\]', README))
    assert extras <= set(re.findall(r'^(\w+) = \[', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE))

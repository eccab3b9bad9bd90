"""`python -m mmvig TOOL ...`: the tools, also where mmvig is installed without its repository."""

import ast
import os
import sys
from pathlib import Path

from mmvig.utils.home import home


def main() -> None:
    tools = {path.stem: path for path in sorted(home().glob('tools/*.py'))}
    name, *arguments = sys.argv[1:] or ['--help']
    if name in tools:
        os.execv(sys.executable, [sys.executable, str(tools[name]), *arguments])
    if name not in ('-h', '--help'):
        sys.exit(f'python -m mmvig: there is no tool {name!r}; it has {", ".join(tools)}')
    print(f'usage: python -m mmvig TOOL ...\n\nThe tools, which are files in {home() / "tools"}; each has a --help:\n')
    for tool, path in tools.items():
        print(f'  {tool:<20}{_summary(path)}')


def _summary(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]


if __name__ == '__main__':
    main()

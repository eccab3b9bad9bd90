"""From nothing to a trained detector, its AP and pictures of what it sees; called again, it goes on where it stopped.

    python tools/quickstart.py      in a clone, as `make quickstart` does
    python -m mmvig quickstart      from an installed mmvig, in any folder

Writes `data/digit_scenes` and `work_dirs/quickstart` in the folder that it is called in.
"""

import argparse
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

TOOLS = Path(__file__).parent
DATA = Path('data/digit_scenes')
CONFIG = 'mmvig::mmdet/digits/mask-rcnn_vigh-gla-nano_fpn_quickstart_digits.py'
SHORT = ['train_cfg.max_epochs=1', '+train_dataloader.dataset.indices=24']
SHORT += [f'+{part}_dataloader.dataset.indices=8' for part in ('val', 'test')]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--short', action='store_true', help='a handful of scenes: everything runs, nothing is learned')
    args = parser.parse_args()
    work_dir = Path('work_dirs', 'quickstart-short' if args.short else 'quickstart')
    options = ['--work-dir', work_dir, *(['--cfg-options', *SHORT] if args.short else [])]
    # Ctrl-C is for the tool that runs, which has things to save. A handler, unlike SIG_IGN, is not inherited.
    signal.signal(signal.SIGINT, lambda *_: None)
    began = time.monotonic()

    def step(title: str, tool: str, *arguments: str | Path) -> None:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        words = [str(word) for word in arguments]
        print(f'\n[{minutes}:{seconds:02}] {title}\n  $ python -m mmvig {tool} {shlex.join(words)}', flush=True)
        done = subprocess.run([sys.executable, TOOLS / f'{tool}.py', *words])
        if done.returncode:
            sys.exit(done.returncode)

    step('1 of 5: writing the digit scenes', 'make_digit_scenes', DATA)
    step('2 of 5: training a Mask R-CNN with a small ViG-H', 'train', CONFIG, '--resume', *options)
    checkpoint = Path(work_dir, 'last_checkpoint').read_text().strip()
    out = ['--out', work_dir / 'metrics.json']
    step('3 of 5: testing it on held-out scenes', 'test', CONFIG, checkpoint, *out, *options)
    scenes = work_dir / 'scenes'
    scenes.mkdir(exist_ok=True)
    for scene in DATA.glob('images/test/00000*.jpg'):
        shutil.copy(scene, scenes)
    out = ['--out-dir', work_dir / 'predictions']
    step('4 of 5: drawing what it sees', 'image_demo', CONFIG, checkpoint, scenes, *out)
    step('5 of 5: drawing how it learned', 'plot_training', work_dir, '--out', work_dir / 'training.png')
    print(
        f'\nDone. Look at\n'
        f'  {work_dir}/predictions    held-out scenes with the boxes and masks that it finds\n'
        f'  {work_dir}/training.png   how it learned\n'
        f'  {work_dir}/metrics.json   its box and mask AP'
    )


if __name__ == '__main__':
    main()

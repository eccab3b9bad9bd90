"""Times models against each other: each in a process of its own, taking turns, with a ratio to a baseline."""

import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection

import torch
from mmengine.logging import MMLogger

import mmvig  # noqa: F401  before mmpretrain is imported, in the processes that import this file first
from mmvig.apis.backbones import BACKBONES
from mmvig.apis.subjects import MODES, PRECISIONS, Setting, Subject, build_backbone
from mmvig.apis.timing import Limits, percentiles, sample

__all__ = ['LAUNCHES', 'Row', 'benchmark', 'best_rows']

# 'graph': replayed as one CUDA graph; of the model of a config, the backbone's part, by torch.compile.
LAUNCHES = ('eager', 'compiled', 'graph', 'compiled-graph')


@dataclass(frozen=True)
class Row:
    """One measured setting of one model; what was not measured is None.

    `p20`, `p50` and `p80` are milliseconds, `peak_mb` the memory in MB (1e6 bytes) that a step takes at its peak beyond
    what was held before it (weights, input, gradients of the outputs), gradients included; None where torch.compile's
    graphs hold it between steps. `gflops` are of the whole batch, a multiply-add as one; a training step counts as
    three forward passes.
    `share` is the part of the `limit` nearest to being reached: 'compute', those FLOPs at the rate of a matrix product,
    or 'bandwidth', the tensors that products, convolutions, attention and scans read and write at the rate of a copy;
    both rates, `matmul_tflops` (two operations a multiply-add) and `copy_gbs`, were measured in the same run.

    `best` marks a model's fastest launch in a setting, `speed` is the time of the fastest of all baselines / this one,
    and `memory` this peak / that of the fastest of all baselines.
    """

    model: str
    height: int
    width: int
    batch: int
    mode: str
    precision: str
    launch: str
    status: str = 'ok'
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    samples: int | None = None
    images_per_second: float | None = None
    peak_mb: float | None = None
    gflops: float | None = None
    limit: str | None = None
    share: float | None = None
    best: bool = False
    speed: float | None = None
    memory: float | None = None
    compile_seconds: float | None = None
    copy_gbs: float | None = None
    matmul_tflops: float | None = None

    @property
    def setting(self) -> Setting:
        return Setting(self.height, self.width, self.batch, self.mode, self.precision)


def benchmark(
    models: list[str],
    settings: list[Setting],
    launches: list[str],
    baselines: list[str],
    device: torch.device,
    *,
    seconds: float = 0.5,
    rounds: int = 1,
    jobs: int = 1,
    timeout: float = 600,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[list[Row]]:
    """Yields the rows of one setting after the other.

    In each setting all models build and compile first, up to `jobs` at a time; then they are timed, one at a time. One
    that runs out of memory, fails, crashes or hangs has that in its rows' `status`, and does not keep the others.

    Args:
        models: names in `BACKBONES`, and files or addresses of OpenMMLab configs; see `Subject`.
        settings: what is timed, in this order.
        launches: of `LAUNCHES`. CUDA graphs are for a GPU, and left out elsewhere, as 'graph' is of models of configs.
        baselines: of `models`; the fastest of them is what speed and memory refer to.
        device: where.
        seconds: of timing for each row.
        rounds: the seconds are spent in this many turns, so that what else the machine does meets all models alike.
        jobs: models that prepare at the same time.
        timeout: seconds after which one that does not answer is ended.
        tell: is told of each model's result in each setting, with the time left.

    Raises:
        ValueError: an argument that cannot work; the message names it and what would.
    """
    _check(models, settings, launches, baselines)
    workers = {model: _Worker(model, device, timeout) for model in models}
    limits: dict[str, Limits] = {}
    began, done = time.monotonic(), 0
    try:
        for setting in settings:
            if setting.precision not in limits:
                limits[setting.precision] = workers[models[0]].ask('limits', PRECISIONS[setting.precision])
            prepared = {}
            for first in range(0, len(models), jobs):
                some = models[first : first + jobs]
                for model in some:
                    workers[model].post('prepare', setting, launches)
                prepared |= {model: workers[model].answer() for model in some}
            timed = {model: {launch: [] for launch in launches} for model in models}
            rows = []
            for round_ in range(rounds):
                for model in models:
                    for launch, turns in timed[model].items():
                        turns.append(workers[model].ask('sample', launch, seconds / rounds))
                    if round_ == rounds - 1:
                        workers[model].ask('release')
                        done += 1
                        left = (time.monotonic() - began) / done * (len(models) * len(settings) - done)
                        some = _rows(model, setting, prepared[model], timed[model], limits[setting.precision])
                        tell(f'{_words(some)} ({left // 60:.0f}:{left % 60:02.0f} left)')
                        rows += some
            yield _compared(rows, baselines)
    finally:
        for worker in workers.values():
            worker.end()


def best_rows(rows: list[Row]) -> list[Row]:
    """A row a setting and model: its fastest launch, or, where none ran, the first."""
    kept = {}
    for row in rows:
        key = row.model, row.setting
        if row.best or key not in kept:
            kept[key] = row
    return list(kept.values())


def _check(models: list[str], settings: list[Setting], launches: list[str], baselines: list[str]) -> None:
    for model in models:
        if model not in BACKBONES and '::' not in model and not model.endswith('.py'):
            raise ValueError(f'models: {model!r} is neither a config nor one of {list(BACKBONES)}')
    if wrong := [model for model in baselines if model not in models]:
        raise ValueError(f'baselines: {wrong} are not among the models that are timed, {models}')
    for name, given, known in (
        ('modes', {setting.mode for setting in settings}, MODES),
        ('precisions', {setting.precision for setting in settings}, list(PRECISIONS)),
        ('launches', set(launches), LAUNCHES),
    ):
        if wrong := sorted(given.difference(known)):
            raise ValueError(f'{name}: {wrong} are unknown; choose from {list(known)}')


@dataclass(frozen=True)
class _Lost:
    """The answer of a process that ended without one."""

    why: str


class _Worker:
    """A process that measures one model; where one was lost, a new one begins with the next setting."""

    def __init__(self, model: str, device: torch.device, timeout: float) -> None:
        self.model, self.device, self.timeout = model, device, timeout
        self.process, self.lost = None, None

    def post(self, *command: object) -> None:
        if self.process is None:
            if self.lost and command[0] != 'prepare':
                return
            context = multiprocessing.get_context('spawn')
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs, self.model, self.device))
            self.process.start()
            theirs.close()
        with suppress(OSError):  # it has ended: `answer` says so
            self.connection.send(command)

    def answer(self) -> object:
        if self.process is None:
            return self.lost
        why = f'no answer in {self.timeout:.0f} s'
        try:
            if self.connection.poll(self.timeout):
                return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            why = f'its process ended with status {self.process.exitcode}'
        self.end()
        self.lost = _Lost(why)
        return self.lost

    def ask(self, *command: object) -> object:
        self.post(*command)
        return self.answer()

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def _serve(connection: Connection, model: str, device: torch.device) -> None:
    """What a process of `_Worker` does: answers commands until there are no more."""
    from mmpretrain.utils import register_all_modules

    warnings.simplefilter('ignore')
    register_all_modules(init_default_scope=False)
    MMLogger.get_current_instance().setLevel('ERROR')
    measuring = _Measuring(model, device)
    with suppress(EOFError):
        while True:
            name, *args = connection.recv()
            connection.send(getattr(measuring, name)(*args))


class _Measuring:
    """What a process of `_Worker` can be asked for; errors of the model come back as words."""

    def __init__(self, model: str, device: torch.device) -> None:
        self.model, self.device = model, device
        self.release()

    def limits(self, dtype: torch.dtype) -> Limits:
        return Limits.measure(self.device, dtype)

    def prepare(self, setting: Setting, launches: list[str]) -> dict:
        """Builds the model, compiles it, counts FLOPs. What fails here for want of memory is tried again alone."""
        self.setting = setting
        self.launches = [name for name in launches if self._serves(name)]
        facts = dict(compile_seconds=None, flops=None, traffic=None)
        if self.model in BACKBONES:
            self._attempt(lambda: facts.update(_count(self.model, setting)))
        if any('compiled' in name for name in self.launches):
            start = time.monotonic()
            if self._attempt(lambda: self._subject().step('default')) == 'ok':
                facts['compile_seconds'] = time.monotonic() - start
            self._clean()
        return facts

    def sample(self, launch: str, seconds: float) -> dict | None:
        """The `status` and, if 'ok', `times` and `peak` memory in bytes; None for what is not to be measured."""
        if launch not in self.launches:
            return None
        result = {}
        result['status'] = self._attempt(partial(self._sample, launch, seconds, result))
        self._clean()
        return result

    def release(self) -> None:
        self.subject, self.steps = None, {}
        self._clean()

    def _serves(self, launch: str) -> bool:
        if self.model not in BACKBONES and launch == 'graph':
            return False
        return self.device.type == 'cuda' or 'graph' not in launch

    def _captures(self, launch: str) -> bool:
        """Whether the whole step is one CUDA graph: a detector's depends on the number of objects."""
        return 'graph' in launch and self.model in BACKBONES

    def _subject(self) -> Subject:
        if self.subject is None:
            self.subject = Subject(self.model, self.setting, self.device)
        return self.subject

    def _sample(self, launch: str, seconds: float, result: dict) -> None:
        subject = self._subject()
        if launch not in self.steps:
            graphs = 'graph' in launch and not self._captures(launch)
            mode = ('reduce-overhead' if graphs else 'default') if 'compiled' in launch else None
            step = partial(subject.step, mode)
            for _ in range(3):  # compiles, tunes, and makes the handles and workspaces that stay
                subject.reset()
                step()
            subject.reset()
            taking = self._captured if self._captures(launch) else lambda step: (step(), step)[1]
            step, peak = self._with_peak(taking, step)
            self.steps[launch] = step, None if graphs else peak  # torch.compile's graphs keep theirs between steps
        step, result['peak'] = self.steps[launch]
        # A graph's gradients have to stay where they are.
        reset = (lambda: None) if self._captures(launch) else subject.reset
        result['times'] = sample(step, seconds, self.device, reset)

    def _captured(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def _with_peak(self, taking: Callable, step: Callable[[], None]) -> tuple[Callable[[], None], int | None]:
        if self.device.type != 'cuda':
            return taking(step), None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step = taking(step)
        torch.cuda.synchronize()
        return step, torch.cuda.max_memory_allocated() - before

    def _attempt(self, action: Callable[[], None]) -> str:
        try:
            action()
        except torch.OutOfMemoryError:
            return 'out of memory'
        except Exception as error:
            if self.device.type == 'cuda':
                torch.cuda.synchronize()  # raises where the device is lost to this process, which then ends
            return f'failed: {type(error).__name__}: {" ".join(str(error).split())[:200]}'
        return 'ok'

    def _clean(self) -> None:
        if self.device.type == 'cuda':
            if self.subject is not None:
                self.subject.reset()
            torch.cuda.empty_cache()


def _count(model: str, setting: Setting) -> dict[str, int]:
    """Multiply-adds and elements moved of a step of a backbone: see `mmvig.apis.flops.Flops`."""
    from mmvig.apis.flops import count_flops

    backbone = build_backbone(model)
    backbone.to('meta').train(False)
    count = count_flops(backbone, partial(backbone, torch.empty(1, 3, setting.height, setting.width, device='meta')))
    times = setting.batch * (3 if setting.mode == 'train' else 1)
    return dict(flops=times * count.flops, traffic=times * count.traffic)


def _rows(
    model: str, setting: Setting, facts: dict | _Lost, timed: dict[str, list], limits: Limits | _Lost
) -> list[Row]:
    """The rows of one model in one setting, not yet compared with others."""
    rows = []
    for launch, turns in timed.items():
        row = Row(model, setting.height, setting.width, setting.batch, setting.mode, setting.precision, launch)
        if lost := next((turn for turn in (facts, *turns) if isinstance(turn, _Lost)), None):
            rows.append(replace(row, status=f'crashed: {lost.why}'))
        elif None not in turns:
            status = next((turn['status'] for turn in turns if turn['status'] != 'ok'), 'ok')
            row = replace(row, status=status, gflops=facts['flops'] and facts['flops'] / 1e9)
            if not isinstance(limits, _Lost):
                row = replace(row, copy_gbs=limits.copy / 1e9, matmul_tflops=limits.matmul / 1e12)
            rows.append(_timed(row, facts, turns) if status == 'ok' else row)
    return rows


def _timed(row: Row, facts: dict, turns: list[dict]) -> Row:
    times, peak = [time for turn in turns for time in turn['times']], turns[0]['peak']
    p20, p50, p80 = percentiles(times)
    if facts['flops'] and row.copy_gbs:
        compute = 2 * facts['flops'] / 1e12 / row.matmul_tflops
        bandwidth = facts['traffic'] * PRECISIONS[row.precision].itemsize / 1e9 / row.copy_gbs
        limit = 'compute' if compute > bandwidth else 'bandwidth'
        row = replace(row, limit=limit, share=max(compute, bandwidth) / (p50 / 1e3))
    return replace(
        row,
        p20=p20,
        p50=p50,
        p80=p80,
        samples=len(times),
        images_per_second=row.batch / (p50 / 1e3),
        peak_mb=None if peak is None else peak / 1e6,
        compile_seconds=facts['compile_seconds'] if 'compiled' in row.launch else None,
    )


def _compared(rows: list[Row], baselines: list[str]) -> list[Row]:
    """The rows of one setting with `best`, `speed` and `memory`."""

    def fastest(models: list[str]) -> Row | None:
        return min((row for row in rows if row.model in models and row.p50), key=lambda row: row.p50, default=None)

    base = fastest(baselines)
    compared = []
    for row in rows:
        if row.p50:
            row = replace(row, best=row == fastest([row.model]))
            if base:
                memory = row.peak_mb / base.peak_mb if row.peak_mb and base.peak_mb else None
                row = replace(row, speed=base.p50 / row.p50, memory=memory)
        compared.append(row)
    return compared


def _words(rows: list[Row]) -> str:
    launches = ', '.join(f'{row.launch} {f"{row.p50:.2f} ms" if row.p50 else row.status}' for row in rows)
    compiled = next((f'; compiled in {row.compile_seconds:.0f} s' for row in rows if row.compile_seconds), '')
    return f'{rows[0].setting} {rows[0].model}: {launches}{compiled}'

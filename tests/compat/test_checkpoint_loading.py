"""Loading what MMEngine saves, and refusing what an attacker would."""

import builtins
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint
from packaging.version import Version
from torch import nn
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals
from torch.utils.data import DataLoader

from mmvig.compat import checkpoint_loading
from mmvig.compat.checkpoint_loading import CheckpointError, load_checkpoint_file


class Model(BaseModel):
    def __init__(self, init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        self.linear = nn.Linear(2, 1)

    def forward(self, x, y, mode='loss'):
        return dict(loss=(self.linear(x) - y).square().mean())


def runner(folder: Path, epochs: int, **kwargs) -> Runner:
    data = [(torch.tensor([i, 1.0]), torch.tensor([2.0 * i])) for i in range(8)]
    return Runner(
        Model(),
        str(folder),
        train_dataloader=DataLoader(data, 2),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-2)),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=4),
            dict(type='CosineAnnealingLR'),
        ],
        experiment_name=folder.name,
        **kwargs,
    )


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    """The checkpoint of one epoch of four iterations."""
    folder = tmp_path_factory.mktemp('trained')
    runner(folder, 1, custom_hooks=[dict(type='EMAHook')]).train()
    return folder / 'epoch_1.pth'


@pytest.fixture(autouse=True)
def allowed():
    """What torch allows is the same before and after every test: an answer of ours must not outlive a load."""
    before = set(get_safe_globals())
    yield
    assert set(get_safe_globals()) == before


# What must load


def test_torch_refuses_what_mmengine_saves(trained: Path):
    """The cause. Where this passes, the fix has had its day."""
    with pytest.raises(pickle.UnpicklingError):
        torch.load(trained, weights_only=True)


def test_a_run_resumes(trained: Path, tmp_path: Path):
    shutil.copy(trained, tmp_path)
    hooks = [dict(type='EMAHook')]
    resumed = runner(tmp_path, 2, load_from=str(tmp_path / 'epoch_1.pth'), resume=True, custom_hooks=hooks)
    resumed.train()
    assert resumed.epoch == 2 and resumed.iter == 8
    history = resumed.message_hub.get_scalar('train/loss')
    assert type(history) is HistoryBuffer and len(history.data[0]) == 8
    before = torch.load(trained, weights_only=False)['message_hub']['log_scalars']['train/loss']
    np.testing.assert_array_equal(history.data[0][:4], before.data[0])
    assert history.max() >= history.mean() >= history.min()


def test_a_model_takes_its_weights(trained: Path, tmp_path: Path):
    expected = torch.load(trained, map_location='cpu', weights_only=False)['state_dict']['linear.weight']
    fresh = runner(tmp_path, 1, load_from=str(trained))
    fresh.load_or_resume()
    assert fresh.epoch == 0 and torch.equal(fresh.model.linear.weight.cpu(), expected)  # a runner moves its model
    model = Model(init_cfg=dict(type='Pretrained', checkpoint=str(trained)))
    model.init_weights()
    assert torch.equal(model.linear.weight, expected)
    model = Model()
    load_checkpoint(model, str(trained), map_location='cpu')  # the call of init_detector and init_model
    assert torch.equal(model.linear.weight, expected)


def test_everything_loads_as_the_unsafe_load_has_it(trained: Path):
    ours, theirs = load_checkpoint_file(trained), torch.load(trained, map_location='cpu', weights_only=False)

    def compare(a, b):
        assert type(a) is type(b), (a, b)
        if isinstance(a, dict):
            assert list(a) == list(b)
            for key in a:
                compare(a[key], b[key])
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b)
            for pair in zip(a, b, strict=True):
                compare(*pair)
        elif isinstance(a, HistoryBuffer):
            for pair in zip(a.data, b.data, strict=True):
                compare(*pair)
            assert a.max_length == b.max_length
        elif isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and np.array_equal(a, b)
        else:
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b

    compare(ours, theirs)


ARRAYS = [
    np.arange(6.0).reshape(2, 3),
    np.asfortranarray(np.arange(6).reshape(2, 3)),
    np.arange(4, dtype='>i2'),
    np.array(1.5),
    np.zeros((0, 3), np.float32),
    np.array([True, False]),
    np.array(['a', 'bc']),
    np.array([1 + 2j]),
]


@pytest.mark.parametrize('array', ARRAYS, ids=lambda array: f'{array.dtype.str}-{array.shape}')
def test_arrays_anywhere(array: np.ndarray, tmp_path: Path):
    """Random states, say, which a hook stores beside the weights."""
    torch.save(dict(state=('MT19937', array, 7), rows=[dict(x=array)]), tmp_path / 'a.pth')
    loaded = load_checkpoint_file(tmp_path / 'a.pth')
    for found in (loaded['state'][1], loaded['rows'][0]['x']):
        assert type(found) is np.ndarray and found.flags.writeable and found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    assert loaded['state'][0] == 'MT19937'


@pytest.mark.parametrize('scalar', [np.float64(0.1), np.int64(3), np.bool_(True), np.float32(2)], ids=repr)
def test_scalars(scalar, tmp_path: Path):
    torch.save(dict(best=scalar), tmp_path / 'a.pth')
    assert (found := load_checkpoint_file(tmp_path / 'a.pth')['best']) == scalar and type(found) is type(scalar)


def rewritten(file: Path, change, name: str = 'changed.pth') -> Path:
    """A copy of a checkpoint with its pickle changed."""
    target = file.parent / name
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, 'w', zipfile.ZIP_STORED) as new:
        for member in old.namelist():
            data = old.read(member)
            new.writestr(member, change(data) if member.endswith('data.pkl') else data)
    return target


def test_files_of_numpy_1(tmp_path: Path):
    torch.save(dict(array=np.arange(3), scalar=np.float64(2)), tmp_path / 'a.pth')
    old = rewritten(tmp_path / 'a.pth', lambda data: data.replace(b'numpy._core.', b'numpy.core.'))
    loaded = load_checkpoint_file(old)
    assert loaded['array'].tolist() == [0, 1, 2] and loaded['scalar'] == 2


def test_names_that_the_user_allowed_do_not_get_in_the_way(trained: Path):
    """The advice of many a forum, which mixes numpy's functions with our answers."""
    before = list(get_safe_globals())
    theirs = [HistoryBuffer, getattr, np.dtype, np.ndarray, np._core.multiarray._reconstruct]
    add_safe_globals(theirs)
    try:
        history = load_checkpoint_file(trained)['message_hub']['log_scalars']['train/loss']
        assert type(history) is HistoryBuffer and isinstance(history.data[0], np.ndarray)
        assert set(theirs) <= set(get_safe_globals())
    finally:
        clear_safe_globals()
        add_safe_globals(before)


class Allowed:
    """A class that a user vouches for."""


def test_a_name_that_the_user_allowed_loads(tmp_path: Path):
    torch.save(Allowed(), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='Allowed'):
        load_checkpoint_file(tmp_path / 'a.pth')
    before = list(get_safe_globals())
    add_safe_globals([Allowed])
    try:
        assert type(load_checkpoint_file(tmp_path / 'a.pth')) is Allowed
    finally:
        clear_safe_globals()
        add_safe_globals(before)


# What must not


class Reduced:
    """Pickles as a call, with a state if there is one."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


ATTACKS = {
    'os.system': lambda marker: Reduced(os.system, f'touch {marker}'),
    'eval': lambda marker: Reduced(eval, f'open({str(marker)!r}, "w")'),
    'open': lambda marker: Reduced(open, str(marker), 'w'),
    'getattr: a dunder of HistoryBuffer': lambda _: Reduced(getattr, HistoryBuffer, '__init__'),
    'getattr: globals of a method': lambda _: Reduced(getattr, Reduced(getattr, HistoryBuffer, 'mean'), '__globals__'),
    'getattr: another method': lambda _: Reduced(getattr, HistoryBuffer, 'register_statistics'),
    'getattr: subclasses': lambda _: Reduced(getattr, HistoryBuffer, '__subclasses__'),
    'getattr: of a tensor': lambda _: Reduced(getattr, torch.zeros(1), '__class__'),
    'a statistic called': lambda _: Reduced(Reduced(getattr, HistoryBuffer, 'mean'), 1),
    'a structured array': lambda _: np.zeros(2, dtype=[('x', 'f8')]),
    'an array of objects': lambda _: np.array([object], dtype=object),
}
ACTIVE = Version(torch.__version__) >= Version('2.6')
LOADERS = {
    'mmengine': lambda path: _load_checkpoint(str(path), map_location='cpu'),
    'resume': lambda path: runner(path.parent, 2, load_from=str(path), resume=True).load_or_resume(),
    'ours': load_checkpoint_file,
}
guarded = pytest.mark.skipif(not ACTIVE, reason='MMEngine is left as it is before torch 2.6')
loaders = pytest.mark.parametrize(
    'load', [pytest.param(load, marks=[] if name == 'ours' else guarded, id=name) for name, load in LOADERS.items()]
)


@loaders
@pytest.mark.parametrize('attack', ATTACKS.values(), ids=ATTACKS)
def test_attacks_are_refused(attack, load, tmp_path: Path):
    marker, file = tmp_path / 'marker', tmp_path / 'evil.pth'
    with open(file, 'wb') as stream, Unclassed(stream) as save:
        save(dict(state_dict={}, meta=attack(marker)))
    with pytest.raises(CheckpointError, match='evil.pth was not loaded') as caught:
        load(file)
    assert not marker.exists()
    assert isinstance(caught.value, RuntimeError) and isinstance(caught.value, pickle.UnpicklingError)


class Unclassed:
    """torch.save with a pickler that lets a call be of a call's result, as an attacker's file may."""

    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        return self.save

    def __exit__(self, *_):
        return None

    def save(self, value):
        class Pickler(pickle._Pickler):
            def save_reduce(self, function, args, state=None, *rest, obj=None, **kwargs):
                self.save(function)
                self.save(args)
                self.write(pickle.REDUCE)
                if obj is not None and id(obj) not in self.memo:
                    self.memoize(obj)
                if state is not None:
                    self.save(state)
                    self.write(pickle.BUILD)

        module = type('module', (), dict(Pickler=Pickler, dumps=pickle.dumps, __name__='pickle'))
        torch.save(value, self.stream, pickle_module=module)


def test_the_attacks_work_where_nothing_guards(tmp_path: Path):
    """Else they prove nothing: these are the same bytes, loaded by pickle."""
    marker, file = tmp_path / 'marker', tmp_path / 'evil.pth'
    with open(file, 'wb') as stream, Unclassed(stream) as save:
        save(ATTACKS['os.system'](marker))
    torch.load(file, weights_only=False)
    assert marker.exists()
    with open(file, 'wb') as stream, Unclassed(stream) as save:
        save(ATTACKS['getattr: globals of a method'](marker))
    assert torch.load(file, weights_only=False) is HistoryBuffer.mean.__globals__


@guarded
def test_downloads_are_guarded_too(tmp_path: Path, monkeypatch):
    """torch.hub unpickles anything by default; the file is in its cache, so nothing is fetched."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    marker = tmp_path / 'marker'
    with open(tmp_path / 'checkpoints' / 'evil.pth', 'wb') as stream, Unclassed(stream) as save:
        save(ATTACKS['os.system'](marker))
    with pytest.raises(CheckpointError, match='https://example.org/evil.pth was not loaded'):
        _load_checkpoint('https://example.org/evil.pth', map_location='cpu')
    assert not marker.exists()
    torch.save(dict(state_dict={}), tmp_path / 'checkpoints' / 'good.pth')
    assert _load_checkpoint('https://example.org/good.pth') == dict(state_dict={})
    (tmp_path / 'checkpoints' / 'page.pth').write_text('<!DOCTYPE html>')
    with pytest.raises(CheckpointError, match='page.pth is no PyTorch checkpoint.*DOCTYPE'):
        _load_checkpoint('https://example.org/page.pth')


def test_a_dtype_cannot_claim_to_hold_pointers(tmp_path: Path):
    """A float64 dtype flagged as one of objects makes numpy follow its bytes as addresses."""
    flagged = Reduced(np.dtype, 'f8', False, True, state=(3, '<', None, None, None, -1, -1, 63))
    array = Reduced(
        np._core.multiarray._reconstruct, np.ndarray, (0,), b'b', state=(1, (2,), flagged, False, b'A' * 16)
    )
    with open(tmp_path / 'a.pth', 'wb') as stream, Unclassed(stream) as save:
        save(dict(array=array))
    found = load_checkpoint_file(tmp_path / 'a.pth')['array']
    assert not found.dtype.hasobject and found.dtype == np.float64


def test_a_file_cannot_change_the_statistics(tmp_path: Path):
    """HistoryBuffer's own `__setstate__` would take them from the file, for every buffer of the process."""
    buffer = HistoryBuffer([1.0, 3.0], [1, 1])
    buffer.statistics_methods = dict(mean=HistoryBuffer.max)
    state = dict(buffer.__dict__, statistics_methods=dict(mean=HistoryBuffer.max, odd=HistoryBuffer.min))
    with open(tmp_path / 'a.pth', 'wb') as stream, Unclassed(stream) as save:
        save(Reduced(HistoryBuffer, state=state))
    found = load_checkpoint_file(tmp_path / 'a.pth')
    assert found.statistics('mean') == 2 and 'odd' not in HistoryBuffer._statistics_methods


def test_a_statistic_of_ones_own_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(HistoryBuffer, '_statistics_methods', dict(HistoryBuffer._statistics_methods))
    HistoryBuffer.register_statistics(median)
    torch.save(HistoryBuffer([1.0], [1]), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=r'holds \S*median, .*add_safe_globals'):
        load_checkpoint_file(tmp_path / 'a.pth')


def median(buffer: HistoryBuffer) -> float:
    return float(np.median(buffer.data[0]))


# What is wrong with a file


@loaders
@pytest.mark.parametrize('part', [0.01, 0.5, 0.99])
@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_a_truncated_file(zipped: bool, part: float, load, tmp_path: Path):
    file = tmp_path / 'cut.pth'
    torch.save(dict(state_dict=dict(w=torch.randn(100, 100))), file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * part)])
    with pytest.raises(CheckpointError, match=r'cut.pth is a damaged checkpoint \(\d+ bytes\).*earlier one'):
        load(file)


def test_a_file_damaged_within(tmp_path: Path):
    file = tmp_path / 'holed.pth'
    torch.save(dict(w=torch.ones(1000)), file)
    data = bytearray(file.read_bytes())
    data[:64] = b'PK\x03\x04' + bytes(60)
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match='holed.pth is a damaged checkpoint'):
        load_checkpoint_file(file)


FOREIGN = {
    'empty': b'',
    'page': b'<!DOCTYPE html><html>',
    'pointer': b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n',
    'safetensors': b'\x10\x00\x00\x00\x00\x00\x00\x00{"__metadata__":{}}',
    'noise': bytes(range(256)) * 8,
    'text': b'import torch\n',
    'picture': b'\x89PNG\r\n\x1a\n' + bytes(100),
}


@loaders
@pytest.mark.parametrize('content', FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file(content: bytes, load, tmp_path: Path):
    file = tmp_path / 'foreign.pth'
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match='foreign.pth is no PyTorch checkpoint'):
        load(file)


def test_an_archive_of_something_else(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / 'code.pth', 'w') as archive:
        archive.writestr('README.md', 'no weights')
    with pytest.raises(CheckpointError, match='code.pth is no PyTorch checkpoint'):
        load_checkpoint_file(tmp_path / 'code.pth')


def test_errors_that_are_not_the_files_stay_as_they_are(tmp_path: Path, trained: Path):
    with pytest.raises(FileNotFoundError, match='absent.pth'):
        load_checkpoint_file(tmp_path / 'absent.pth')
    with pytest.raises(FileNotFoundError, match='absent.pth'):
        LOADERS['mmengine'](tmp_path / 'absent.pth')

    def nowhere(storage, location):
        raise RuntimeError('no such device')

    with pytest.raises((RuntimeError, pickle.UnpicklingError), match='no such device') as caught:
        load_checkpoint_file(trained, map_location=nowhere)
    assert not isinstance(caught.value, CheckpointError)


# When it acts


def test_torch_load_is_nobodys_but_torchs():
    assert torch.load.__module__ == 'torch.serialization' and builtins.getattr(torch.load, '__wrapped__', None) is None
    assert CheckpointLoader.load_checkpoint.__module__ != 'torch.serialization'


@pytest.mark.parametrize('versions', [{}, dict(torch='2.5.1')], ids=['none', 'old'])
def test_no_cause_no_change(versions: dict, monkeypatch):
    monkeypatch.setattr(checkpoint_loading, 'distribution_version', versions.get)
    monkeypatch.setattr(checkpoint_loading, 'after_import', lambda *_: pytest.fail('patched'))
    assert checkpoint_loading.apply() is None

"""Plugging in: timm knows the networks by itself, in every order of import, and nothing else is disturbed.

The hook lives in the import system, so each case has a fresh interpreter, in an empty folder, where it can import only
what is installed.
"""
from functools import partial

import pytest
from helpers import fresh_python


@pytest.fixture
def python(tmp_path):
    """Runs a fresh interpreter in an empty folder."""
    cwd = tmp_path / 'cwd'
    cwd.mkdir()
    return partial(fresh_python, cwd=cwd)


TORCH_FIRST = """
import sys, torch
assert '_timm_lm_autoload' in sys.modules, 'the entry point is not installed'
assert not {'timm', 'timm_lm'} & {name.partition('.')[0] for name in sys.modules}, 'torch alone pulls them in'
import timm
"""


@pytest.mark.parametrize('imports', ['import timm', TORCH_FIRST, 'import timm_lm; import timm'])
def test_models_are_there_once_in_every_order_of_import(python, imports):
    # a second registration of a name is a UserWarning of timm, so an error here
    result = python('-W', 'error::UserWarning', '-c', f"""
{imports}
import sys, timm
model = timm.create_model('lm_resnet20')
assert (type(model).__module__, type(model).__name__) == ('timm_lm.models.lm_resnet', 'LMResNet')
assert 'lm_resnet20' in timm.list_models('lm_resnet*')
hooks = [finder for finder in sys.meta_path if type(finder).__module__ == '_timm_lm_autoload']
(hook,) = hooks
assert hook.find_spec('timm.models', timm.__path__) is None, 'the hook is for the import alone'
assert timm.models.__spec__.loader is timm.models.__loader__
assert type(timm.models.__loader__) is type(timm.data.__loader__), 'timm.models has its own loader back'
import timm_lm
assert type(model) is timm_lm.LMResNet
""")
    assert result.stderr == ''


BY_HAND = """
import sys, torch
modules, finders = set(sys.modules), list(sys.meta_path)
import _timm_lm_autoload
_timm_lm_autoload.autoload()
_timm_lm_autoload.autoload()
assert set(sys.modules) - modules == {'_timm_lm_autoload'}, 'the hook loads no module but itself'
assert len(sys.meta_path) == len(finders) + 1
sys.meta_path[:] = finders
"""


@pytest.mark.parametrize('switch, before', [('TIMM_LM_AUTOLOAD', ''), ('TORCH_DEVICE_BACKEND_AUTOLOAD', BY_HAND)])
def test_turned_off_the_hook_leaves_timm_alone(python, switch, before):
    python('-W', 'error::UserWarning', '-c', before + """
import sys, timm
assert not timm.is_model('lm_resnet20')
assert 'timm_lm' not in sys.modules
assert not any(type(finder).__module__ == '_timm_lm_autoload' for finder in sys.meta_path)
import timm_lm
timm.create_model('lm_resnet20')
""", **{switch: '0'})


def test_without_timm_torch_works_silently(python):
    result = python('-c', """
import sys

class NoTimm:
    def find_spec(self, name, path=None, target=None):
        if name == 'timm':
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, NoTimm())
import torch
for name in ('timm_lm', 'timm', 'timm.models'):
    try:
        __import__(name)
    except ModuleNotFoundError as e:
        assert e.name == 'timm'
    else:
        raise AssertionError(f'{name} was imported')
""")
    assert result.stderr == ''


def test_broken_timm_shows_its_own_error_and_registers_whenever_it_is_imported(python, tmp_path):
    broken = tmp_path / 'broken'
    (broken / 'timm' / 'models').mkdir(parents=True)
    (broken / 'timm' / '__init__.py').write_text('')
    (broken / 'timm' / 'models' / '__init__.py').write_text("raise OSError('broken timm')")
    result = python('-W', 'error::UserWarning', '-c', """
import importlib, os, sys
import torch
for _ in range(2):
    try:
        import timm.models
    except OSError as e:
        assert str(e) == 'broken timm'
    else:
        raise AssertionError('timm.models was imported')
assert 'timm_lm' not in sys.modules

sys.path.remove(os.environ['PYTHONPATH'])
del sys.modules['timm']
importlib.invalidate_caches()
import timm
timm.create_model('lm_resnet20')

for name in [name for name in sys.modules if name.startswith('timm')]:
    del sys.modules[name]
import timm
timm.create_model('lm_resnet20')
""", PYTHONPATH=str(broken))
    assert result.stderr == ''


def test_broken_package_costs_timm_one_warning(python, tmp_path):
    broken = tmp_path / 'broken'
    (broken / 'timm_lm').mkdir(parents=True)
    (broken / 'timm_lm' / '__init__.py').write_text("raise OSError('broken package')")
    result = python('-c', """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    import timm, timm.models, torch
messages = [str(w.message) for w in caught if 'timm-lm' in str(w.message)]
assert len(messages) == 1, messages
assert 'OSError: broken package' in messages[0]
assert timm.is_model('resnet18') and not timm.is_model('lm_resnet20')
try:
    import timm_lm
except OSError as e:
    assert str(e) == 'broken package'
else:
    raise AssertionError('timm_lm was imported')

for name in [name for name in sys.modules if name.startswith('timm')]:
    del sys.modules[name]
warnings.simplefilter('error', UserWarning)
import timm
assert timm.is_model('resnet18'), 'the line is no error of timm'
""", PYTHONPATH=str(broken))
    assert result.stderr.startswith('timm-lm could not register its models (OSError: broken package)')


@pytest.fixture
def stand_ins(tmp_path):
    """A folder with empty packages in place of timm and this package."""
    folder = tmp_path / 'stand_ins'
    for package in ('timm', 'timm/models', 'timm_lm'):
        (folder / package).mkdir(parents=True)
        (folder / package / '__init__.py').touch()
    return folder


@pytest.mark.parametrize('slow', ['timm', 'timm_lm'])
def test_hook_waits_for_no_import_of_another_thread(python, stand_ins, slow):
    # Waiting with the import lock of timm.models in hand can be a deadlock: the other thread may want timm.models next.
    (stand_ins / 'handshake.py').write_text(
        'from threading import Event\n'
        'started, done = Event(), Event()\n')
    (stand_ins / slow / '__init__.py').write_text(
        'import handshake\n'
        'handshake.started.set()\n'
        'handshake.done.wait()\n')
    result = python('-W', 'error::UserWarning', '-c', f"""
import importlib, sys, threading
import handshake, _timm_lm_autoload

_timm_lm_autoload.autoload()
threading.Thread(target=importlib.import_module, args=['{slow}'], daemon=True).start()
handshake.started.wait()
importlib.import_module('timm.models')
assert 'timm_lm' in sys.modules
handshake.done.set()
""", PYTHONPATH=str(stand_ins))
    assert result.stderr == ''


def test_hook_passes_over_finders_of_the_old_protocol(python, stand_ins):
    python('-c', """
import sys
import _timm_lm_autoload

class OldFinder:
    def find_module(self, name, path=None):
        return None

sys.meta_path.insert(0, OldFinder())
_timm_lm_autoload.autoload()
import timm.models
assert 'timm_lm' in sys.modules
""", PYTHONPATH=str(stand_ins))


def test_spawned_worker_of_a_loader_creates_a_model(python, tmp_path):
    script = tmp_path / 'spawn.py'
    script.write_text("""
from torch.utils.data import DataLoader, Dataset

class ModelSizes(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        import timm  # only the worker imports timm
        return sum(p.numel() for p in timm.create_model('lm_resnet20').parameters())

if __name__ == '__main__':
    import sys
    sizes = [int(size) for size in DataLoader(ModelSizes(), num_workers=1, multiprocessing_context='spawn')]
    assert sizes == [272384], sizes  # the plain network's 272 378, counted in the authors' code, and six k
    assert 'timm' not in sys.modules
""")
    python(script)

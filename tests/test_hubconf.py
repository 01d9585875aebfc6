"""torch.hub: every network from a folder, and no mix-up with another version of the package.

Each case has a fresh interpreter. Where the package must not be installed, it sees a copy of the environment without.
"""
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import timm
from helpers import fresh_python
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.search("^__version__ = '(.+)'$", (ROOT / 'timm_lm' / '__init__.py').read_text(), re.MULTILINE).group(1)


def python(code, *args, options=(), cwd, **env):
    """Run code in a fresh interpreter, where registering a name twice is an error; returns what it prints, as JSON."""
    return json.loads(fresh_python('-W', 'error::UserWarning', *options, '-c', code, *args, cwd=cwd, **env).stdout)


@pytest.fixture(scope='module')
def without_package(tmp_path_factory):
    """Options and environment for an interpreter with everything that is installed but this package."""
    site = tmp_path_factory.mktemp('site')
    ours = re.compile(r'_?timm_lm|__editable__', re.IGNORECASE)
    for folder in map(Path, sys.path):
        if folder.name in ('site-packages', 'dist-packages'):
            for entry in folder.iterdir():
                link = site / entry.name
                if not (ours.match(entry.name) or entry.suffix == '.pth' or link.exists()):
                    link.symlink_to(entry)
    return dict(options=['-S'], PYTHONPATH=str(site))


def copy_of_repository(folder, version=VERSION):
    """Copy what torch.hub needs, under another version if asked."""
    shutil.copytree(ROOT / 'timm_lm', folder / 'timm_lm', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('hubconf.py', 'pyproject.toml'):
        shutil.copy(ROOT / name, folder / name)
    (folder / 'weights').mkdir()
    init = folder / 'timm_lm' / '__init__.py'
    init.write_text(init.read_text().replace(f"__version__ = '{VERSION}'", f"__version__ = '{version}'"))
    return folder


@pytest.fixture(scope='module')
def loaded(without_package, tmp_path_factory):
    """What torch.hub makes of the repository itself, and then of a copy in its cache."""
    hub = tmp_path_factory.mktemp('hub')
    copy_of_repository(hub / 'owner_timm-lm_main')
    return python("""
import json, sys
import torch

root, hub = sys.argv[1:]
model = torch.hub.load(root, 'lm_resnet20', source='local', pretrained=False, num_classes=7, drop_path_rate=0.5)
out = dict(
    sys_path=sys.path,
    origin=sys.modules['timm_lm'].__file__,
    classes=model.num_classes,
    head=model.head.fc.out_channels,
    drop_probs=[module.drop_prob for module in model.modules() if type(module).__name__ == 'DropPath'],
)

torch.hub.set_dir(hub)  # the copy there is of the same version, so the one that is imported serves
github = dict(trust_repo=True, skip_validation=True)
out['listed'] = torch.hub.list('owner/timm-lm:main', **github)
names = ('lm_resnet56', 'preact_resnet56')
out['help'] = {name: torch.hub.help('owner/timm-lm:main', name, **github) for name in names}

import timm
out['registered'] = timm.list_models(module='lm_resnet')
out['made'] = {}
for name in out['registered']:
    model = torch.hub.load(root, name, source='local', device='meta')
    assert {p.device.type for p in model.parameters()} == {'meta'}
    out['made'][name] = model.pretrained_cfg['architecture']
print(json.dumps(out))
""", ROOT, hub, cwd=hub, **without_package)


def test_every_registered_name_loads_from_the_folder(loaded):
    assert {'lm_resnet20', 'lm_resnext101_32x8d', 'preact_resnet56'} <= loaded['made'].keys()
    assert loaded['made'] == {name: name for name in loaded['registered']}
    assert Path(loaded['origin']) == ROOT / 'timm_lm' / '__init__.py'
    assert str(ROOT) not in loaded['sys_path']


def test_keywords_reach_the_model(loaded):
    assert loaded['classes'] == loaded['head'] == 7
    assert max(loaded['drop_probs']) == 0.5


def test_list_shows_the_networks_and_nothing_else(loaded):
    assert sorted(loaded['listed']) == sorted(loaded['registered'])


def test_help_shows_the_docstrings(loaded):
    assert loaded['help'] == {
        'lm_resnet56': 'LM-ResNet-56 for 32x32 images.',
        'preact_resnet56': 'Pre-activation ResNet-56 for 32x32 images, the plain twin of LM-ResNet-56.',
    }


def test_pretrained_takes_the_weights_of_the_folder(tmp_path):
    # the same version is installed elsewhere, which is no obstacle: the folder goes first
    folder = copy_of_repository(tmp_path / 'checkout')
    file = folder / 'weights' / 'lm_resnet20.best_c10' / 'model.safetensors'
    file.parent.mkdir()
    state = timm.create_model('lm_resnet20').state_dict()
    save_file(state, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / 'weights' / 'SHA256SUMS').write_text(f'{digest}  lm_resnet20.best_c10/model.safetensors\n')
    loaded = python("""
import json, sys
import torch

model = torch.hub.load(sys.argv[1], 'lm_resnet20', source='local', pretrained=True)
fresh = torch.hub.load(sys.argv[1], 'lm_resnet20', source='local', pretrained=False)
print(json.dumps(dict(
    origin=sys.modules['timm_lm'].__file__, tag=model.pretrained_cfg['tag'],
    loaded=model.stem.conv.weight.tolist(), fresh=fresh.stem.conv.weight.tolist())))
""", folder, cwd=tmp_path)
    assert Path(loaded['origin']) == folder / 'timm_lm' / '__init__.py'
    assert loaded['tag'] == 'best_c10'
    assert loaded['loaded'] == state['stem.conv.weight'].tolist() != loaded['fresh']


def test_another_version_that_is_imported_is_named(tmp_path):
    """An installed one is, with timm. If it is not imported, the folder goes first."""
    folder = copy_of_repository(tmp_path / 'checkout', version='9.9.9')
    code = """
import json, sys
import torch
if sys.argv[2:]:
    import timm
try:
    told = torch.hub.load(sys.argv[1], 'lm_resnet20', source='local').pretrained_cfg['architecture']
except RuntimeError as e:
    told = str(e)
print(json.dumps([told, sys.modules['timm_lm'].__file__]))
"""
    told, origin = python(code, folder, 'timm', cwd=tmp_path)
    installed = Path(origin).resolve().parents[1]
    assert installed != folder
    assert told.startswith(f'timm-lm {VERSION} is imported from {installed}, but {folder} has timm-lm 9.9.9; ')
    assert len(told.splitlines()) == 1
    assert python(code, folder, cwd=tmp_path) == ['lm_resnet20', str(folder / 'timm_lm' / '__init__.py')]

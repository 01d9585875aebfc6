"""The package as it is shipped: what lies in the archives, and a fresh environment that has only what they install."""
import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIZE_LIMIT = 25_000_000  # bytes
SWITCHES = ('PYTHONPATH', 'TIMM_LM_AUTOLOAD', 'TORCH_DEVICE_BACKEND_AUTOLOAD')
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in SWITCHES}


def run(*command, cwd, **env):
    """Run a command; returns what it prints."""
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=ENVIRONMENT | env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def shipped(folder, pattern):
    """Files below a folder of the repository that git tracks, or would after ``git add``, by path from the folder.

    Outside a checkout (in an unpacked sdist), the files that are there.
    """
    folder = ROOT / folder
    if (ROOT / '.git').exists():
        listed = run('git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard', '.', cwd=folder).split('\0')
        files = [folder / name for name in listed if name]
    else:
        files = folder.rglob('*')
    return {path.relative_to(folder).as_posix() for path in files if path.is_file() and path.match(pattern)}


@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sdist')
    run(sys.executable, '-m', 'hatchling', 'build', '-t', 'sdist', '-d', folder, cwd=ROOT)
    [file] = folder.iterdir()
    return file


def build_wheel(source, folder):
    run(sys.executable, '-m', 'pip', 'wheel', '--no-build-isolation', '--no-deps', '--no-index',
        '--disable-pip-version-check', '-w', folder, source, cwd=folder)
    [file] = folder.iterdir()
    return file


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    return build_wheel(ROOT, tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='module')
def editable_wheel(tmp_path_factory):
    """What ``pip install -e`` builds and installs."""
    folder = tmp_path_factory.mktemp('editable')
    run(sys.executable, '-m', 'hatchling', 'build', '-t', 'wheel:editable', '-d', folder, cwd=ROOT)
    [file] = folder.iterdir()
    return file


@pytest.fixture(scope='module')
def contents(wheel):
    """Files of the wheel by path."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith('/')}


def install(wheel, folder):
    """Make an environment with the wheel in it and the running environment's other packages behind it.

    Returns:
        Folder of the environment's commands, and its site-packages.
    """
    run(sys.executable, '-m', 'venv', '--without-pip', folder, cwd=folder.parent)
    scripts = folder / ('Scripts' if os.name == 'nt' else 'bin')
    run(sys.executable, '-m', 'pip', '--disable-pip-version-check', '--python', scripts / 'python', 'install',
        '--no-deps', '--no-index', wheel, cwd=folder)
    site = Path(run(
        scripts / 'python', '-c', "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # Paths in a .pth file go to the end of sys.path, and .pth files in them, such as that of an editable install of the
    # running environment, are not read. Only now, so that pip has seen no other timm-lm.
    behind = [path for path in sys.path if Path(path).name in ('site-packages', 'dist-packages')]
    (site / 'behind.pth').write_text(''.join(f'{path}\n' for path in behind))
    return scripts, site


def use(scripts, folder):
    """Create a network without naming the package, and one with its weights, from an empty folder, offline.

    Returns:
        What was found.
    """
    cwd = folder / 'empty'
    cwd.mkdir()
    return json.loads(run(scripts / 'python', '-W', 'error::UserWarning', '-c', """
import json
import timm

model = timm.create_model('lm_resnet20')

import timm_lm, _timm_lm_autoload
from safetensors.torch import load_file
from timm_lm.models._weights import weights_dir

files = sorted(weights_dir().glob('*/model.safetensors'))
names = [file.parent.name for file in files]
assert {*names} <= {*timm.list_pretrained()}
state = timm.create_model(names[0], pretrained=True).state_dict()
assert all(state[key].equal(tensor) for key, tensor in load_file(files[0]).items())
print(json.dumps(dict(
    type=f'{type(model).__module__}.{type(model).__name__}', package=timm_lm.__file__, hook=_timm_lm_autoload.__file__,
    weights=str(weights_dir()), names=names)))
""", cwd=cwd, HF_HUB_OFFLINE='1'))


def shipped_checkpoints():
    return sorted(Path(name).parent.name for name in shipped('weights', '*/model.safetensors'))


def test_wheel_has_the_package_and_the_hook_at_the_top_and_nothing_else(contents, wheel):
    info = '-'.join(wheel.name.split('-')[:2]) + '.dist-info'
    # nothing else: a folder `tests` at the top would be importable from every project of the environment
    assert {name.partition('/')[0] for name in contents} == {'timm_lm', '_timm_lm_autoload.py', info}
    assert {name for name in contents if name.endswith('.py')} == (
        {'_timm_lm_autoload.py'} | {f'timm_lm/{name}' for name in shipped('timm_lm', '*.py')})


def test_wheel_has_the_weights_of_the_repository(contents):
    prefix = 'timm_lm/weights/'
    weights = {name.removeprefix(prefix): data for name, data in contents.items() if name.startswith(prefix)}
    assert weights.keys() == shipped('weights', '*')
    assert all(data == (ROOT / 'weights' / name).read_bytes() for name, data in weights.items())


def test_wheel_has_the_template_of_the_card_and_the_mark_of_types(contents):
    assert {'timm_lm/MODEL_CARD.md', 'timm_lm/py.typed'} <= contents.keys()


def test_wheel_has_the_recipes(contents):
    prefix = 'timm_lm/recipes/'
    recipes = {name.removeprefix(prefix) for name in contents if name.startswith(prefix)}
    assert {name for name in recipes if name.endswith('.yaml')} == shipped('timm_lm/recipes', '*.yaml')


def test_wheel_states_commands_hook_and_licence(contents, wheel):
    info = '-'.join(wheel.name.split('-')[:2]) + '.dist-info'
    entry_points = contents[f'{info}/entry_points.txt'].decode().split('\n')
    assert 'timm-lm = timm_lm.cli:main' in entry_points
    assert entry_points[entry_points.index('[torch.backends]') + 1] == 'timm_lm = _timm_lm_autoload:autoload'
    assert contents[f'{info}/licenses/LICENSE'] == (ROOT / 'LICENSE').read_bytes()
    metadata = email.message_from_bytes(contents[f'{info}/METADATA'])
    assert metadata['License-Expression'] == 'Apache-2.0'


def test_sdist_has_what_builds_tests_and_documents_the_package(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    assert {
        'pyproject.toml', 'README.md', 'LICENSE', 'CITATION.cff', 'CHANGELOG.md', 'CONTRIBUTING.md', 'hubconf.py',
        '_timm_lm_autoload.py', 'Makefile', 'requirements-dev.txt', 'timm_lm/__init__.py', 'timm_lm/MODEL_CARD.md',
        'tests/test_package.py',
    } <= names
    for folder in ('weights', 'timm_lm/recipes', 'results', 'docs'):
        assert {f'{folder}/{name}' for name in shipped(folder, '*') if '__pycache__' not in name} <= names
    assert not any('__pycache__' in name for name in names)
    # and nothing that a user's runs and data leave in a checkout
    tops = {name.partition('/')[0] for name in names}
    assert tops == {
        '.gitignore', 'CHANGELOG.md', 'CITATION.cff', 'CONTRIBUTING.md', 'LICENSE', 'Makefile', 'PKG-INFO',
        'README.md', '_timm_lm_autoload.py', 'benchmarks', 'docs', 'hubconf.py', 'pyproject.toml',
        'requirements-dev.txt', 'results', 'tests', 'timm_lm', 'weights'}


def test_sdist_builds_the_same_wheel(sdist, contents, tmp_path):
    with zipfile.ZipFile(build_wheel(sdist, tmp_path)) as archive:
        assert {name: archive.read(name) for name in archive.namelist() if not name.endswith('/')} == contents


def test_archives_are_small(sdist, wheel):
    assert wheel.stat().st_size < SIZE_LIMIT
    assert sdist.stat().st_size < SIZE_LIMIT


def test_installed_wheel_works_from_an_empty_folder(wheel, tmp_path):
    scripts, site = install(wheel, tmp_path / 'venv')
    found = use(scripts, tmp_path)
    assert found['type'] == 'timm_lm.models.lm_resnet.LMResNet'
    assert Path(found['package']) == site / 'timm_lm' / '__init__.py'
    assert Path(found['hook']) == site / '_timm_lm_autoload.py'
    assert Path(found['weights']) == site / 'timm_lm' / 'weights'
    assert found['names'] == shipped_checkpoints()
    recipes = run(scripts / 'timm-lm', 'recipe', cwd=tmp_path / 'empty').splitlines()
    names = {name.removesuffix('.yaml') for name in shipped('timm_lm/recipes', '*.yaml')}
    assert {line.split()[0] for line in recipes[1:]} == names


def test_editable_install_uses_the_checkout(editable_wheel, tmp_path):
    scripts, _ = install(editable_wheel, tmp_path / 'venv')
    found = use(scripts, tmp_path)
    assert found['type'] == 'timm_lm.models.lm_resnet.LMResNet'
    assert Path(found['package']) == ROOT / 'timm_lm' / '__init__.py'
    assert Path(found['hook']) == ROOT / '_timm_lm_autoload.py'
    assert Path(found['weights']) == ROOT / 'weights'
    assert found['names'] == shipped_checkpoints()
    assert shutil.which('timm-lm', path=scripts)

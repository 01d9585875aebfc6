"""Runs timm's own model tests on our networks: ``python tests/timm_suite.py [--sdist PATH] [pytest arguments]``.

The file is ``tests/test_models.py`` of the source distribution of the installed timm, unmodified but for the name of
our module in its list of modules with ``forward_intermediates``. Tests that download weights run where the Hub answers.
"""
import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import timm
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

import timm_lm  # noqa: F401  registers the networks

MODULE = 'lm_resnet'
FEATURE_LIST = 'FEAT_INTER_FILTERS = ['
DOWNLOADING_TESTS = ('test_model_load_pretrained', 'test_model_features_pretrained')


def fetch_sdist(version: str, folder: Path) -> Path:
    """Download the source distribution of a timm version with pip; returns the archive."""
    subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm', f'timm=={version}',
         '--dest', str(folder)],
        check=True,
    )
    return next(folder.glob('timm-*.tar.gz'))


def copy_suite(sdist: Path, folder: Path) -> Path:
    """Copy the tests and their pytest settings, and put our module into the feature list; returns the test file.

    The ``timm`` folder stays out, so that the installed timm is the one that is tested.

    Args:
        sdist: Archive or unpacked folder of a source distribution.
        folder: Folder to copy to.

    Raises:
        SystemExit: If the source distribution has no model tests, or its feature list is not where it was.
    """
    (folder / 'tests').mkdir()
    if sdist.is_dir():
        files = {path.relative_to(sdist).as_posix(): path.read_bytes()
                 for path in [sdist / 'pyproject.toml', *(sdist / 'tests').glob('*.py')]}
    else:
        with tarfile.open(sdist) as archive:
            members = {member.name.partition('/')[2]: member for member in archive if member.isfile()}
            files = {name: archive.extractfile(member).read() for name, member in members.items()
                     if name == 'pyproject.toml' or (Path(name).parent == Path('tests') and name.endswith('.py'))}
    if 'tests/test_models.py' not in files:
        sys.exit(f'{sdist} has no tests/test_models.py; name a source distribution that has with --sdist.')
    for name, content in files.items():
        (folder / name).write_bytes(content)

    suite = folder / 'tests' / 'test_models.py'
    text = suite.read_text()
    if text.count(FEATURE_LIST) != 1:
        sys.exit(f"{sdist}: expected '{FEATURE_LIST}' once in tests/test_models.py.")
    suite.write_text(text.replace(FEATURE_LIST, f"{FEATURE_LIST}'{MODULE}', "))
    return suite


def why_unreachable(hf_hub_id: str) -> str:
    """Ask the Hub for the head of one small file; returns why that failed, '' if it worked."""
    repo_id, _, revision = hf_hub_id.partition('@')
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, 'config.json', revision=revision or None), timeout=10)
    except Exception as e:
        return f'{constants.ENDPOINT} does not answer ({type(e).__name__})'
    return ''


class OurModels:
    """pytest plug-in: keeps the tests of our networks, without downloads that cannot work."""

    def __init__(self):
        self.names = set(timm.list_models(module=MODULE))
        self.unreachable = {}  # Hub id -> reason, '' if it answers
        self.left_out = []

    def pytest_collection_modifyitems(self, config, items):
        kept, deselected = [], []
        for item in items:
            (kept if self.wanted(item) else deselected).append(item)
        if deselected:
            config.hook.pytest_deselected(items=deselected)
        items[:] = kept

    def wanted(self, item) -> bool:
        name = item.callspec.params.get('model_name') if hasattr(item, 'callspec') else None
        if not isinstance(name, str) or name.partition('.')[0] not in self.names:
            return False
        cfg = timm.get_pretrained_cfg(name)
        if item.originalname not in DOWNLOADING_TESTS or cfg.file or not cfg.hf_hub_id:
            return True
        if not any(self.unreachable.values()):  # one request that fails is enough
            self.unreachable.setdefault(cfg.hf_hub_id, why_unreachable(cfg.hf_hub_id))
        if any(self.unreachable.values()):
            self.left_out.append(item.nodeid)
            return False
        return True

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section(f'timm {timm.__version__}, {len(self.names)} networks of timm_lm')
        if self.left_out:
            reason = next(filter(None, self.unreachable.values()))
            terminalreporter.line(f'Left out, their weights are downloaded and {reason}:')
            for nodeid in self.left_out:
                terminalreporter.line(f'  {nodeid}')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0], allow_abbrev=False)
    parser.add_argument('--sdist', type=Path, help='source distribution of timm, archive or folder; downloaded if none')
    args, pytest_args = parser.parse_known_args()
    if not all(map(timm.is_model, ('lm_resnet20', 'preact_resnet20'))):
        sys.exit('timm does not know the networks of timm_lm.')
    with tempfile.TemporaryDirectory(prefix='timm_suite_') as tmp:
        folder = Path(tmp)
        suite = copy_suite(args.sdist or fetch_sdist(timm.__version__, folder), folder)
        plugin = OurModels()
        code = pytest.main(
            ['-c', str(folder / 'pyproject.toml'), '--rootdir', str(folder), '-p', 'no:cacheprovider', '-q', '-ra',
             '-W', 'ignore::pytest.PytestAssertRewriteWarning', *pytest_args, str(suite)],
            plugins=[plugin],
        )
    return int(code)


if __name__ == '__main__':
    sys.exit(main())

"""Fixtures that all tests share: real images as Parquet, a small trained network, and the command line.

The package is imported in them, as pytest's controlling process, which runs no test, reads this file first.
"""
import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ['ACCELERATE_USE_CPU'] = 'true'  # with a GPU, too; tests/test_gpu.py takes it back
os.environ.setdefault('TORCH_WARM_POOL', '0')  # of processes that compile for GPUs only
# before huggingface_hub is imported: tests that speak to a server run in processes, decoded data stays with the tests
os.environ['HF_HUB_OFFLINE'] = '1'
ASSETS = tempfile.TemporaryDirectory(prefix='timm-lm-assets-')
os.environ['HF_ASSETS_CACHE'] = ASSETS.name
os.environ['HF_DATASETS_CACHE'] = os.path.join(ASSETS.name, 'datasets')
os.environ['NO_PROXY'] = os.environ['no_proxy'] = '127.0.0.1'  # where the tests have their Hub
os.environ['MATPLOTLIBRC'] = os.devnull  # pictures by the settings that matplotlib has by itself
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope='session')
def own_cache():
    """Folder of the decoded data of the tests."""
    return Path(ASSETS.name)


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    """Folder of scikit-learn's digits as Parquet: 1,438 images to train on and 359 to test on."""
    from timm_lm.demo import write_digits
    return write_digits(tmp_path_factory.mktemp('data') / 'digits')


@pytest.fixture(scope='session')
def few_digits(tmp_path_factory):
    """Folder of 320 digits: 256 to train on and 64 to test on."""
    from timm_lm.demo import write_digits
    return write_digits(tmp_path_factory.mktemp('data') / 'few', limit=320)


@pytest.fixture(scope='session')
def run_folder(few_digits, tmp_path_factory):
    """A finished run of two epochs of a small network on few digits; tests copy it before they change it."""
    from timm_lm.training.options import parse_options
    from timm_lm.training.train import train
    output = tmp_path_factory.mktemp('runs')
    args = parse_options([
        '-c', 'demo_digits', '--data-dir', str(few_digits), '--epochs', '2', '--warmup-epochs', '0',
        '--model-kwargs', 'layers=(2,2,2)', '--output', str(output), '--experiment', 'run',
    ])
    return train(args, 'timm-lm train -c demo_digits')


@pytest.fixture(scope='session')
def weights(run_folder):
    """Its weights folder."""
    return run_folder / 'weights'


@pytest.fixture
def with_pictures():
    """For tests that look at the pictures of a run."""


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch):
    """In other tests none are drawn, which takes longer than a short training. Fixtures of more than a test draw."""
    if 'with_pictures' not in request.fixturenames:
        monkeypatch.setattr('timm_lm.training.run_log.RunLog.plot', lambda log: None)


@pytest.fixture
def command(capsys):
    """Run the command line in this process: returns (exit code, standard output, standard error)."""
    from timm_lm.cli import main

    def run(*argv):
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return run


@pytest.fixture
def fails(command):
    """Run the command line on bad input: checks exit code 2 and one line of error, and returns the line."""
    def run(*argv):
        code, _, err = command(*argv)
        lines = [line for line in err.splitlines() if line.startswith('timm-lm: error: ')]
        assert code == 2, err
        assert len(lines) == 1 and err.rstrip().endswith(lines[0]), err
        assert 'Traceback' not in err
        return lines[0]
    return run

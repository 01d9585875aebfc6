"""Freed memory is kept for the next step, counted by the page faults of a real process."""
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from timm_lm import allocator

_FAULTS = """
import resource
import sys
import torch
sys.path.insert(0, sys.argv[2])  # the module alone, without timm
from allocator import keep_freed_memory, release_freed_memory

kept = keep_freed_memory() if sys.argv[1] != 'leave' else False
for _ in range(16):  # until the freed blocks are such that an aligned one fits into them
    torch.ones(32, 2 ** 20)  # 128 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    if sys.argv[1] == 'release':
        release_freed_memory()
    torch.ones(32, 2 ** 20)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(what):
    """(whether freed memory is kept, page faults of four tensors of 128 MiB)"""
    env = {name: value for name, value in os.environ.items() if not name.startswith(('MALLOC_', 'GLIBC_'))}
    done = subprocess.run([sys.executable, '-c', _FAULTS, what, Path(allocator.__file__).parent], text=True,
                          capture_output=True, timeout=120, env=env, check=True)
    kept, faults = done.stdout.split()
    return kept == 'True', int(faults)


@pytest.fixture(scope='module')
def keeping():
    return page_faults('keep')


@pytest.mark.parametrize('what', ['leave', 'release'])
def test_freed_memory_is_used_again_unless_released(keeping, what):
    """With glibc; with another C library it is said that nothing is kept."""
    kept, faults = keeping
    assert kept == (platform.libc_ver()[0] == 'glibc')
    assert not kept or 10 * faults < page_faults(what)[1]  # a ratio, as pages may be large


@pytest.mark.parametrize('name, value', [
    ('MALLOC_TRIM_THRESHOLD_', '131072'), ('MALLOC_MMAP_THRESHOLD_', '131072'),
    ('GLIBC_TUNABLES', 'glibc.malloc.trim_threshold=131072')])
def test_settings_of_the_environment_stand(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert allocator.keep_freed_memory() is False


def test_training_and_validation_keep_freed_memory(few_digits, weights, tmp_path, command, monkeypatch):
    kept = []
    for module in ('timm_lm.training.train', 'timm_lm.validate'):
        monkeypatch.setattr(f'{module}.keep_freed_memory', lambda module=module: kept.append(module))
    code, _, err = command('train', '-c', 'demo_digits', '--data-dir', few_digits, '--model-kwargs', 'layers=(1,1,1)',
                           '--epochs', 1, '--warmup-epochs', 0, '--output', tmp_path)
    assert code == 0 and kept == ['timm_lm.training.train'], err
    code, _, err = command('validate', weights, '--data-dir', few_digits)
    assert code == 0 and kept == ['timm_lm.training.train', 'timm_lm.validate'], err

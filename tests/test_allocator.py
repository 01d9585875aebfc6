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
sys.path.insert(0, sys.argv[1])  # the module alone, without timm
from allocator import keep_freed_memory, release_freed_memory

def page_faults(release=False):
    for _ in range(16):  # until the freed blocks are such that an aligned one fits into them
        torch.ones(32, 2 ** 20)  # 128 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        if release:
            release_freed_memory()
        torch.ones(32, 2 ** 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

left = page_faults()
print(keep_freed_memory(), left, page_faults(), page_faults(release=True))
"""


def test_freed_memory_is_used_again_unless_released():
    """With glibc; with another C library it is said that nothing is kept."""
    others = 'MALLOC_', 'GLIBC_', 'LD_PRELOAD'  # the last may bring another allocator
    env = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    done = subprocess.run([sys.executable, '-c', _FAULTS, Path(allocator.__file__).parent], text=True,
                          capture_output=True, timeout=120, env=env, check=True)
    kept, *faults = done.stdout.split()
    left, keeping, released = map(int, faults)
    assert (kept == 'True') == (platform.libc_ver()[0] == 'glibc')
    assert kept != 'True' or 10 * keeping < min(left, released)  # a ratio, as pages may be large


@pytest.mark.parametrize('name, value', [
    ('MALLOC_TRIM_THRESHOLD_', '131072'), ('MALLOC_MMAP_THRESHOLD_', '131072'),
    ('GLIBC_TUNABLES', 'glibc.malloc.trim_threshold=131072')])
def test_settings_of_the_environment_stand(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert allocator.keep_freed_memory() is False


def test_interpreter_is_not_read_on_windows(monkeypatch):
    """As that of the Microsoft Store cannot be opened."""
    monkeypatch.setattr(sys, 'platform', 'win32')
    monkeypatch.setattr(sys, 'executable', 'nowhere')
    assert allocator.keep_freed_memory() is False
    allocator.release_freed_memory()


def test_training_and_validation_keep_freed_memory(few_digits, weights, tmp_path, command, monkeypatch):
    kept = []
    for module in ('timm_lm.training.train', 'timm_lm.validate'):
        monkeypatch.setattr(f'{module}.keep_freed_memory', lambda module=module: kept.append(module))
    code, _, err = command('train', '-c', 'demo_digits', '--data-dir', few_digits, '--model-kwargs', 'layers=(1,1,1)',
                           '--epochs', 1, '--warmup-epochs', 0, '--output', tmp_path)
    assert code == 0 and kept == ['timm_lm.training.train'], err
    code, _, err = command('validate', weights, '--data-dir', few_digits)
    assert code == 0 and kept == ['timm_lm.training.train', 'timm_lm.validate'], err

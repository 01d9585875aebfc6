"""Settings of the C library's allocator, from which PyTorch gets the memory of CPU tensors."""
import ctypes
import os
import platform
import sys

# Names of malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
LARGEST_KEPT = 2 ** 30  # bytes; larger blocks go back to the system at once
_LARGEST_KEPT_BEFORE_2_35 = 2 ** 25  # the most that older versions of glibc accept
_SETTINGS = ('GLIBC_TUNABLES', 'MALLOC_TRIM_THRESHOLD_', 'MALLOC_MMAP_THRESHOLD_')


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep freed blocks for the next allocation instead of giving them back to the system.

    A training step allocates and frees the same megabytes of activations each time. By default glibc unmaps them or
    trims its heap, and the system then maps and zeroes each page again, which took a quarter of a step of
    ``lm_resnet20`` on two cores. The process keeps at most what it used at its peak. Blocks above 1 GiB are not kept,
    nor those above 32 MiB with glibc before 2.35.

    The setting applies to the whole process. It does nothing with another C library, or if the environment sets the
    thresholds itself (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``).

    Returns:
        Whether the setting is in effect.
    """
    if not _has_glibc() or any(name in os.environ for name in _SETTINGS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = any(mallopt(_M_MMAP_THRESHOLD, size) for size in (LARGEST_KEPT, _LARGEST_KEPT_BEFORE_2_35))
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, -1))  # -1: never


def release_freed_memory() -> None:
    """Return glibc's freed blocks to the system once, as between training and validation, which use different ones."""
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _has_glibc() -> bool:
    # the name is searched in the interpreter's file, which on Windows may not be readable
    return sys.platform == 'linux' and platform.libc_ver()[0] == 'glibc'

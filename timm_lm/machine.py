"""This machine: the name of its processor, and the cores that this process may use."""
import os
import platform
import re
from pathlib import Path


def processor_name() -> str:
    """Name of the processor, or of its architecture, such as x86_64, if the system reports no more."""
    try:
        found = re.search(r'^model name\s*: (.+)', Path('/proc/cpuinfo').read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine() or 'CPU'


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1

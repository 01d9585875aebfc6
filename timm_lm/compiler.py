"""Checks for what torch.compile needs, made before the first step to avoid a traceback in it."""
import getpass
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Optional

import torch
from accelerate.utils import DynamoBackend

from .errors import UserError, one_line


def check_compiler(backend: str, mode: Optional[str], on_cpu: bool) -> None:
    """Check the backend of torch.compile, its mode, and what its code for the device needs.

    Where the user has no name, it names the place of the compiler's cache in the environment.

    Raises:
        UserError: If there is no such backend or mode, or a compiler, triton, a newer GPU or a newer PyTorch is needed.
    """
    try:
        torch._dynamo.eval_frame.check_if_dynamo_supported()
    except RuntimeError as e:  # for a version of Python
        raise UserError(f'--torchcompile cannot work here ({one_line(e)}); run eagerly with --no-torchcompile.') from e
    backends = [name for name in torch.compiler.list_backends(exclude_tags=())
                if name.upper() in DynamoBackend.__members__]  # those that Accelerate knows
    if backend not in backends:
        raise UserError(f"There is no backend '{backend}' of torch.compile; there are: {', '.join(backends)}.")
    if backend != 'inductor':
        return
    _name_cache()
    modes = list(torch._inductor.list_mode_options())
    if mode and mode not in modes:
        raise UserError(f"There is no mode '{mode}' of torch.compile; there are: {', '.join(modes)}.")
    if not on_cpu:
        if torch.cuda.is_available():
            _check_triton()
        elif torch.backends.mps.is_available() and torch.__version__ < '2.7':
            raise UserError('--torchcompile needs PyTorch 2.7 or newer on this GPU; run eagerly with '
                            '--no-torchcompile.')
        return
    _check_cpp()


def _name_cache() -> None:
    """Name the compiler's cache if the user has no name, as in a container, where older PyTorch fails."""
    try:
        getpass.getuser()
    except (ImportError, KeyError, OSError):
        if not hasattr(os, 'getuid'):
            return
        place = Path(tempfile.gettempdir(), f'torchinductor_{os.getuid()}')
        os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', str(place))


def _check_cpp() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    try:
        get_cpp_compiler()
    except (OSError, RuntimeError) as e:
        raise UserError(f'--torchcompile needs a C++ compiler on the CPU ({one_line(e)}); install one, name another '
                        'one in the variable CXX, or run eagerly with --no-torchcompile.') from e
    _check_headers('CPLUS_INCLUDE_PATH')


def _check_headers(variable: str) -> None:
    """Look for Python's headers, unless CPATH or another variable may point the compiler to them."""
    if sys.platform == 'linux' and not {'CPATH', variable} & os.environ.keys():
        headers = [sysconfig.get_path('include'), sysconfig.get_path('include', 'posix_prefix')]
        if not any(Path(folder, 'Python.h').is_file() for folder in headers):
            raise UserError(f'--torchcompile needs the headers of Python and {headers[0]} has none; install them '
                            '(python3-dev), or run eagerly with --no-torchcompile.')


def _check_triton() -> None:
    if torch.version.cuda and torch.cuda.get_device_capability()[0] < 7:
        raise UserError('--torchcompile needs a GPU of compute capability 7.0 or newer; run eagerly with '
                        '--no-torchcompile.')
    if importlib.util.find_spec('triton') is None:
        raise UserError('--torchcompile needs the package triton on this GPU; install it, or run eagerly with '
                        '--no-torchcompile.')
    if sys.platform == 'win32':  # where triton brings its own
        return
    compilers = [os.environ['CC']] if 'CC' in os.environ else ['gcc', 'clang']  # as Triton looks for them
    if not any(map(shutil.which, compilers)):
        raise UserError(f"--torchcompile needs a C compiler for this GPU and there is no '{compilers[0]}'; install "
                        'gcc, name another one in the variable CC, or run eagerly with --no-torchcompile.')
    _check_headers('C_INCLUDE_PATH')

"""What compiling is in need of is told by name, before the first step."""
import sys
import sysconfig

import pytest
import torch
from torch._inductor import config, cpp_builder

from timm_lm import compiler
from timm_lm.compiler import check_compiler
from timm_lm.errors import UserError


def test_no_compiler_is_named(few_digits, tmp_path, fails, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    cpp_builder.cpp_compiler_search.cache_clear()
    line = fails('train', '-c', 'demo_digits', '--data-dir', few_digits, '--torchcompile', '--device', 'cpu',
                 '--output', tmp_path / 'output')
    assert 'needs a C++ compiler' in line and '--no-torchcompile' in line
    line = fails('validate', 'lm_resnet20.best_c10', '--data-dir', few_digits, '--torchcompile')
    assert 'needs a C++ compiler' in line


def test_compiler_is_the_one_that_pytorch_takes_and_has_headers(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'platform', 'linux')
    for name in ('CPATH', 'C_INCLUDE_PATH', 'CPLUS_INCLUDE_PATH'):
        monkeypatch.delenv(name, raising=False)
    headers = tmp_path / 'include'
    headers.mkdir()
    (headers / 'Python.h').write_text('')
    monkeypatch.setattr(sysconfig, 'get_path', lambda name, scheme='': str(headers))
    compiler = tmp_path / 'compiler'
    with config.patch({'cpp.cxx': (None, str(compiler))}):  # monkeypatch would delete it in the end
        for content, rights in ((None, 0), ('', 0o644), ('', 0o755), ('#!/bin/sh\nexit 1\n', 0o755)):
            if content is not None:
                compiler.write_text(content)
                compiler.chmod(rights)
            with pytest.raises(UserError, match='needs a C.. compiler on the CPU .*; install one, name another one in'):
                check_compiler('inductor', None, on_cpu=True)
        compiler.write_text('#!/bin/sh\n')
        check_compiler('inductor', None, on_cpu=True)
        monkeypatch.setattr(sysconfig, 'get_path', lambda name, scheme='': str(headers if scheme else tmp_path))
        check_compiler('inductor', None, on_cpu=True)
        (headers / 'Python.h').unlink()
        with pytest.raises(UserError, match=f'the headers of Python and {tmp_path} has none'):
            check_compiler('inductor', None, on_cpu=True)


@pytest.mark.parametrize('missing, message', [
    ('triton', '--torchcompile needs the package triton'),
    ('ccache gcc', "--torchcompile needs a C compiler for this GPU and there is no 'ccache gcc'"),
    ('Python.h', '--torchcompile needs the headers of Python'),
    ('cores', '--torchcompile needs a GPU of compute capability 7.0 or newer')])
def test_what_compiling_for_a_gpu_needs_is_told(monkeypatch, missing, message):
    monkeypatch.setattr(torch.version, 'cuda', '12.8')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (6, 1) if missing == 'cores' else (7, 0))
    monkeypatch.setattr(compiler.importlib.util, 'find_spec', lambda name: None if missing == 'triton' else name)
    monkeypatch.setattr(compiler.shutil, 'which', lambda name: None if name == missing else name)
    monkeypatch.setenv('CC', 'ccache gcc')  # which Triton takes for one program
    monkeypatch.setattr(sys, 'platform', 'linux')
    for name in ('CPATH', 'C_INCLUDE_PATH', 'CPLUS_INCLUDE_PATH'):
        monkeypatch.delenv(name, raising=False)
    if missing == 'Python.h':
        monkeypatch.setattr(sysconfig, 'get_path', lambda name, scheme='': 'nowhere')
    with pytest.raises(UserError, match=message):
        check_compiler('inductor', None, on_cpu=False)
    if missing == 'ccache gcc':  # which triton brings along on Windows
        monkeypatch.setattr(sys, 'platform', 'win32')
        check_compiler('inductor', None, on_cpu=False)


def test_python_that_pytorch_can_not_compile_for_is_told(monkeypatch):
    monkeypatch.setattr(sys, 'version_info', (3, 99))
    with pytest.raises(UserError, match=r'Python 3\.\d+\+ not yet supported .*; run eagerly with --no-torchcompile'):
        check_compiler('inductor', None, on_cpu=True)

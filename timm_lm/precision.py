"""The precision of training: what the options select, and where bfloat16 is worthwhile."""
import re
from pathlib import Path
from typing import Any, Mapping

import torch
from accelerate.utils import is_bf16_available

# Instructions for bfloat16, by the names that PyTorch and Linux give them: AVX-512's, AMX's, Arm's.
_BFLOAT16 = ('avx512_bf16', 'amx_bf16', 'bf16')
_SLOW_CPU = 'this CPU has no instructions for bfloat16, which is many times slower than float32 without them'
_SLOW_GPU = 'this GPU has no instructions for bfloat16 (NVIDIA has them from compute capability 8.0 on)'
_OLD_MPS = 'bfloat16 on this GPU needs macOS 14, PyTorch 2.6 and Accelerate 1.11, or newer ones'


def asked_precision(args: Mapping[str, Any]) -> str:
    """Name of the precision that training options select."""
    return args['amp_dtype'] if args['amp'] else 'float32'


def no_bfloat16(device_type: str) -> str:
    """Why a device should not use bfloat16, '' if it may.

    Args:
        device_type: Such as 'cpu', 'cuda' or 'mps'. PyTorch emulates bfloat16 on GPUs without it.
    """
    if device_type == 'cpu':
        return '' if cpu_has_bfloat16() else _SLOW_CPU
    if device_type == 'cuda' and not torch.cuda.is_bf16_supported(including_emulation=False):
        return _SLOW_GPU
    if device_type == 'mps' and (torch.__version__ < '2.6' or not is_bf16_available()):
        return _OLD_MPS
    return ''


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16.

    PyTorch computes in bfloat16 on any CPU. Without instructions for it, on a third-generation AMD EPYC, a
    training step of ``lm_resnet20`` took 14 times as long as in float32; on some processors a convolution has no
    backward pass in bfloat16 at all (https://github.com/pytorch/pytorch/issues/148861).
    """
    if hasattr(torch.cpu, 'get_capabilities'):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in _BFLOAT16)
    try:  # older versions of PyTorch do not report them
        flags = re.findall(r'(?m)^(?:flags|Features)\s*:(.*)', Path('/proc/cpuinfo').read_text())
    except OSError:  # not Linux
        return False
    return any(name in ' '.join(flags).split() for name in _BFLOAT16)

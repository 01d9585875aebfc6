"""The precision of a training: what its options ask for, and what pays on the CPU."""
import re
from pathlib import Path
from typing import Any, Mapping

import torch

# Instructions for bfloat16, by the names that PyTorch and Linux give them: AVX-512's, AMX's, Arm's.
_BFLOAT16 = ('avx512_bf16', 'amx_bf16', 'bf16')
NO_BFLOAT16 = 'this CPU has no instructions for bfloat16, which is many times slower than float32 without them'


def asked_precision(args: Mapping[str, Any]) -> str:
    """Name of the precision that options of a training ask for."""
    return args['amp_dtype'] if args['amp'] else 'float32'


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16.

    PyTorch computes in bfloat16 on any CPU. Without instructions for it, on an AMD EPYC of the third generation, a
    training step of ``lm_resnet20`` took 14 times as long as in float32; on some processors a convolution has no
    backward pass in bfloat16 at all (https://github.com/pytorch/pytorch/issues/148861).
    """
    if hasattr(torch.cpu, 'get_capabilities'):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in _BFLOAT16)
    try:  # older versions of PyTorch do not tell
        flags = re.findall(r'(?m)^(?:flags|Features)\s*:(.*)', Path('/proc/cpuinfo').read_text())
    except OSError:  # not Linux
        return False
    return any(name in ' '.join(flags).split() for name in _BFLOAT16)

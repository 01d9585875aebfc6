"""The device, precision and processes of a training, managed by Accelerate."""
import argparse
import importlib.util
import os
from datetime import timedelta
from pathlib import Path
from typing import List

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
    parse_flag_from_env,
)

from timm_lm.compiler import check_compiler
from timm_lm.errors import UserError, one_line
from timm_lm.precision import no_bfloat16

from .options import turn_off

# The other processes wait for the first one while it decodes the data and counts the errors of the final weights.
LONGEST_WAIT = timedelta(hours=4)


def settle_precision(args: argparse.Namespace) -> str:
    """Turn off ``--amp`` in bfloat16, which every shipped recipe asks for, on a device that has no instructions for it.

    Returns:
        A note for the user, '' if nothing was changed.

    Raises:
        UserError: If float16 is requested on the CPU.
    """
    if not args.amp:
        return ''
    device_type = _device_type(args)
    if args.amp_dtype == 'float16':
        if device_type == 'cpu':
            raise UserError('--amp in float16 is for GPUs; on the CPU give --amp-dtype bfloat16, or --no-amp.')
        return ''
    reason = no_bfloat16(device_type)
    if not reason:
        return ''
    turn_off(args, 'amp')
    return f'{reason}; training in float32, as with --no-amp.'


def settle_layout(args: argparse.Namespace) -> str:
    """Turn off ``--channels-last``, which every shipped recipe asks for, on Apple's GPUs.

    Batch norms have no backward pass there in this layout, or a wrong one, before PyTorch of mid-2026
    (https://github.com/pytorch/pytorch/issues/175189).

    Returns:
        A note for the user, '' if nothing was changed.
    """
    if not args.channels_last or _device_type(args) != 'mps':
        return ''
    args.channels_last = False
    return 'batch norms may get wrong gradients in channels_last on this GPU; training as with --no-channels-last.'


def create_accelerator(args: argparse.Namespace, folder: Path) -> Accelerator:
    """Set up device, precision, processes, compilation and trackers.

    Args:
        args: Options.
        folder: The run folder, where trackers write.

    Raises:
        UserError: If compilation is requested but there is no compiler, a tracker is not installed, or the processes
            were started so that they cannot train together.
    """
    on_cpu = _on_cpu(args)
    _refuse_other_engines()
    plugin = _dynamo_plugin(args, on_cpu)
    # left by an earlier training in this process, perhaps with another precision or device
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    precision = {'float16': 'fp16', 'bfloat16': 'bf16'}[args.amp_dtype] if args.amp else 'no'
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=on_cpu,  # otherwise it does not connect processes on the CPU
            dynamo_plugin=plugin,
            log_with=_trackers(args) or None,
            project_dir=folder,
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=not args.no_ddp_bb),
                InitProcessGroupKwargs(timeout=LONGEST_WAIT),
            ],
        )
    except ValueError as e:  # for a precision that the device does not support
        raise UserError(f'Accelerate cannot be set up ({e}); give --no-amp, or change its settings.') from e
    _refuse_lone_tasks(accelerator)
    _refuse_hidden_gpus(accelerator)
    if accelerator.device.type in ('cuda', 'xpu') and accelerator.device.index is not None:
        # Accelerate does not do so for ACCELERATE_TORCH_DEVICE; random states are those of the current device
        getattr(torch, accelerator.device.type).set_device(accelerator.device)
    if args.torchcompile and accelerator.num_processes > 1:
        # Small networks gain nothing from graphs that are split where gradients are sent, and older PyTorch loses
        # track of the weights in them: CUDA graphs are recorded again at each step, and gradients may be wrong.
        torch._dynamo.config.optimize_ddp = False
    _set_up_fsdp(accelerator)
    if args.device is not None and not _is_named(accelerator.device, args.device):
        raise UserError(f'--device {args.device} is not what Accelerate chose ({accelerator.device}); leave it out, or '
                        'choose devices with `accelerate launch`.')
    if accelerator.device.type == 'cuda':  # as in timm's script
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def _refuse_other_engines() -> None:
    for name in ('deepspeed', 'megatron_lm', 'parallelism_config'):
        if os.environ.get(f'ACCELERATE_USE_{name.upper()}', 'false').lower() == 'true':  # as Accelerate reads it
            raise UserError(f"Accelerate's settings ask for {name}, which this engine lacks; use DDP or FSDP.")


def _dynamo_plugin(args: argparse.Namespace, on_cpu: bool) -> TorchDynamoPlugin:
    if not args.torchcompile:
        return TorchDynamoPlugin(backend='no')  # otherwise Accelerate's own setting applies
    check_compiler(args.torchcompile, args.torchcompile_mode, on_cpu)
    torch.compiler.reset()  # it compiles only a few networks of a class, and runs others eagerly
    plugin = TorchDynamoPlugin(
        backend=args.torchcompile, mode=args.torchcompile_mode or 'default', fullgraph=False, dynamic=False)
    if hasattr(plugin, 'use_regional_compilation'):  # not in older Accelerate
        plugin.use_regional_compilation = False
    return plugin


def _refuse_lone_tasks(accelerator: Accelerator) -> None:
    # only srun sets it; SLURM_NTASKS is that of the job, also where one process of it trains alone
    tasks = int(os.environ.get('SLURM_STEP_NUM_TASKS', 1))
    if tasks > 1 and accelerator.num_processes == 1:
        raise UserError(f'srun started {tasks} tasks, which would train {tasks} networks, as none knows of the others; '
                        'start one task (--ntasks=1), or on each machine one with a launcher (srun --ntasks-per-node=1 '
                        'torchrun ...). If each is to train its own, `unset SLURM_STEP_NUM_TASKS` before.')


def _refuse_hidden_gpus(accelerator: Accelerator) -> None:
    if accelerator.distributed_type != DistributedType.MULTI_GPU or accelerator.device.type != 'cuda':
        return
    seen, index = torch.cuda.device_count(), accelerator.local_process_index
    if index >= seen:
        raise UserError(f'Process {index + 1} of this machine sees {seen} GPU(s); start no more processes than there '
                        'are GPUs, and let each see all of its machine (under Slurm by --gpus-per-node, not '
                        '--gpus-per-task, and --gpu-bind=none).')


def _set_up_fsdp(accelerator: Accelerator) -> None:
    """Change those settings of FSDP, if it is used, that do not fit this engine, or refuse them."""
    fsdp = getattr(accelerator.state, 'fsdp_plugin', None)
    if fsdp is None:
        return
    # each process creates the whole network; Accelerate would fail to send running statistics
    fsdp.cpu_ram_efficient_loading = False
    fsdp.mixed_precision_policy = None  # autocast sets the lower precision, as without FSDP
    if getattr(fsdp, 'fsdp_version', 1) == 1 and not fsdp.use_orig_params:
        raise UserError('FSDP version 1 hides the parameters from the optimizer; add '
                        '--fsdp_use_orig_params true, or with newer Accelerate --fsdp_version 2.')
    if getattr(fsdp.cpu_offload, 'offload_params', hasattr(fsdp.cpu_offload, 'pin_memory')):
        raise UserError('FSDP that keeps parameters on the CPU cannot resume from a checkpoint, as running '
                        'statistics are on the device; leave --fsdp_offload_params out.')


def _is_named(device: torch.device, name: str) -> bool:
    try:
        named = torch.device(name)
    except RuntimeError as e:
        raise UserError(f'--device {name} is not a PyTorch device ({one_line(e)}).') from e
    return named.type == device.type and named.index in (None, device.index or 0)


def _trackers(args: argparse.Namespace) -> List[str]:
    names = [name for name in ('tensorboard', 'wandb') if getattr(args, f'log_{name}')]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--log-{name} needs the package {name}; run `pip install 'timm-lm[trackers]'`.")
    return names


def _on_cpu(args: argparse.Namespace) -> bool:
    return args.device == 'cpu' or parse_flag_from_env('ACCELERATE_USE_CPU') or not _has_accelerator()


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available() or (
        hasattr(torch, 'accelerator') and torch.accelerator.is_available())


def _device_type(args: argparse.Namespace) -> str:
    """Of the device that Accelerate will choose: 'cpu', 'mps', 'cuda' or 'another'."""
    if _on_cpu(args):
        return 'cpu'
    if torch.backends.mps.is_available():
        return 'mps'
    return 'cuda' if torch.cuda.is_available() else 'another'

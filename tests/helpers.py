"""What tests of several files use: fresh interpreters, and checkpoints that are made to tell something else."""
import json
import os
import subprocess
import sys

from timm_lm.training.checkpoint import state_digest

# what would show them another package or other warnings, or turn the plug-in off
SWITCHES = ('PYTHONPATH', 'PYTHONWARNINGS', 'TIMM_LM_AUTOLOAD', 'TORCH_DEVICE_BACKEND_AUTOLOAD')
OUR_PATH = os.pathsep.join(filter(None, sys.path))  # for those that need what is installed here by whatever way
TIMEOUT = 300  # seconds, which only end an interpreter that hangs


def fresh_python(*args, cwd, **env):
    """Run an interpreter with these arguments and, beside what is inherited, this environment; it must succeed.

    Returns:
        The finished process, with what it printed as text.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    result = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=inherited | env, capture_output=True,
                            text=True, timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr
    return result


def rewrite(path, **values):
    """Change what the ``state.json`` of a checkpoint tells, as if it had been written so."""
    state = json.loads(path.read_text()) | values
    del state['state_sha256']
    path.write_text(json.dumps(state | dict(state_sha256=state_digest(state))))

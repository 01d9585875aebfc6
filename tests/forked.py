"""The command line in processes of its own that start in milliseconds: forked from one that has imported everything.

They are real processes, to be signalled and killed. What only an interpreter's start can show, such as the order of
imports or settings that are read there, is tested with fresh ones.
"""
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

TIMEOUT = 240  # seconds, which only end a process that hangs
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload([
    'timm_lm.cli', 'timm_lm.training.train', 'matplotlib.figure', 'matplotlib.backends.backend_agg'])


def _run(words, script, out, err, file_limit, own_group):
    if own_group:
        os.setsid()
    for number, path in ((1, out), (2, err)):
        if path:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        else:
            reader, file = os.pipe()
            os.close(reader)
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the tests' own processes would ignore it too
    sys.stdout = open(1, 'w', closefd=False)  # noqa: SIM115  with a buffer, whatever PYTHONUNBUFFERED says
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if script:
        sys.path.insert(0, os.path.dirname(script))
        sys.argv = [script, *words]
        runpy.run_path(script, run_name='__main__')
        return
    from timm_lm.cli import main
    sys.exit(main(words))


class Command:
    """A running ``timm-lm``, or a script."""

    def __init__(self, *words, script='', read=True, file_limit=0, own_group=False):
        """
        Args:
            *words: Arguments of the command or script.
            script: Path of the script.
            read: There is a reader of the standard output; otherwise it is a pipe that was closed.
            file_limit: Bytes that no file of its may grow beyond, no limit if 0.
            own_group: It leads a group of processes, which is sent signals as a whole.
        """
        self._folder = tempfile.TemporaryDirectory(prefix='timm-lm-command-')
        self._out, self._err = (Path(self._folder.name, name) for name in ('out', 'err'))
        self._own_group = own_group
        self._process = CONTEXT.Process(
            target=_run, args=(list(map(str, words)), str(script), str(self._out) if read else '', str(self._err),
                               file_limit, own_group))
        self._process.start()

    @property
    def pid(self):
        return self._process.pid

    def signal_when(self, condition, number):
        """Send a signal as soon as the condition holds, if the command runs then; one that hangs is killed."""
        end = time.monotonic() + TIMEOUT
        while self._process.is_alive() and not condition():
            if time.monotonic() > end:
                self._process.kill()
            time.sleep(0.0005)
        if self._process.is_alive():
            (os.killpg if self._own_group else os.kill)(self._process.pid, number)

    def group_lives(self):
        """Whether a process of its group is left, a moment after it ended."""
        for _ in range(200):
            try:
                os.killpg(self._process.pid, 0)
            except ProcessLookupError:
                return False
            time.sleep(0.05)
        return True

    def printed(self):
        """Its standard output so far."""
        return self._out.read_text() if self._out.exists() else ''

    def wait(self):
        """Returns (exit code, or minus the number of the signal that killed it, standard output, standard error)."""
        self._process.join(TIMEOUT)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        out, err = (path.read_text() if path.exists() else '' for path in (self._out, self._err))
        self._folder.cleanup()
        return self._process.exitcode, out, err

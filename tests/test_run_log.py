"""The log of a run by itself: its metrics and pictures, and the lines that it prints."""
import json
import math
import re
import signal

import pytest
from forked import Command

from timm_lm.figures import save_figure
from timm_lm.training.run_log import EVALUATION, RunLog


@pytest.fixture
def drawn(with_pictures, monkeypatch):
    """Heights of the curves that are drawn, for each diagram of a picture, by the picture's name."""
    found = {}

    def noted(figure, path):
        save_figure(figure, path)
        found[path.name] = [[list(line.get_ydata()) for line in axes.lines] for axes in figure.axes]

    monkeypatch.setattr('timm_lm.training.run_log.save_figure', noted)
    return found


def test_metrics_that_are_not_finite_are_null_in_json(tmp_path, drawn):
    log = RunLog(tmp_path)
    log.append(0, dict(loss=1., top1=10.), dict.fromkeys(EVALUATION, 5.) | dict(loss=math.nan), 0.1, {})
    log.truncate(1)
    (line,) = log.path.read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)['eval']['loss'] is None
    (row,) = log.rows()
    assert math.isnan(row['eval']['loss']) and row['eval']['top1'] == 5
    log.plot()
    assert (tmp_path / 'curves.png').stat().st_size > 10_000 and not (tmp_path / 'k.png').exists()
    errors, losses = drawn['curves.png']
    assert errors == [[90], [95]] and losses == [[1], [pytest.approx(math.nan, nan_ok=True)]]


def test_pictures_of_a_run_without_a_validation(tmp_path, drawn):
    """Of a deep network, with one k a channel."""
    log = RunLog(tmp_path)
    log.append(0, dict(loss=1., top1=10.), None, 0.1, {f'blocks.{i}': [i, i + 1] for i in range(13)})
    log.plot()
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ('curves.png', 'k.png'))
    assert drawn['curves.png'] == [[[90], []], [[1], []]]
    assert drawn['k.png'] == [[*([i + 0.5] for i in range(13)), [0, 0]]]


@pytest.mark.parametrize('name', ['metrics.jsonl', 'summary.csv'])
def test_full_disk_for_the_metrics_is_told(tmp_path, name):
    full = b'\n' * 10_000
    (tmp_path / name).write_bytes(full)
    script = tmp_path / 'script.py'
    script.write_text("""
import pathlib, sys
from timm_lm.errors import UserError
from timm_lm.training.run_log import RunLog
try:
    RunLog(pathlib.Path(sys.argv[1])).append(0, dict(loss=1., top1=2., images_per_second=3.), None, 0.1, {})
except UserError as e:
    print(e)
""")
    code, out, err = Command(tmp_path, script=script, file_limit=len(full)).wait()
    assert code == 0, err
    assert re.fullmatch('The metrics in .* could not be written .*File too large.* --resume auto.*\n', out)
    assert (tmp_path / name).read_bytes() == full


def test_lines_of_a_run_are_in_its_log_at_once(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text("""
import os, signal
from timm_lm.training.run_log import write_line
write_line('epoch 1')
os.kill(os.getpid(), signal.SIGKILL)
""")
    code, out, err = Command(script=script).wait()
    assert code == -signal.SIGKILL and 'epoch 1' in out, err


@pytest.mark.parametrize('backend', ['missing', 'svg'])
def test_pictures_are_drawn_whatever_backend_the_environment_names(tmp_path, backend):
    """That of a notebook is often missing in the environment of its commands; elsewhere its own pictures need it."""
    script = tmp_path / 'script.py'
    script.write_text("""
import os, sys
from pathlib import Path
for name in [name for name in sys.modules if name.partition('.')[0] == 'matplotlib']:
    del sys.modules[name]
os.environ['MPLBACKEND'] = sys.argv[1]
from timm_lm.figures import new_figure, save_figure
save_figure(new_figure(2, 1), Path(sys.argv[2]))
import matplotlib
print(os.environ['MPLBACKEND'], sys.argv[1] == 'missing' or matplotlib.get_backend())
""")
    code, out, err = Command(backend, tmp_path / 'picture.png', script=script).wait()
    assert (code, out) == (0, f"{backend} {'svg' if backend == 'svg' else True}\n"), err
    assert (tmp_path / 'picture.png').stat().st_size > 100

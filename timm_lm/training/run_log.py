"""What a run shows and records: a live line, tables, metrics in JSON lines, plots of curves and ``k``."""
import json
import math
import sys
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, List, Mapping, Optional

from timm.utils import update_summary
from tqdm import tqdm

from timm_lm.errors import RESUME
from timm_lm.figures import new_figure, save_figure
from timm_lm.files import sync, temporary_folder, write_text, writing

MAKE_ROOM = f'Make room, then resume {RESUME}.'
# What evaluate() returns, in its order.
EVALUATION = ('top1', 'top5', 'loss', 'errors', 'images', 'images_per_second')
TRAINING = ('loss', 'top1', 'images_per_second')  # of an epoch, the last one only if any of it was trained here


class LiveLine:
    """One line on a terminal that shows the progress of training; elsewhere plain lines at the log interval."""

    def __init__(self, epochs: int, steps: int, enabled: bool):
        """
        Args:
            epochs: Epochs of the run.
            steps: Batches of an epoch.
            enabled: Show anything; only the main process does.
        """
        self.epochs = epochs
        self.steps = steps
        self.enabled = enabled
        self.is_terminal = sys.stderr.isatty()
        self.bar: Optional[tqdm] = None

    def advance(self, epoch: int, step: int) -> None:
        """Show how many batches of the epoch are done."""
        if not (self.enabled and self.is_terminal):
            return
        if self.bar is None:
            self.bar = tqdm(total=self.steps, unit='batch', leave=False, desc=f'epoch {epoch + 1}/{self.epochs}',
                            bar_format='{desc} {n_fmt}/{total_fmt}{postfix}')
        self.bar.update(step - self.bar.n)

    def show(self, epoch: int, step: int, loss: float, error: float, lr: float, rate: float, left: float) -> None:
        """Show loss, error in %, learning rate, images/s and seconds left of the run."""
        if not self.enabled:
            return
        # what matters most comes first: a terminal of 80 columns cuts the rest
        text = (f'loss {loss:.3f}, error {error:.2f} %, {tqdm.format_interval(left)} left, {rate:,.0f} images/s, '
                f'lr {lr:.2e}')
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            print(f'epoch {epoch + 1}/{self.epochs} step {step}/{self.steps}: {text}', flush=True)

    def close(self) -> None:
        """End the line of an epoch."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def epoch_table(epoch: int, epochs: int, train: Dict[str, float], evaluation: Optional[Dict[str, float]],
                lr: float) -> str:
    """A table of an epoch: a row for the training images, and one for the validation images if they were evaluated."""
    rows = [f"{f'epoch {epoch + 1}/{epochs}':<16}{'loss':>9}{'error %':>9}{'top-5 %':>9}{'images/s':>10}{'lr':>10}"]
    for name, values in (('train', train), ('eval', evaluation)):
        if values:
            top5 = f"{100 - values['top5']:>9.2f}" if 'top5' in values else ' ' * 9
            rate = f'{lr:>10.2e}' if name == 'train' else ''
            speed = f"{values['images_per_second']:,.0f}" if 'images_per_second' in values else ''
            rows.append(f"  {name:<14}{values['loss']:>9.4f}{100 - values['top1']:>9.2f}{top5}{speed:>10}{rate}")
    return '\n'.join(rows)


def _add_to_summary(path: Path, row: Mapping[str, Any]) -> None:
    """Add an epoch in timm's columns, blank where there is no value, so that all rows have the same columns."""
    columns: Mapping[str, Any] = row['eval'] or dict.fromkeys(EVALUATION)
    update_summary(row['epoch'], dict.fromkeys(TRAINING) | row['train'], columns, filename=str(path), lr=row['lr'],
                   write_header=not path.exists())


def _line(row: Mapping[str, Any]) -> str:
    """A row in JSON, with null for metrics that are not finite."""
    return json.dumps(_with_metrics(row, lambda value: value if math.isfinite(value) else None)) + '\n'


def _row(line: str) -> Dict[str, Any]:
    return _with_metrics(json.loads(line), lambda value: math.nan if value is None else value)


def _with_metrics(row: Mapping[str, Any], change: Callable[[Any], Any]) -> Dict[str, Any]:
    changed = {split: row[split] and {name: change(value) for name, value in row[split].items()}
               for split in ('train', 'eval')}
    return {**row, **changed}


def write_line(text: str) -> None:
    """Print above the live line, at once also into a file or a pipe."""
    tqdm.write(text)
    sys.stdout.flush()


class RunLog:
    """Metrics of a run, one row per epoch, in ``metrics.jsonl`` and ``summary.csv``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / 'metrics.jsonl'
        self.summary = folder / 'summary.csv'

    def append(
            self,
            epoch: int,
            train: Dict[str, float],
            evaluation: Optional[Dict[str, float]],
            lr: float,
            k: Dict[str, List[float]],
    ) -> None:
        """Add an epoch: training and evaluation metrics, the rate, and each block's ``k`` by name.

        Raises:
            UserError: If it cannot be written, as on a full disk.
        """
        row: Dict[str, Any] = dict(epoch=epoch, train=train, eval=evaluation, lr=lr, k=k)
        with self._writing():
            with open(self.path, 'a') as f:
                f.write(_line(row))
            sync(self.path)  # like the checkpoint that follows it
            _add_to_summary(self.summary, row)

    def _writing(self) -> ContextManager[None]:
        return writing(f'The metrics in {self.folder}', MAKE_ROOM)

    def truncate(self, epochs: int) -> None:
        """Drop the rows after the first ``epochs`` epochs, as a resumed run repeats them, and a line that a crash cut.

        Raises:
            UserError: If they cannot be written; the files are then unchanged.
        """
        if not self.path.exists():
            return
        rows = [row for row in self.rows() if row['epoch'] < epochs]
        with self._writing(), temporary_folder(self.folder, '.summary.') as temporary:
            summary = temporary / self.summary.name
            for row in rows:
                _add_to_summary(summary, row)
            write_text(self.path, ''.join(map(_line, rows)))
            if rows:
                summary.replace(self.summary)
            else:
                self.summary.unlink(missing_ok=True)

    def rows(self) -> List[Dict[str, Any]]:
        """All epochs so far, except a last one that was cut short."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        rows = []
        for line in lines:
            try:
                rows.append(_row(line))
            except json.JSONDecodeError:
                break
        return rows

    def plot(self) -> None:
        """Draw ``curves.png``, and ``k.png`` if the network has a ``k``."""
        rows = self.rows()
        epochs = [row['epoch'] + 1 for row in rows]
        evaluated = [row for row in rows if row['eval']]
        figure = new_figure(9, 3.6)
        error, loss = figure.subplots(1, 2)
        error.plot(epochs, [100 - row['train']['top1'] for row in rows], label='train')
        loss.plot(epochs, [row['train']['loss'] for row in rows], label='train')
        error.plot([r['epoch'] + 1 for r in evaluated], [100 - r['eval']['top1'] for r in evaluated], label='eval')
        loss.plot([r['epoch'] + 1 for r in evaluated], [r['eval']['loss'] for r in evaluated], label='eval')
        for axes, name in ((error, 'error (%)'), (loss, 'loss')):
            axes.set(xlabel='epoch', ylabel=name)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend()
        save_figure(figure, self.folder / 'curves.png')

        names = list(rows[0]['k']) if rows else []
        if not names:
            return
        figure = new_figure(6, 3.6)
        axes = figure.subplots()
        for name in names:
            axes.plot(epochs, [sum(row['k'][name]) / len(row['k'][name]) for row in rows], label=name)
        axes.axhline(0, color='black', linewidth=0.8)
        axes.set(xlabel='epoch', ylabel='k (mean over channels if per channel)')
        axes.grid(alpha=0.3)
        if len(names) <= 12:
            axes.legend(fontsize='x-small')
        save_figure(figure, self.folder / 'k.png')

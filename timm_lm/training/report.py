"""What a run leaves for people: metrics in JSON lines, timm's summary table, pictures of curves and ``k``."""
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from timm.utils import update_summary

# What evaluate() returns, in its order.
EVALUATION = ('top1', 'top5', 'loss', 'errors', 'images', 'images_per_second')


class RunLog:
    """Metrics of a run, one row an epoch, in ``metrics.jsonl`` and ``summary.csv``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / 'metrics.jsonl'

    def append(
            self,
            epoch: int,
            train: Dict[str, float],
            evaluation: Optional[Dict[str, float]],
            lr: float,
            k: Dict[str, List[float]],
    ) -> None:
        """Add an epoch: training and evaluation metrics, the rate, and each block's ``k`` by name."""
        row: Dict[str, Any] = dict(epoch=epoch, train=train, eval=evaluation, lr=lr, k=k)
        with open(self.path, 'a') as f:
            f.write(json.dumps(row) + '\n')
        # blank columns where there was no evaluation, so that all rows have the same
        columns: Mapping[str, Any] = evaluation or dict.fromkeys(EVALUATION)
        update_summary(epoch, train, columns, filename=str(self.folder / 'summary.csv'), lr=lr,
                       write_header=not (self.folder / 'summary.csv').exists())

    def truncate(self, epochs: int) -> None:
        """Forget all but the first epochs, which a resumed run repeats."""
        rows = self.rows()
        if len(rows) <= epochs:
            return
        for path in (self.path, self.folder / 'summary.csv'):
            path.unlink(missing_ok=True)
        for row in rows[:epochs]:
            self.append(row['epoch'], row['train'], row['eval'], row['lr'], row['k'])

    def rows(self) -> List[Dict[str, Any]]:
        """All epochs so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def plot(self) -> None:
        """Draw ``curves.png``, and ``k.png`` if the network has a ``k``."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows = self.rows()
        epochs = [row['epoch'] + 1 for row in rows]
        evaluated = [row for row in rows if row['eval']]
        figure = Figure(figsize=(9, 3.6), layout='constrained')
        FigureCanvasAgg(figure)
        error, loss = figure.subplots(1, 2)
        error.plot(epochs, [100 - row['train']['top1'] for row in rows], label='train')
        loss.plot(epochs, [row['train']['loss'] for row in rows], label='train')
        error.plot([r['epoch'] + 1 for r in evaluated], [100 - r['eval']['top1'] for r in evaluated], label='test')
        loss.plot([r['epoch'] + 1 for r in evaluated], [r['eval']['loss'] for r in evaluated], label='test')
        for axes, name in ((error, 'error (%)'), (loss, 'loss')):
            axes.set(xlabel='epoch', ylabel=name)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(self.folder / 'curves.png', dpi=120)

        names = list(rows[0]['k']) if rows else []
        if not names:
            return
        figure = Figure(figsize=(6, 3.6), layout='constrained')
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for name in names:
            axes.plot(epochs, [sum(row['k'][name]) / len(row['k'][name]) for row in rows], label=name)
        axes.axhline(0, color='black', linewidth=0.8)
        axes.set(xlabel='epoch', ylabel='k (mean over channels if per channel)')
        axes.grid(alpha=0.3)
        if len(names) <= 12:
            axes.legend(fontsize='x-small')
        figure.savefig(self.folder / 'k.png', dpi=120)

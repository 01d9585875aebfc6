"""The record of runs, and the page that is made of it."""
import csv
import json
import re
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from PIL import Image

from timm_lm import results_plots, run_row
from timm_lm.errors import UserError
from timm_lm.names import model_tags
from timm_lm.results import COLUMNS, add_rows, read_rows
from timm_lm.results_page import finished, read_frame, write_report
from timm_lm.run_row import add_runs, read_run
from timm_lm.training.options import parse_options
from timm_lm.training.recipes import find_recipe
from timm_lm.training.run_folder import read_args, read_result

RESULTS = Path(__file__).resolve().parents[1] / 'results'


def row(model, error, seed=1, epochs=160, recipe='paper_c10', **values):
    """A row as a run leaves it, with made-up figures."""
    base = dict(model=f'{model}.{recipe}', top1_err=error, param_count='0.272', dataset='cifar10', recipe=recipe,
                seed=seed, epochs=epochs, run=f'{model}-{seed}-{epochs}', status='done', k_min='-0.100', k_max='0.200',
                k='-0.100 0.200', images=10000)
    return {name: str((base | values).get(name, '')) for name in COLUMNS}


@pytest.fixture
def results(tmp_path):
    """A folder of results with the tables of this project and runs of our own making."""
    folder = tmp_path / 'results'
    folder.mkdir()
    for name in ('tables.yaml', 'published.csv', 'remarks.md'):
        shutil.copy(RESULTS / name, folder)
    rows = [
        row('lm_resnet20', '8.40', 1), row('lm_resnet20', '8.20', 2), row('lm_resnet20', '8.30', 3),
        row('preact_resnet20', '8.10', k='', k_min='', k_max=''),
        row('lm_resnet32', '9.99', epochs=60),
        row('lm_resnet56', '7.00', run='first'), row('lm_resnet56', '7.20', run='again'),
        row('lm_resnet44', '', epochs=12, status='stopped after epoch 12 of 160'),
    ]
    with open(folder / 'cifar10.csv', 'w', newline='') as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture
def no_pictures(monkeypatch):
    """Pages have their text alone; pictures take longer than all of it."""
    monkeypatch.setattr(results_plots, 'save_figure', lambda figure, path: None)


def test_page_sets_runs_beside_published_figures(results, tmp_path):
    page = tmp_path / 'docs' / 'results.md'
    write_report(results, page)
    text = page.read_text()
    summary, table = text.partition("## CIFAR-10, the paper's recipe")[::2]
    lm, plain, other = (next(line for line in table.splitlines() if line.startswith(f'| `{name}`'))
                        for name in ('lm_resnet20', 'preact_resnet20', 'lm_resnet32'))
    assert '| 8.33 | 8.30 ± 0.10 (3 seeds) | -0.10 to 0.20 |' in lm
    assert '| 8.75 (resnet20) | 8.10 (one seed) |  |' in plain
    assert '| 7.00, 7.20 (2 runs of one seed) |' in text
    assert ('`lm_resnet20` cannot be told apart from its plain twin: 8.30 against 8.10 %, a difference of 0.5 standard '
            'errors.') in text
    # of 10,000 images: ((.083 * .917 + .081 * .919) / 10,000) ** 0.5
    assert 'error is that of independent counts, 0.39 points;' in text
    # all figures of a depth, whosever they are; a run of fewer epochs is not among them
    assert ('| `lm_resnet20` | cifar10 | `paper_c10` | 8.30 ± 0.10 (3 seeds) | 8.10 (one seed) | 8.33 (lm_resnet20 '
            'paper_c10), 8.75 (resnet20 paper_c10) | 7.40 (resnet20) | 6.51 (preact_resnet20), 5.97 (resnet20) |'
            ) in summary
    assert '| `lm_resnet32`' not in summary
    assert 'Of the 6 finished LM runs, 0 end with a `k` outside this' in text
    assert '6 runs end with a `k` above 0' in text
    # a run of fewer epochs fills no row, the row keeps the command that does; the run is listed
    assert '| 7.18 |  |  | `timm-lm train -c lm_resnet32.paper_c10 --data-dir DIR` |' in other
    assert '| lm_resnet32-1-60 |' in text and 'stopped after epoch 12 of 160' in text
    for name in ('error_cifar10.png', 'k_by_depth.png'):
        assert f'({name})' in text and (page.parent / name).stat().st_size > 5000
    assert 'error_cifar100.png' not in text


@pytest.mark.parametrize('error, verdict', [
    ('9.20', 'is beaten by'), ('8.80', 'cannot be told apart from'), ('8.00', 'cannot be told apart from'),
    ('7.00', 'beats')])
def test_page_says_whether_a_network_beats_its_twin(results, no_pictures, tmp_path, error, verdict):
    text = (results / 'cifar10.csv').read_text()
    for own in ('8.40', '8.20', '8.30'):
        text = text.replace(own, error)
    (results / 'cifar10.csv').write_text(text)
    write_report(results, tmp_path / 'results.md')
    assert f'`lm_resnet20` {verdict} its plain twin' in (tmp_path / 'results.md').read_text()


def test_network_of_a_table_that_changes_its_recipe(results, no_pictures, tmp_path):
    """Its row is filled by runs with these changes, and by no others; its command names them."""
    path = results / 'tables.yaml'
    path.write_text(yaml.safe_dump([dict(
        title='Taught', dataset='cifar10', recipe='distill_c10', pairs=[['preact_resnet20', 'lm_resnet20']],
        changes=dict(lm_resnet20=dict(kd_model_name='y', grow_from='lm_resnet20.best_c10')), published=[])]))
    rows = [row(name, error, epochs=36, recipe=recipe, run=error) for name, error, recipe in (
        ('lm_resnet20', '6.01', 'distill_c10'), ('lm_resnet20', '6.02', 'distill_c10 with grow_from x'),
        ('lm_resnet20', '6.03', 'distill_c10 with grow_from lm_resnet20.best_c10, kd_model_name y'),
        ('lm_resnet20', '6.05', 'distill_c10 with grow_from lm_resnet20.best_c10'),
        ('preact_resnet20', '6.04', 'distill_c10 with grow_from lm_resnet20.best_c10'))]
    add_rows(rows, results)
    write_report(results, tmp_path / 'results.md')
    head, table = (tmp_path / 'results.md').read_text().partition('## Taught')[::2]
    lm, plain = (next(line for line in table.splitlines() if line.startswith(f'| `{name}`'))
                 for name in ('lm_resnet20', 'preact_resnet20'))
    assert '| 6.03 (one seed) |' in lm and '| `lm_resnet20` | cifar10 | `distill_c10` | 6.03 (one seed) |  |' in head
    assert '-c lm_resnet20.distill_c10 --grow-from lm_resnet20.best_c10 --kd-model-name y --data-dir DIR`' in lm
    assert '|  |  | `timm-lm train -c preact_resnet20.distill_c10 --data-dir DIR` |' in plain


def test_page_of_this_project_is_that_of_its_record(tmp_path):
    """docs/results.md is never written by hand; its pictures are those that one version of matplotlib draws."""
    write_report(RESULTS, tmp_path / 'results.md')
    docs = RESULTS.parent / 'docs'
    assert (tmp_path / 'results.md').read_text() == (docs / 'results.md').read_text()
    pictures = sorted(path.name for path in tmp_path.glob('*.png'))
    assert pictures == sorted(path.name for path in docs.glob('*.png')) and len(pictures) == 3
    if f'matplotlib=={version("matplotlib")}' in (RESULTS.parent / 'requirements-dev.txt').read_text().split():
        for name in pictures:  # decoded, as versions of zlib compress them differently
            drawn, expected = (Image.open(folder / name).convert('RGB') for folder in (tmp_path, docs))
            assert drawn == expected


@pytest.mark.parametrize('table', read_frame(RESULTS)[0], ids=lambda table: table['title'])
def test_commands_of_the_tables_are_understood(table):
    """Those that fill a row: the recipe is for the network, and its weights get a tag of the network."""
    for network in filter(None, sum(table['pairs'], [])):
        path, model = find_recipe(f"{network}.{table['recipe']}")
        assert (path.stem, model) == (table['recipe'], network)
        assert table['recipe'] in model_tags(network) or not network.startswith(('lm_', 'preact_')) or (
            table['recipe'] == 'paper_in1k')
    for network, changes in table.get('changes', {}).items():
        assert network in sum(table['pairs'], [])
        for start in changes.values():
            name, _, tag = start.partition('.')
            assert tag in model_tags(name)
        options = sum(([f"--{option.replace('_', '-')}", value] for option, value in changes.items()), [])
        run = vars(parse_options(['-c', f"{network}.{table['recipe']}", *options]))
        assert run | changes == run


@pytest.mark.parametrize('recorded', [row for path in sorted(RESULTS.glob('cifar*.csv')) for row in read_rows(path)
                                      if row['command']], ids=lambda row: row['run'])
def test_commands_on_record_say_what_was_run(recorded):
    name, action, *words = shlex.split(recorded['command'])
    args = yaml.safe_load(yaml.safe_dump(vars(parse_options(words))))
    assert (name, action, str(args['seed'])) == ('timm-lm', 'train', recorded['seed'])
    assert args['model'] == recorded['model'].partition('.')[0]
    assert run_row._recipe(args, 1) == recorded['recipe']
    if recorded['status'] == 'done':
        assert str(args['epochs']) == recorded['epochs']


def test_a_run_is_added_once_with_what_it_left(run_folder, tmp_path):
    result = json.loads((run_folder / 'result.json').read_text())
    (path,) = add_runs([run_folder], tmp_path)
    add_runs([run_folder], tmp_path)
    (found,) = read_rows(path)
    assert list(found) == list(COLUMNS)
    assert path.name == 'few.csv' and found['dataset'] == 'few'
    assert (found['model'], found['epochs'], found['images']) == ('lm_resnet20.demo_digits', '2', '64')
    assert found['status'] == 'done' and found['command'] == 'timm-lm train -c demo_digits'
    assert float(found['top1_err']) == pytest.approx(100 * int(found['errors']) / 64, abs=0.01)
    assert found['k'].split() == [f'{k:.3f}' for k in result['k']] and len(result['k']) == 3
    ends = min(result['k']), max(result['k'])
    assert (float(found['k_min']), float(found['k_max'])) == pytest.approx(ends, abs=1e-3)
    assert found['img_size'] == '16' and float(found['param_count']) == round(result['parameters'] / 1e6, 3)
    for name, counted in (('top1', result['top1']), ('top5', result['top5'])):
        assert (float(found[name]), float(found[f'{name}_err'])) == pytest.approx((counted, 100 - counted), abs=0.01)
    assert float(found['seen_top1_err']) == pytest.approx(100 - result['seen_in_training']['top1'], abs=0.01)


def test_a_run_is_added_from_within_its_folder(run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(run_folder / 'weights')
    assert read_run('..')['run'] == 'run'
    monkeypatch.chdir(run_folder)
    assert read_run('.')['run'] == read_run('')['run'] == 'run'


def test_another_run_of_the_same_name_is_refused(run_folder, tmp_path):
    for name, value in (('seed', 'seed: 43'), ('model', 'model: preact_resnet20')):
        run = shutil.copytree(run_folder, tmp_path / name / 'run')
        (run / 'result.json').unlink()
        shutil.rmtree(run / 'checkpoints')
        text = (run / 'args.yaml').read_text()
        (run / 'args.yaml').write_text(re.sub(f'(?m)^{name}: .*', value, text))
        with pytest.raises(UserError, match='two runs run of few .lm_resnet20.demo_digits of seed 42 and'):
            add_runs([run_folder, run], tmp_path / 'results')
        assert not list((tmp_path / 'results').iterdir())
    (path,) = add_runs([run_folder], tmp_path / 'results')
    before = path.read_text()
    with pytest.raises(UserError, match='rename the run folder'):
        add_runs([run], tmp_path / 'results')
    assert path.read_text() == before


def test_what_a_run_changed_in_its_recipe_is_recorded(run_folder, few_digits, tmp_path):
    assert read_run(run_folder)['recipe'] == (
        'demo_digits with epochs 2, model_kwargs {\'layers\': [2, 2, 2]}, warmup_epochs 0')
    run = shutil.copytree(run_folder, tmp_path / 'run')
    options = vars(parse_options(['-c', 'demo_digits', '--data-dir', str(few_digits), '--seed', '7', '--no-amp',
                                  '--val-interval', '10', '--eval-metric', 'loss', '--dataset-download',
                                  '--input-key', 'picture', '--target-key', 'number']))
    (run / 'args.yaml').write_text(yaml.safe_dump(options))
    assert read_run(run)['recipe'] == 'demo_digits'
    (run / 'args.yaml').write_text(yaml.safe_dump(options | dict(sched='plateau')))
    assert 'eval_metric loss' in read_run(run)['recipe']  # which then lowers the rate
    (run / 'args.yaml').write_text(yaml.safe_dump(options))
    # the batch of a run is that of all processes
    result = json.loads((run / 'result.json').read_text())
    assert result['processes'] == 1
    (run / 'result.json').write_text(json.dumps(result | dict(processes=2)))
    assert read_run(run)['recipe'] == f"demo_digits with batch_size {2 * options['batch_size']}"
    (run / 'args.yaml').write_text(yaml.safe_dump(options | dict(batch_size=options['batch_size'] // 2)))
    assert read_run(run)['recipe'] == 'demo_digits'


def test_places_of_a_machine_are_not_recorded(run_folder, few_digits, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / 'run')
    options = vars(parse_options(['-c', 'demo_digits', '--grow-from', '/home/me/runs/shallow/weights']))
    for start in ('local-dir:/home/me.x/runs/a', 'lm_resnet20'):
        (run / 'args.yaml').write_text(yaml.safe_dump(options | dict(model=start, data_dir='.')))
        found = read_run(run)
        assert (found['recipe'], found['dataset']) == ('demo_digits with grow_from shallow', few_digits.name)
        (run / 'result.json').unlink(missing_ok=True)
        assert read_run(run)['model'] == 'lm_resnet20.demo_digits'
    (run / 'args.yaml').write_text(yaml.safe_dump(options | dict(grow_from='runs/shallow/weights')))
    assert read_run(run)['recipe'] == 'demo_digits with grow_from shallow'


@pytest.mark.parametrize('dataset', ['', 'torch/image_folder'])
def test_data_of_a_run_is_named_as_on_its_card(run_folder, tmp_path, dataset):
    """By the last name of its folder, which no file elsewhere can have."""
    run = shutil.copytree(run_folder, tmp_path / 'run')
    options, result = read_args(run), read_result(run)
    (run / 'args.yaml').write_text(yaml.safe_dump(options | dict(dataset=dataset)))
    assert read_run(run)['dataset'] == result['folder']
    (run / 'result.json').write_text(json.dumps(result | dict(folder='../../elsewhere')))
    assert add_runs([run], tmp_path / 'a' / 'results') == [tmp_path / 'a' / 'results' / 'elsewhere.csv']


@pytest.mark.parametrize('text', ['', 'model: lm_resnet20', '- a'])
def test_folder_of_other_options_is_no_run(run_folder, tmp_path, text):
    run = shutil.copytree(run_folder, tmp_path / 'run')
    (run / 'args.yaml').write_text(text)
    with pytest.raises(UserError, match='is not a run folder'):
        read_run(run)


def test_a_table_of_a_data_set_without_runs_is_empty(results, no_pictures, tmp_path):
    tables = yaml.safe_load((results / 'tables.yaml').read_text())
    (results / 'tables.yaml').write_text(yaml.safe_dump([*tables, tables[0] | dict(title='Others', dataset='others')]))
    write_report(results, tmp_path / 'results.md')
    section = (tmp_path / 'results.md').read_text().partition('## Others')[2].partition('\n## ')[0]
    assert 'timm-lm train -c' in section and not re.search(r'\| \d+\.\d\d \|', section)


def test_a_run_that_did_not_end_is_a_row_too(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / 'cut')
    (run / 'result.json').unlink()
    lines = (run / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (run / 'metrics.jsonl').write_text(lines[0] + lines[1][:-20])  # killed while it wrote
    (path,) = add_runs([run], tmp_path / 'results')
    (found,) = read_rows(path)
    assert found['status'] == 'stopped after epoch 1 of 2' and found['top1_err'] == ''
    ended = read_run(run_folder)
    told = ('command', 'hardware', 'versions', 'crop_pct', 'img_size')
    assert [found[name] for name in told] == [ended[name] for name in told] and all(found[name] for name in told)
    assert 0 <= float(found['minutes']) <= float(ended['minutes'])
    assert 'batch_size' not in found['recipe']
    state = max(run.glob('checkpoints/step-*/state.json'))
    state.write_text(json.dumps(json.loads(state.read_text()) | dict(processes=2)))
    assert 'batch_size 128' in read_run(run)['recipe']
    assert found['seen_top1_err']


def test_rows_that_are_added_at_once_are_all_there(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: add_rows([row('lm_resnet20', '9.00', seed=number)], tmp_path), range(40)))
    assert len(read_rows(tmp_path / 'cifar10.csv')) == 40


def test_record_with_a_column_of_its_own_is_left_alone(tmp_path):
    add_rows([row('lm_resnet20', '9.00')], tmp_path)
    path = tmp_path / 'cifar10.csv'
    header, line = path.read_text().splitlines()
    path.write_text(f'{header},note\n{line},mine\n')
    with pytest.raises(UserError, match=r'cifar10.csv has columns that the record does not have \(note\); remove them'):
        add_rows([row('lm_resnet20', '8.00', seed=2)], tmp_path)
    assert path.read_text().endswith(',mine\n')


def test_report_command_and_its_errors(results, run_folder, tmp_path, command, fails):
    page = tmp_path / 'page.md'
    code, out, err = command('report', '--results', results, '--page', page, '--add', run_folder)
    assert code == 0, err
    assert out.split() == [str(results / 'few.csv'), str(page)]
    before = (results / 'few.csv').read_text()
    line = fails('report', '--results', results, '--page', page, '--add', run_folder, tmp_path / 'nowhere')
    assert 'nowhere is not a run folder' in line
    (listed,) = [line for line in page.read_text().splitlines() if line.startswith('| run | `lm_resnet20` | few |')]
    assert listed.endswith(f"| done | `{read_run(run_folder)['command']}` |")  # also of a data set without a table
    assert (results / 'few.csv').read_text() == before
    for text in ('', '- title: Others', 'title: Others'):
        (results / 'tables.yaml').write_text(text)
        assert 'no readable tables.yaml' in fails('report', '--results', results, '--page', page)
    (results / 'tables.yaml').write_text('[]')
    (results / 'few.csv').write_text(before + '<<<<<<< ours\n')
    line = fails('report', '--results', results, '--page', page)
    assert f'Row 2 of {results / "few.csv"} does not have a value for each column' in line
    nowhere = tmp_path / 'nowhere'
    line = fails('report', '--results', nowhere, '--page', page)
    assert f'{nowhere} has no record of runs; add some with --add' in line and not nowhere.exists()


def test_report_on_a_record_of_ones_own(run_folder, tmp_path, command):
    """Outside a checkout, from nothing."""
    results, page = tmp_path / 'results', tmp_path / 'docs' / 'page.md'
    code, out, err = command('report', '--results', results, '--page', page, '--add', run_folder)
    assert code == 0 and out.split() == [str(results / 'few.csv'), str(page)], err
    text = page.read_text()
    assert '| run | `lm_resnet20` | few |' in text and '## Remarks' not in text
    assert (page.parent / 'k_by_depth.png').exists()


def test_run_of_other_epochs_fills_the_row_that_asks_for_them(tmp_path):
    rows = [row('lm_resnet20', '7.12', epochs=82, recipe='best_c10 with epochs 82')]
    assert finished(rows, 'lm_resnet20', 'best_c10 with epochs 82') == rows
    assert finished(rows, 'lm_resnet20', 'best_c10') == []
    assert finished([row('lm_resnet20', '7.12', epochs=82)], 'lm_resnet20', 'paper_c10') == []
    rows = [row('lm_resnet44', '6', epochs=epochs, recipe='distill_c10 with grow_from a') for epochs in (36, 35)]
    assert finished(rows, 'lm_resnet44', 'distill_c10 with grow_from a') == rows[:1]  # the other is of an older recipe


def test_panel_that_no_network_fills_is_empty(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(results_plots, 'save_figure', lambda figure, path: drawn.append(figure))
    found = (('lm_resnet20', '0.1'), ('lm_resnet32', '0.1 0.2'), ('lm_resnet44', '0 1 1'))
    results_plots.plot_k([row(name, '8', k=k) for name, k in found], tmp_path / 'k.png')
    assert [axes.axison for axes in drawn[0].axes] == [True, True, True, False]

"""Weights of runs among those that ship, in half precision."""
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from test_train import SMALL

from timm_lm import check_weights, readme_table
from timm_lm import ship as ship_module
from timm_lm.card import recorded_error
from timm_lm.errors import UserError
from timm_lm.models._weights import read_digests
from timm_lm.publish import prepare_tree
from timm_lm.results import read_rows
from timm_lm.run_row import read_run
from timm_lm.ship import ship
from timm_lm.training.options import parse_options
from timm_lm.training.train import train
from timm_lm.weights_folder import verify_folder

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def finished(few_digits, tmp_path_factory):
    """A finished run with a tag of its network, beside its data, which it takes for a data set of the Hub."""
    folder = tmp_path_factory.mktemp('ship')
    data = shutil.copytree(few_digits, folder / 'cifar10')
    return train(parse_options(['-c', 'demo_digits', '--dataset', 'hfds/uoft-cs/cifar10', '--data-dir', str(data),
                                *SMALL, '--tag', 'paper_c10', '--output', str(folder), '--experiment', 'run']),
                 'timm-lm train')


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / 'run')


@pytest.fixture
def places(tmp_path):
    """Folders of weights and of results, empty."""
    weights, results = tmp_path / 'weights', tmp_path / 'results'
    weights.mkdir()
    results.mkdir()
    return weights, results


def test_run_without_a_validation_is_done_and_does_not_ship(few_digits, places, tmp_path):
    run = train(parse_options(['-c', 'demo_digits', '--data-dir', str(few_digits), '--model-kwargs', 'layers=(1,1,1)',
                               '--epochs', '1', '--warmup-epochs', '0', '--val-split', '', '--output', str(tmp_path),
                               '--experiment', 'uncounted']))
    row = read_run(run)
    assert (row['status'], row['errors']) == ('done', '') and row['param_count']
    with pytest.raises(UserError, match='no error count to ship .done.; train it to the end, with a --val-split'):
        ship(run, *places)


def test_weights_ship_in_half_precision_with_their_own_count(run, places):
    weights, results = places
    told = json.loads((run / 'result.json').read_text())
    # a count that the saved file cannot have: what is recorded must be counted anew
    (run / 'result.json').write_text(json.dumps(told | dict(errors=63, top1=100 / 64, k=[9., 9., 9.])))
    row = ship(run, *places)
    folder = weights / 'lm_resnet20.paper_c10'
    state, whole = load_file(folder / 'model.safetensors'), load_file(run / 'weights' / 'model.safetensors')
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float16}
    assert all(torch.equal(state[name], whole[name].to(state[name].dtype)) for name in whole)
    config, own = (json.loads((path / 'config.json').read_text()) for path in (folder, run / 'weights'))
    assert config == own | dict(torch_dtype='float32')  # what transformers computes in
    verify_folder(folder)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert abs(int(row['errors']) - told['errors']) <= 2 and row['images'] == '64'
    assert recorded_error(folder) == float(row['top1_err'])
    assert row['k'].split() == [f'{k.item():.3f}' for k in model.k_values().values()]
    card = (folder / 'README.md').read_text()
    assert '| weights saved in | float16 |' in card and f"{row['errors']} of 64 images" in card
    assert '| weights saved in | float32 |' in (run / 'weights' / 'README.md').read_text()
    assert list(read_digests(weights)) == ['lm_resnet20.paper_c10/model.safetensors']
    assert read_rows(results / 'cifar10.csv') == [row] and row['run'] == 'run'


def test_what_can_not_ship_leaves_everything_as_it_was(run, places, monkeypatch):
    weights, results = places

    def refused(match):
        with pytest.raises(UserError, match=match):
            ship(run, *places)
        assert not list(weights.iterdir()) and not list(results.iterdir())

    with monkeypatch.context() as patch:
        patch.setattr(ship_module, 'TRACKED_LIMIT', 1000)
        refused('remove another folder from')
    result = (run / 'result.json').read_text()
    (run / 'result.json').write_text(json.dumps(json.loads(result) | dict(model='lm_resnet20.unheard_of')))
    refused("lm_resnet20 has no tag 'unheard_of'")
    for model in ('lm_resnet20', 'resnet18.a1_in1k'):
        (run / 'result.json').write_text(json.dumps(json.loads(result) | dict(model=model)))
        refused(f'is of {model}; only networks of this package can ship')
    (run / 'result.json').unlink()
    refused('no error count to ship .stopped after epoch 2 of 2')
    (run / 'result.json').write_text(result)
    file = run / 'weights' / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-1])
    refused('damaged or was changed')


def test_what_a_killed_process_left_is_not_taken_for_weights(run, places):
    weights, results = places
    shutil.copytree(run / 'weights', weights / '.lm_resnet20.paper_c10.0abc')
    ship(run, *places)
    assert list(read_digests(weights)) == ['lm_resnet20.paper_c10/model.safetensors']
    assert [upload.folder.name for upload in prepare_tree(weights, 'owner')] == ['lm_resnet20.paper_c10']


def test_weights_together_have_a_limit(run, places, monkeypatch):
    """To which a folder that is replaced adds nothing."""
    weights, _ = places
    ship(run, *places)
    size = sum(path.stat().st_size for path in weights.rglob('*') if path.is_file())
    monkeypatch.setattr(ship_module, 'TRACKED_LIMIT', 3 * size // 2)
    ship(run, *places)
    folder = weights / 'lm_resnet20.paper_c10'
    folder.rename(folder.with_name('lm_resnet20.best_c10'))
    with pytest.raises(UserError, match='With lm_resnet20.paper_c10 the weights would take'):
        ship(run, *places)


def test_digests_are_those_of_the_weights_even_if_the_row_can_not_be_written(run, places):
    weights, results = places
    results.rmdir()
    results.write_text('no folder')
    with pytest.raises(OSError):
        ship(run, *places)
    assert list(read_digests(weights)) == ['lm_resnet20.paper_c10/model.safetensors']
    results.unlink()
    results.mkdir()
    (results / 'cifar10.csv').write_text('model,seed,run\npreact_resnet20.paper_c10,42,run\n')
    with pytest.raises(UserError, match='There would be two runs run of cifar10'):
        ship(run, *places)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout to ship into, in place of the one that has the tests."""
    folder = tmp_path / 'checkout'
    for name in ('README.md', 'results/published.csv', 'weights/SHA256SUMS'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / name, folder / name)
    for module in (ship_module, readme_table):
        monkeypatch.setattr(module, 'weights_dir', lambda: folder / 'weights')
    return folder


def test_command_ships_and_renews_the_pages(run, finished, checkout, tmp_path, capsys):
    """Also beside a run that cannot ship."""
    # the data is no longer where it was
    data = finished.parent / 'cifar10'
    (run / 'args.yaml').write_text((run / 'args.yaml').read_text().replace(str(data), str(tmp_path / 'gone')))
    assert ship_module.main([str(run), str(tmp_path / 'nowhere'), '--data-dir', str(data)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith('ship: error: ') and len(err.splitlines()) == 1
    assert out.startswith('lm_resnet20.paper_c10: ')
    assert [row['model'] for row in read_rows(checkout / 'results' / 'cifar10.csv')] == ['lm_resnet20.paper_c10']
    folder = checkout / 'weights' / 'lm_resnet20.paper_c10'
    assert '| run | `lm_resnet20` | cifar10 |' in (checkout / 'docs' / 'results.md').read_text()
    assert f'{recorded_error(folder):.2f} (`paper_c10`)' in (checkout / 'README.md').read_text()


def test_command_on_bad_input_says_one_line_and_writes_nothing(checkout, tmp_path, capsys):
    def files():
        return {path: path.stat().st_mtime_ns for path in checkout.rglob('*')}

    before = files()
    assert ship_module.main([str(tmp_path / 'nowhere')]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('ship: error: ') and 'nowhere is not a run folder' in line
    assert files() == before


def test_shipped_weights_are_in_half_precision_and_small():
    folders = [path for path in (CHECKOUT / 'weights').iterdir() if path.is_dir()]
    assert len(folders) > 5
    for folder in folders:
        state = load_file(folder / 'model.safetensors')
        dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
        assert dtypes == {torch.float16}, folder.name
        assert '| weights saved in | float16 |' in (folder / 'README.md').read_text()
    size = sum(path.stat().st_size for path in (CHECKOUT / 'weights').rglob('*') if path.is_file())
    assert size <= ship_module.TRACKED_LIMIT


def test_counts_are_made_again(run, finished, places, tmp_path, monkeypatch, capsys):
    """``make check-weights``: 0 to within two images, 1 beyond them, 2 without the data."""
    errors = int(ship(run, *places)['errors'])
    weights, _ = places
    monkeypatch.setattr(check_weights, 'weights_dir', lambda: weights)
    card = weights / 'lm_resnet20.paper_c10' / 'README.md'
    text = card.read_text()
    for off, expected in ((0, 0), (2, 0), (3, 1)):
        other = errors + off if errors + off <= 64 else errors - off
        monkeypatch.setattr(check_weights, 'recorded_error', lambda folder, other=other: 100 * other / 64)
        capsys.readouterr()
        assert check_weights.main([str(finished.parent)]) == expected
        assert capsys.readouterr().out == (
            f'lm_resnet20.paper_c10: {errors} errors of 64 images, recorded {other}\n')
    monkeypatch.undo()
    monkeypatch.setattr(check_weights, 'weights_dir', lambda: weights)
    assert check_weights.main([str(finished.parent)]) == 0
    assert check_weights.main([str(tmp_path / 'nowhere')]) == 2
    [folder] = (path for path in weights.iterdir() if path.is_dir())
    for path in (folder / 'README.md', folder / 'config.json', folder / 'model.safetensors', folder):
        aside = path.rename(tmp_path / 'aside')
        assert check_weights.main([str(finished.parent)]) == 2, path  # what is missing is not passed over
        aside.rename(path)
    assert check_weights.main([str(finished.parent)]) == 0
    card.write_text(text.replace('uoft-cs/cifar10', 'uoft-cs/cifar11'))
    capsys.readouterr()
    assert check_weights.main([str(finished.parent)]) == 2
    assert 'cifar11 does not exist' in capsys.readouterr().err

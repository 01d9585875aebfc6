"""Weights folders: what is saved comes back bit for bit, in timm and in transformers, and damage is named."""
import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import timm
import torch
from forked import CONTEXT
from hub_server import Hub, running
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from timm.models import generate_default_cfgs

from timm_lm.card import recorded_error, render_card
from timm_lm.errors import UserError
from timm_lm.files import atomic_folder, sha256, sync, write_text
from timm_lm.model_config import record_data
from timm_lm.models import _weights
from timm_lm.names import is_folder_name, load_model
from timm_lm.training.result import run_card
from timm_lm.training.run_folder import read_args, read_result
from timm_lm.weights_folder import CHECK_NAME, save_folder, verify_folder


@pytest.fixture
def folder(weights, tmp_path):
    return shutil.copytree(weights, tmp_path / 'weights')


def flip_a_bit(path, offset=-1000):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


# Saving and loading


def test_timm_gives_back_the_network_that_was_trained(weights):
    model = timm.create_model(f'local-dir:{weights}', pretrained=True).eval()
    check = load_file(weights / CHECK_NAME)
    with torch.inference_mode():
        assert torch.equal(model(check['input']), check['output'])
    assert model.pretrained_cfg['label_names'] == [str(i) for i in range(10)]
    assert model.pretrained_cfg['mean'] == [0.3053] and model.in_chans == 1


def test_a_user_can_change_classes_and_channels(tmp_path):
    trained = timm.create_model('lm_resnet20', layers=(2, 2, 2))
    folder = save_folder(trained, tmp_path / 'weights', '# card', dict(layers=(2, 2, 2)))
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=3, in_chans=1)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 3)
    assert torch.equal(model.stages[1].blocks[1].step.k, trained.stages[1].blocks[1].step.k)


def test_class_count_stands_once_where_transformers_reads_it(weights):
    config = json.loads((weights / 'config.json').read_text())
    assert config['num_classes'] == 10
    assert 'num_classes' not in config.get('model_args', {})


def test_half_precision_is_checked_as_saved(tmp_path):
    model = timm.create_model('lm_resnet20', layers=(1, 1, 1)).eval()
    folder = save_folder(model, tmp_path / 'half', '# card', dict(layers=(1, 1, 1)), dtype=torch.float16)
    assert load_file(folder / 'model.safetensors')['stem.conv.weight'].dtype == torch.float16
    assert json.loads((folder / 'config.json').read_text())['torch_dtype'] == 'float32'  # to compute in
    assert verify_folder(folder)['output'] < 1e-5
    check = load_file(folder / CHECK_NAME)
    with torch.inference_mode():
        assert not torch.equal(model(check['input']), check['output'])


@pytest.mark.filterwarnings('ignore')
def test_features_of_several_branches_are_not_checked(tmp_path):
    model = timm.create_model('crossvit_9_240')
    record_data(model)
    folder = save_folder(model, tmp_path / 'weights', 'card')
    assert set(load_file(folder / CHECK_NAME)) == {'input', 'pre_logits', 'output'}
    assert verify_folder(folder).keys() == {'pre_logits', 'output'}


def test_card_records_the_error_and_comes_back(weights, run_folder):
    result = json.loads((run_folder / 'result.json').read_text())
    assert recorded_error(weights) == pytest.approx(100 - result['top1'], abs=0.005)
    card = ModelCard.load(weights / 'README.md')
    accuracy, error = card.data.eval_results
    assert (accuracy.metric_type, error.metric_type) == ('accuracy', 'error')
    assert accuracy.metric_value == pytest.approx(result['top1'], abs=0.005)
    assert accuracy.dataset_split == error.dataset_split == 'test'
    assert f"in its own precision, it was {100 - result['seen_in_training']['top1']:.2f} %" in card.text
    k = [k.item() for k in load_model(str(weights)).k_values().values()]
    assert f'| `k`, smallest to largest | {min(k):.3f} to {max(k):.3f} |' in card.text
    assert card.data.library_name == 'timm' and card.data.license == 'apache-2.0'
    assert f"{result['errors']} of {result['images']} images" in card.text
    assert 'timm-lm train -c demo_digits' in card.text
    assert re.findall('(?m)^## (.*)', card.text) == ['Use', 'Training', 'Intended use and limits', 'Citation']
    assert 'ship with timm-lm' not in card.text  # this tag is none of the package
    assert '{{' not in str(card) and '{%' not in str(card)


@pytest.mark.parametrize('options, said', [
    ({}, True), (dict(dataset='torch/cifar10'), True), (dict(dataset='hfds/uoft-cs/cifar100'), True),
    (dict(tag='paper_c10'), False), (dict(val_split='train[90%:]'), False), (dict(dataset=''), False)])
def test_card_says_that_a_recipe_was_chosen_on_the_split(weights, run_folder, options, said):
    """Where it was: for our own recipes, on the test split of CIFAR."""
    args = read_args(run_folder) | dict(tag='best_c10', dataset='hfds/uoft-cs/cifar10', val_split='test') | options
    card = run_card(read_result(run_folder), args, load_model(str(weights)))
    assert ('was chosen with errors on this split in view' in card) == said


@pytest.mark.parametrize('dataset, named', [
    ('torch/cifar10', 'CIFAR-10 (`uoft-cs/cifar10`)'),  # the same images
    ('torch/fashion_mnist', 'zalando-datasets/fashion_mnist (`zalando-datasets/fashion_mnist`)'),
    ('torch/KMNIST', 'kmnist'), ('torch/image_folder', 'here'), ('hfds/owner/name', 'owner/name (`owner/name`)'),
    ('hfds/{few_digits}', 'here')])
def test_card_names_the_data_set(weights, run_folder, few_digits, dataset, named):
    """As on the Hub, or by torchvision's name; folders by their own."""
    dataset = dataset.format(few_digits=few_digits)
    told, args = read_result(run_folder) | dict(folder='here'), read_args(run_folder) | dict(dataset=dataset)
    card = run_card(told, args, load_model(str(weights)))
    assert f'| trained on | {named}, split' in card and str(few_digits.parent) not in card


def write_half(folder):
    with atomic_folder(folder) as new:
        (new / 'model.safetensors').write_bytes(b'half')
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize('licence, told', [
    ('cc-by-nc-4.0', ('cc-by-nc-4.0', None)), ('dinov3-license', ('other', 'dinov3-license'))])
def test_licence_that_the_hub_has_no_name_for(licence, told):
    card = render_card(
        'lm_resnet20', '', 'digits', 'test', None, license=licence, parameters=1, saved_in='float32',
        input_size=(3, 32, 32), train_split='train', command='', epochs=1, seed=1, minutes=1, hardware='', precision='',
        versions='')
    data = ModelCard(card).data
    assert (data.license, data.license_name) == told


def test_folder_of_a_killed_writer_is_the_old_one(weights, tmp_path):
    """A process killed while it writes leaves the earlier folder whole."""
    folder = shutil.copytree(weights, tmp_path / 'weights')
    writer = CONTEXT.Process(target=write_half, args=(folder,))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    verify_folder(folder)


def test_failed_writing_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), atomic_folder(tmp_path / 'new') as new:
        (new / 'file').write_text('half')
        raise KeyError
    assert list(tmp_path.iterdir()) == []


# Damage


def test_whole_folder_verifies(folder, command):
    assert max(verify_folder(folder).values()) < 1e-5
    code, out, _ = command('verify', folder)
    assert code == 0 and f'{folder}: intact' in out


def config(**changes):
    """Changes entries in the config of a folder."""
    def change(folder):
        path = folder / 'config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return change


def pickled_weights(folder):
    """Beside no recorded digest."""
    (folder / CHECK_NAME).unlink()
    (folder / 'model.safetensors').write_bytes(pickle.dumps({'stem.conv.weight': [1.0]}))


def cut_weights(folder):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    'no folder': (shutil.rmtree, 'does not exist'),
    'no weights': (lambda folder: (folder / 'model.safetensors').unlink(), 'has no model.safetensors'),
    'no config': (lambda folder: (folder / 'config.json').unlink(), 'has no config.json'),
    'broken config': (lambda folder: (folder / 'config.json').write_text('{'), 'not a readable timm config'),
    'cut weights': (cut_weights, 'damaged or was changed'),
    'flipped bit': (lambda folder: flip_a_bit(folder / 'model.safetensors'), 'damaged or was changed'),
    'torch weights': (lambda folder: torch.save({}, folder / 'model.safetensors'), 'damaged or was changed'),
    'pickled weights': (pickled_weights, 'do not fit the network lm_resnet20 (Error while deserializing header'),
    'pickled check batch': (lambda folder: (folder / CHECK_NAME).write_bytes(pickle.dumps({})),
                            f'{CHECK_NAME} is damaged or no safetensors file'),
    'unknown network': (config(architecture='lm_resnet21'), "architecture 'lm_resnet21', which timm does not know"),
    'other network': (config(architecture='lm_resnet32', model_args=dict(in_chans=1)),
                      'do not fit the network lm_resnet32 ('),
    # as transformers writes the config of a network without any
    'no arguments': (config(model_args=None), 'do not fit the network lm_resnet20 ('),
    'short arguments': (config(architecture='convnext_atto', model_args=dict(depths=[2, 2])),
                        'do not fit the network convnext_atto (list index'),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_damage_is_named_by_verify_and_validate(folder, few_digits, fails, kind):
    damage, message = DAMAGE[kind]
    damage(folder)
    before = sorted(folder.parent.rglob('*'))
    for line in (fails('verify', folder), fails('validate', folder, '--data-dir', few_digits)):
        assert message in line and str(folder) in line
    assert sorted(folder.parent.rglob('*')) == before


@pytest.mark.parametrize('name, told', [('head.fc.bias', 'output'), ('norm.bias', 'features')])
def test_changed_weights_with_a_new_digest_fail_the_check_batch(folder, fails, name, told):
    """Even if they change what is computed by a thousandth alone."""
    path, check = folder / 'model.safetensors', load_file(folder / CHECK_NAME)
    state = load_file(path)
    state[name] += 1e-3 * check[told].abs().max()
    save_file(state, path, metadata=dict(format='pt'))
    save_file(check, folder / CHECK_NAME, metadata=dict(model_sha256=sha256(path)))
    assert f"computes a different '{told}' than recorded" in fails('verify', folder)


def test_folder_that_ships_must_be_that_of_the_table_of_digests(weights, tmp_path, monkeypatch):
    """Whole weights of another training are not those that ship, by whichever path the folder is given."""
    folder = shutil.copytree(weights, tmp_path / 'ships' / 'net.a')
    _weights.write_digests(tmp_path / 'ships')
    save_folder(timm.create_model('lm_resnet20', layers=(1, 1, 1)), tmp_path / 'other', '', dict(layers=(1, 1, 1)))
    monkeypatch.setattr(_weights, 'weights_dir', lambda: tmp_path / 'ships')
    monkeypatch.chdir(tmp_path)
    for path in (folder, 'ships/net.a', 'other'):
        verify_folder(path)
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / 'other', folder)
    for path in (folder, 'ships/net.a'):
        with pytest.raises(UserError, match='differs from SHA256SUMS'):
            verify_folder(path)


# Weights that ship


def shipped():
    return sorted(path.parent.name for path in _weights.weights_dir().glob('*/model.safetensors'))


@pytest.mark.parametrize('name', shipped())
def test_shipped_weights_load_by_name_and_are_whole(name):
    folder = _weights.weights_dir() / name
    assert max(verify_folder(folder).values()) < 1e-4
    check = load_file(folder / CHECK_NAME)
    model = timm.create_model(name, pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(check['input']), check['output'], rtol=1e-4, atol=1e-4)
    assert recorded_error(folder) is not None
    assert name in timm.list_pretrained()
    # by its name it sees images as it does by its folder
    config = json.loads((folder / 'config.json').read_text())
    recorded = config['pretrained_cfg'] | dict(label_names=config['label_names'])
    cfg = json.loads(json.dumps(model.pretrained_cfg))
    for key in ('input_size', 'pool_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'license',
                'label_names'):
        assert cfg[key] == recorded[key], key


def test_all_weights_that_ship_have_a_digest():
    digests = _weights.read_digests(_weights.weights_dir())
    assert sorted(digests) == [f'{name}/model.safetensors' for name in shipped()]


@pytest.mark.parametrize('shipped, published, default', [
    ((), (), 'best_c10'), (('grow_c100',), (), 'best_c10'), (('grow_c100', 'paper_c10'), (), 'paper_c10'),
    (('best_c10', 'paper_c10'), (), 'best_c10'), ((), ('grow_c100',), 'best_c10'),
    (('grow_c100',), ('paper_c10',), 'paper_c10')])
def test_default_tag_keeps_its_classes_whichever_weights_there_are(tmp_path, monkeypatch, shipped, published, default):
    for tag in shipped:
        (tmp_path / f'net.{tag}').mkdir()
        (tmp_path / f'net.{tag}' / 'model.safetensors').write_bytes(b'')
    (tmp_path / 'published.json').write_text(json.dumps(
        {f'net.{tag}': dict(repo_id=f'owner/net.{tag}', revision='abc') for tag in published}))
    monkeypatch.setattr(_weights, 'weights_dir', lambda: tmp_path)
    cfgs = {tag: dict(num_classes=100 if tag.endswith('00') else 10)
            for tag in ('best_c10', 'paper_c10', 'grow_c100')}
    found = generate_default_cfgs(_weights.sources_of_tags('net', cfgs))['net']
    assert found.tags[0] == default and found.default.num_classes == 10
    assert set(found.tags) == set(cfgs)
    assert {tag for tag, cfg in found.cfgs.items() if cfg.has_weights} == {*shipped, *published}


def test_table_of_digests(tmp_path):
    table = tmp_path / 'SHA256SUMS'
    table.write_text('1a  a/b\n\n2b  c d\n')
    assert _weights.read_digests(tmp_path) == {'a/b': '1a', 'c d': '2b'}
    table.write_text('1a\n')
    with pytest.raises(UserError, match='digests of weights in .* are damaged; install timm-lm again'):
        _weights.read_digests(tmp_path)
    table.write_bytes(b'\xff1  a/b\n')  # a flipped bit: no digest is like it
    assert list(_weights.read_digests(tmp_path)) == ['a/b']


@pytest.fixture
def copied_package(tmp_path):
    """A copy of the package with its shipped weights, as an install has them; returns a function that runs code."""
    import timm_lm
    package = os.path.dirname(timm_lm.__file__)
    shutil.copytree(package, tmp_path / 'timm_lm', ignore=shutil.ignore_patterns('__pycache__', 'weights'))
    shutil.copytree(_weights.weights_dir(), tmp_path / 'timm_lm' / 'weights')

    def run(code):
        env = dict(os.environ, PYTHONPATH=str(tmp_path), TIMM_LM_AUTOLOAD='0')
        return subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True)
    return tmp_path / 'timm_lm' / 'weights' / 'lm_resnet20.best_c10' / 'model.safetensors', run


def test_flipped_bit_in_shipped_weights_is_named(copied_package):
    file, run = copied_package
    whole = file.read_bytes()
    damaged = []
    for offset in (100, -1):
        file.write_bytes(whole)
        flip_a_bit(file, offset)
        damaged.append(file.read_bytes())
    for index, data in enumerate([*damaged, whole]):
        file.with_name(str(index)).write_bytes(data)
    (file.parents[1] / 'published.json').write_text('{')  # a damaged record does not stand in the way
    result = run(f"""
import os, timm, timm_lm
for index in range(3):
    os.replace({str(file.parent)!r} + f'/{{index}}', {str(file)!r})
    try:
        timm.create_model('lm_resnet20.best_c10', pretrained=True)
        print('loaded')
    except timm_lm.UserError as e:
        print(e)
    timm.create_model('lm_resnet20')  # without weights nothing is in the way
""")
    *told, last = result.stdout.splitlines()
    assert len(told) == 2 and last == 'loaded', result.stderr
    assert result.stderr.count('published.json is damaged') == 1
    assert all(str(file) in line and 'install timm-lm again' in line for line in told)


def test_lost_shipped_weights_are_not_listed_and_published_ones_found_by_their_record(copied_package):
    file, run = copied_package
    file.unlink()
    (file.parents[1] / 'lm_resnet20.paper_c10' / file.name).unlink()
    record = {'lm_resnet20.best_c10': dict(repo_id='owner/lm_resnet20.best_c10', revision='abc')}
    (file.parents[1] / 'published.json').write_text(json.dumps(record))
    # weights inside the package go before a folder of the project around it, as where it is installed into one
    (file.parents[3] / 'pyproject.toml').write_text('')
    (file.parents[3] / 'weights').mkdir()
    result = run("""
import timm, timm_lm
print(*timm.list_pretrained('lm_resnet20*'))
print(timm.get_pretrained_cfg('lm_resnet20.best_c10').hf_hub_id)
print(timm.get_pretrained_cfg('lm_resnet32.paper_c10').file)
""")
    names, hub_id, other = result.stdout.splitlines()
    assert other == str(file.parents[1] / 'lm_resnet32.paper_c10' / file.name)
    assert 'lm_resnet20.paper_c10' not in names.split() and 'lm_resnet20.best_c10' in names.split()
    assert hub_id == 'owner/lm_resnet20.best_c10@abc'


def test_weights_of_the_hub_and_those_that_a_user_overlays(weights, tmp_path):
    """The latter of a network whose name has weights that ship; each source as timm takes it for its own networks."""
    code = f"""
import pathlib, timm, torch
from safetensors.torch import load_file
model = timm.create_model('hf-hub:owner/digits', pretrained=True).eval()
check = load_file({str(weights / CHECK_NAME)!r})
with torch.inference_mode():
    print('repo', torch.equal(model(check['input']), check['output']))
trained = load_file({str(weights / 'model.safetensors')!r})
torch.save(trained, 'trained.pth')
sources = dict(hf_hub_id='owner/digits', state_dict=trained, file={str(weights / 'model.safetensors')!r},
               url=pathlib.Path('trained.pth').resolve().as_uri())
for kind, source in sources.items():
    model = timm.create_model('lm_resnet20', pretrained=True, layers=(2, 2, 2), in_chans=1,
                              pretrained_cfg_overlay={{kind: source, 'input_size': (1, 16, 16)}})
    print(kind, all((tensor == trained[name]).all() for name, tensor in model.state_dict().items()))
cfg = dict(timm.get_pretrained_cfg('lm_resnet20').to_dict(), hf_hub_id='owner/digits', input_size=(1, 16, 16))
model = timm.create_model('lm_resnet20', pretrained=True, layers=(2, 2, 2), in_chans=1, pretrained_cfg=cfg)
print('config', all((tensor == trained[name]).all() for name, tensor in model.state_dict().items()))
"""
    hub = Hub()
    hub.add('owner/digits', weights)
    with running(hub):
        env = dict(os.environ, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE='0', HF_HOME=str(tmp_path),
                   HF_HUB_DISABLE_XET='1', TORCH_HOME=str(tmp_path / 'torch'))
        result = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, cwd=tmp_path)
    told = [line for line in result.stdout.splitlines() if not line.startswith('Downloading: ')]  # which PyTorch prints
    assert told == ['repo True', 'hf_hub_id True', 'state_dict True', 'file True', 'url True', 'config True'], (
        result.stderr)


def test_pretrained_on_the_meta_device_is_a_network_of_shapes():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of torch: nothing is copied to meta tensors
        model = timm.create_model('lm_resnet20', pretrained=True, device='meta')
    assert {p.device.type for p in model.parameters()} == {'meta'} and len(list(model.parameters())) > 60


# Names


@pytest.mark.parametrize('name, message', [
    ('lm_resnet21', 'no model .*Did you mean lm_resnet'),
    ('lm_resnet20.nope', "has no tag 'nope'; its tags are: .*demo_c10"),
    ('lm_resnet110', 'There are no weights of lm_resnet110'),
    ('lm_resnet20.paper_c100', 'no weights of lm_resnet20.paper_c100; tags with weights: lm_resnet20.best_c10'),
])
def test_names_without_weights(name, message):
    with pytest.raises(UserError, match=message):
        load_model(name)


def test_hub_without_network_is_one_line(fails):
    line = fails('validate', 'hf-hub:owner/name')
    assert 'hf-hub:owner/name could not be loaded' in line


@pytest.mark.parametrize('record', ['[]', '{"lm_resnet20.best_c10": {"repo_id": "owner/name"}}'])
def test_record_of_published_weights_of_another_kind_is_told(tmp_path, record):
    (tmp_path / 'published.json').write_text(record)
    with pytest.warns(UserWarning, match='published.json is damaged'):
        assert _weights._published(tmp_path) == {}


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_folder_that_can_not_be_replaced_stays(weights, tmp_path, monkeypatch, error):
    folder, replace = shutil.copytree(weights, tmp_path / 'weights'), os.replace

    def not_into_place(source, target):
        if target == folder and source.parent == tmp_path:
            raise error('no')
        replace(source, target)

    monkeypatch.setattr(os, 'replace', not_into_place)
    with pytest.raises(error, match='no'), atomic_folder(folder) as new:
        (new / 'model.safetensors').write_bytes(b'half')
    verify_folder(folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_text_that_can_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / 'page.md').write_text('old')
    write_text(tmp_path / 'page.md', 'new\n')
    assert (tmp_path / 'page.md').read_bytes() == b'new\n'

    def full(path):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('timm_lm.files.sync', full)
    with pytest.raises(OSError, match='No space'):
        write_text(tmp_path / 'page.md', 'newer')
    assert [path.read_text() for path in tmp_path.iterdir()] == ['new\n']


@pytest.mark.parametrize('code, is_told', [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_disks_that_do_not_sync_folders(tmp_path, monkeypatch, code, is_told):
    def fsync(fd):
        raise OSError(code, 'of the disk')

    monkeypatch.setattr(os, 'fsync', fsync)
    with pytest.raises(OSError, match='of the disk') if is_told else nullcontext():
        sync(tmp_path)


@pytest.mark.parametrize('name, is_folder', [
    ('runs/w', True), ('local-dir:w', True), ('hf-hub:owner/name', False), ('hf_hub:owner/name', False),
    ('lm_resnet20', False), ('C:/runs/w', True),
    ('./w', True), ('w/', True)])
def test_names_of_folders(name, is_folder):
    assert is_folder_name(name) == is_folder

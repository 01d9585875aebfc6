"""Publishing: through huggingface_hub's client to a Hub on loopback, with the faults that real networks have."""
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from hub_server import Hub, running
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import _http
from safetensors.torch import load_file

import timm_lm
from timm_lm import hub_client
from timm_lm.card import recorded_error, render_card
from timm_lm.models._weights import weights_dir, write_digests
from timm_lm.publish import FILES, published_card
from timm_lm.weights_folder import CARD_NAME, CHECK_NAME, save_folder

NAME = 'lm_resnet20.best_c10'
SHIPPED = weights_dir() / NAME
TOKEN = 'hf_of_the_tests'

# One process runs many commands: each line of its input is a command with its environment. Each command finds the
# client of the Hub as a process of its own would find it.
DRIVER = '''
import contextlib, io, json, os, sys, time
import huggingface_hub
from huggingface_hub.utils import _http

time.sleep = lambda seconds: None  # the client waits between tries
set_factory = getattr(huggingface_hub, 'set_client_factory', None) or huggingface_hub.configure_http_backend
usual_factory = getattr(_http, 'default_client_factory', None) or _http._default_backend_factory
from timm_lm import hub_client, publish
from timm_lm.cli import main

for line in sys.stdin:
    argv, env = json.loads(line)
    before = dict(os.environ)
    os.environ.update(env)
    hub_client.SILENCE = float(os.environ.get('SILENCE', 60))
    set_factory(usual_factory)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    os.environ.clear()
    os.environ.update(before)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
'''


@pytest.fixture(scope='module')
def package(tmp_path_factory):
    """A copy of the package with two weights folders, as an install has them; returns the folder that holds it."""
    folder = tmp_path_factory.mktemp('package')
    source = Path(timm_lm.__file__).parent
    shutil.copytree(source, folder / 'timm_lm', ignore=shutil.ignore_patterns('__pycache__', 'weights'))
    tree = folder / 'timm_lm' / 'weights'
    shutil.copytree(SHIPPED, tree / NAME)
    save_folder(small_network(), tree / 'lm_resnet20.small', small_card(), dict(layers=(1, 1, 1)))
    write_digests(tree)
    return folder


@pytest.fixture(scope='module')
def tree(package):
    return package / 'timm_lm' / 'weights'


def small_network():
    torch.manual_seed(0)
    return timm.create_model('lm_resnet20', layers=(1, 1, 1))


def small_card(error=12.5, dataset='owner/digits', name='lm_resnet20.small', dataset_name='digits'):
    return render_card(
        name, dataset=dataset, dataset_name=dataset_name, split='test', error=error, error_count=45,
        num_images=360, parameters=76_000, input_size=(3, 32, 32), train_split='train', command='timm-lm train',
        epochs=1, seed=0, minutes=0.1, hardware='CPU', precision='float32', versions='timm-lm', seen_error=None,
        saved_in='float32', k='')


@pytest.fixture(scope='module')
def hub():
    hub = Hub()
    hub.tokens = {TOKEN: {'owner'}, 'hf_of_a_reader': set()}
    with running(hub):
        yield hub


@pytest.fixture(autouse=True)
def no_faults_left(request):
    yield
    if 'hub' in request.fixturenames:
        request.getfixturevalue('hub').faults.clear()


@pytest.fixture(scope='module')
def client_env(hub, package, tmp_path_factory):
    """The environment of a process that uses the Hub on loopback and the copy of the package."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(('HF_', 'HUGGING'))}
    home = tmp_path_factory.mktemp('home')
    return dict(env, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE='0', HF_HUB_DISABLE_XET='1', HF_HOME=str(home),
                PYTHONPATH=str(package), TIMM_LM_AUTOLOAD='0')


@pytest.fixture(scope='module')
def client(client_env, package):
    """Runs commands in another process: (exit code, standard output, standard error)."""
    with subprocess.Popen([sys.executable, '-c', DRIVER], env=client_env, cwd=package, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        def run(*argv, HF_TOKEN=TOKEN, **env):
            process.stdin.write(json.dumps([[str(word) for word in argv], dict(env, HF_TOKEN=HF_TOKEN)]) + '\n')
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        yield run
        process.stdin.close()


@pytest.fixture
def done(client):
    """Runs a command that must succeed, and returns its output."""
    def run(*argv, **env):
        code, out, err = client(*argv, **env)
        assert code == 0, err
        return out
    return run


@pytest.fixture
def refused(client):
    """Runs a command that must end with one line of error, and returns the line."""
    def run(*argv, **env):
        code, _, err = client(*argv, **env)
        lines = err.splitlines()
        assert code == 2 and len(lines) == 1 and lines[0].startswith('timm-lm: error: '), err
        assert TOKEN not in err
        return lines[0]
    return run


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(SHIPPED, tmp_path / 'weights')


def commits(hub, repo_id):
    """The commits of a repo after the one that made it."""
    repo = hub.repos.get(repo_id)
    return list(repo.commits)[1:] if repo else []


# The card


def front_matter(text):
    return yaml.safe_load(text.split('---\n')[1])


@pytest.mark.parametrize('text', [(SHIPPED / CARD_NAME).read_text(), small_card(), small_card(None, '')],
                         ids=['shipped', 'rendered', 'without error and data set'])
def test_front_matter_goes_through_the_classes_of_the_hub(text):
    written = front_matter(text)
    card = ModelCard(text)
    assert isinstance(card.data, ModelCardData) and card.data.to_dict() == written
    assert front_matter(str(card)) == written and ModelCard(str(card)).text == card.text
    assert front_matter(published_card(text, 'owner/name')) == written
    assert written['library_name'] == 'timm' and written['license'] == 'apache-2.0'
    assert {'timm', 'image-classification'} <= {*written['tags']} and written['metrics'] == ['accuracy']


def test_shipped_card_tells_data_set_and_error():
    data = ModelCard.load(SHIPPED / CARD_NAME).data
    assert data.datasets == ['uoft-cs/cifar10']
    error = next(result for result in data.eval_results if result.metric_type == 'error')
    assert isinstance(error, EvalResult) and (error.dataset_split, error.metric_value) == ('test', 7.37)
    assert front_matter((SHIPPED / CARD_NAME).read_text())['model-index'][0]['name'] == NAME


def test_published_card_differs_in_its_use_alone():
    text = (SHIPPED / CARD_NAME).read_text()
    published = published_card(text, 'owner/name')
    assert "timm.create_model('hf-hub:owner/name', pretrained=True)" in published and 'FOLDER' not in published
    assert '{{' not in published and '{%' not in published
    start, end = text.index('## Use'), text.index('## Training')
    assert published.startswith(text[:start] + '## Use\n\n```python\nimport timm\n')
    assert published.endswith('\n\n' + text[end:])
    assert published_card(published, 'owner/name') == published


def test_card_that_was_published_elsewhere_gets_the_new_name():
    text = (SHIPPED / CARD_NAME).read_text()
    assert published_card(published_card(text, 'other/name'), 'owner/name') == published_card(text, 'owner/name')
    own = published_card(text, 'other/name').replace('## Use\n', '## Use\n\nAsk me.\n')
    assert published_card(own, 'owner/name') == own


def test_a_section_on_use_of_the_author_stays():
    text = re.sub(r'(?s)## Use.*?## Training', '## Use\n\nAsk me.\n\n## Training', small_card())
    assert published_card(text, 'owner/name') == text


def test_paper_is_cited_for_the_networks_of_this_package_alone():
    assert 'https://arxiv.org/abs/1710.10121' in small_card()  # the Hub links it
    card = small_card(name='resnet18.mine')
    assert '## Citation' not in card and card.endswith('for other images are meaningless.')


def test_local_cards_are_as_before():
    section = re.compile(r'(?s)## Use\n.*?(?=## Training)')
    shipped = section.search((SHIPPED / CARD_NAME).read_text()).group()
    assert section.search(small_card(name=NAME)).group() == shipped


@pytest.mark.parametrize('old, new, message', [
    ('license: apache-2.0\n', '', 'lacks license'),
    ('library_name: timm\n', 'library_name: keras\n', "library_name 'keras'; it must be timm"),
    ('    metrics:\n', '    measures:\n', 'is not readable'),
    ('    metrics:\n', '    source: mine\n    metrics:\n', 'is not readable'),
    ('tags:\n', 'tags: [\n', 'is not readable'),
    ('---\n', '', 'lacks library_name, license, tags, metrics'),
], ids=['license', 'library', 'index', 'source', 'yaml', 'none'])
def test_bad_card_is_named(folder, fails, old, new, message):
    text = (folder / CARD_NAME).read_text()
    assert old in text
    (folder / CARD_NAME).write_text(text.replace(old, new))
    line = fails('push', folder, '--repo-id', 'owner/name', '--dry-run')
    assert message in line and str(folder / CARD_NAME) in line
    assert recorded_error(folder) in (None, recorded_error(SHIPPED))


# Without a network


@pytest.fixture
def no_network(monkeypatch):
    def connect(*args):
        raise AssertionError('a connection was tried')
    monkeypatch.setattr(socket.socket, 'connect', connect)


def test_dry_run_shows_what_would_be_uploaded(folder, command, no_network):
    (folder / 'optimizer.pt').write_bytes(pickle.dumps({}))
    code, out, _ = command('push', folder, '--repo-id', 'owner/name', '--dry-run')
    assert code == 0 and out.startswith(f'{folder} -> owner/name\n')
    for name in FILES:
        size = (folder / name).stat().st_size
        assert re.search(rf'  {re.escape(name)} +{size:,} bytes\n', out) or name == CARD_NAME
    assert 'left out, not part of a weights folder: optimizer.pt\n' in out
    assert 'Nothing was uploaded' in out
    assert (folder / CARD_NAME).read_bytes() == (SHIPPED / CARD_NAME).read_bytes()


def test_dry_run_of_all_shipped_weights(command, no_network):
    code, out, _ = command('push', '--all', '--owner', 'owner', '--dry-run')
    shipped = sorted(path.parent.name for path in weights_dir().glob('*/model.safetensors'))
    assert code == 0
    assert re.findall(r'-> owner/(\S+)', out) == shipped and 'left out' not in out and 'the card' not in out


def test_offline_is_told(folder, fails, monkeypatch, no_network):
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    assert 'because HF_HUB_OFFLINE is set; unset it' in fails('push', folder, '--repo-id', 'owner/name')
    assert 'because HF_HUB_OFFLINE is set; unset it' in fails('verify', 'hf-hub:owner/name')


def test_weights_of_unknown_quality_are_told(tmp_path, command):
    folder = save_folder(small_network(), tmp_path / 'weights', small_card(None, ''), dict(layers=(1, 1, 1)))
    _, out, _ = command('push', folder, '--repo-id', 'owner/name', '--dry-run')
    assert 'the card names no data set of the Hub\n' in out and 'the card records no test error\n' in out


@pytest.mark.parametrize('options, message', [
    ([], 'Give FOLDER --repo-id OWNER/NAME'),
    (['--repo-id', 'owner/name', '--owner', 'owner'], 'Give FOLDER --repo-id OWNER/NAME'),
    (['--all', '--repo-id', 'owner/name'], '--all takes --owner OWNER'),
    (['--repo-id', 'name'], "'name' cannot name a repo"),
    (['--repo-id', 'owner/na--me'], "'owner/na--me' cannot name a repo"),
    (['--repo-id', 'https://huggingface.co/owner/name'], 'cannot name a repo'),
    (['--all', '--owner', 'owner'], 'There are no weights folders in'),
])
def test_options_that_do_not_fit(folder, fails, options, message):
    assert message in fails('push', folder, *options)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize('name, damage, message', [
    ('model.safetensors', flip_a_bit, 'damaged or was changed'),
    (CHECK_NAME, Path.unlink, f'has no {CHECK_NAME}'),
    ('config.json', Path.unlink, 'has no config.json'),
    (CARD_NAME, Path.unlink, f'has no {CARD_NAME}'),
])
def test_damaged_folders_are_not_published(folder, fails, no_network, name, damage, message):
    damage(folder / name)
    line = fails('push', folder, '--repo-id', 'owner/name')
    assert message in line and str(folder) in line


# Published


def test_published_weights_are_those_of_the_folder(hub, done, tree, client_env, tmp_path):
    """Pushed, pushed again, recorded; a fresh process has the same logits by repo and by name."""
    repo_id = f'owner/{NAME}'
    hub.repos.pop(repo_id, None)
    (tree / 'published.json').unlink(missing_ok=True)
    (tree / NAME / 'notes.txt').write_text('mine')
    out = done('push', tree / NAME, '--repo-id', repo_id)
    (tree / NAME / 'notes.txt').unlink()
    [sha] = commits(hub, repo_id)
    assert f'/commit/{sha}\n' in out and 'left out, not part of a weights folder' in out
    files = hub.repos[repo_id].files()
    assert sorted(files) == sorted(['.gitattributes', *FILES])
    for name in set(FILES) - {CARD_NAME}:
        assert files[name] == (tree / NAME / name).read_bytes()
    assert files[CARD_NAME].decode() == published_card((tree / NAME / CARD_NAME).read_text(), repo_id)
    assert json.loads((tree / 'published.json').read_text())[NAME] == dict(repo_id=repo_id, revision=sha)

    hub.log.clear()
    assert done('push', tree / NAME, '--repo-id', repo_id) == (
        f"{repo_id}: nothing to do, commit {sha} is identical\nrecorded in {tree / 'published.json'}\n")
    assert commits(hub, repo_id) == [sha] and not any('commit' in request for request in hub.log)
    assert done('verify', f'hf-hub:{repo_id}').startswith(f'hf-hub:{repo_id}: intact; logits within ')
    told, local = (done('info', source).splitlines() for source in (f'hf-hub:{repo_id}', tree / NAME))
    assert told[-6:] == local[-6:] and told[-6].startswith('  stages.0.blocks.1 ')
    assert f'weights     hf-hub:{repo_id}' in told and 'error       on its card' in told

    # an install without the weights finds them by the record
    shutil.copytree(tree.parent, tmp_path / 'timm_lm', ignore=shutil.ignore_patterns('__pycache__', '*.safetensors'))
    code = (
        'import sys, timm, timm_lm, torch\n'
        'from safetensors.torch import load_file\n'
        'images = load_file(sys.argv[1] + "/test/rand_tensors.safetensors")["input"]\n'
        'def logits(name):\n'
        '    with torch.inference_mode():\n'
        '        return timm.create_model(name, pretrained=True).eval()(images)\n'
        f'print(timm.get_pretrained_cfg("{NAME}").hf_hub_id)\n'
        'local = logits("local-dir:" + sys.argv[1])\n'
        f'print(torch.equal(logits("hf-hub:{repo_id}"), local), torch.equal(logits("{NAME}"), local))\n'
    )
    result = subprocess.run([sys.executable, '-c', code, str(SHIPPED)], text=True, capture_output=True, cwd=tmp_path,
                            env=dict(client_env, PYTHONPATH=str(tmp_path)))
    assert result.stdout == f'{repo_id}@{sha}\nTrue True\n', result.stderr


def test_card_in_any_words_is_accepted(hub, done, folder):
    """Of data in a folder with a name that is no identifier; written by an editor that begins files with a mark."""
    card = small_card(dataset='', dataset_name='Blüten: gelb')
    (folder / CARD_NAME).write_text(card, encoding='utf-8-sig')
    assert 'records no test error' not in done('push', folder, '--repo-id', 'owner/words')
    published = hub.repos['owner/words'].files()[CARD_NAME].decode()
    assert published == published_card(card, 'owner/words')
    assert front_matter(published)['model-index'][0]['results'][0]['dataset'] == dict(
        name='Blüten: gelb', type='Bl-ten-gelb', split='test')


def test_files_of_another_model_are_told(hub, done, folder, tmp_path):
    """transformers reads some of them before the config."""
    (tmp_path / 'other').mkdir()
    for name in ('config.json', '.gitattributes', 'preprocessor_config.json', 'pytorch_model.bin'):
        (tmp_path / 'other' / name).write_text('{}')
    hub.add('owner/reused', tmp_path / 'other')
    told = '; also there, delete what is of another model: preprocessor_config.json, pytorch_model.bin\n'
    for said in ('/commit/', 'is identical'):
        line = done('push', folder, '--repo-id', 'owner/reused')
        assert said in line and line.endswith(told)


def test_all_leaves_what_is_equal_and_uploads_what_changed(hub, done, refused, tree):
    done('push', '--all', '--owner', 'owner')
    names = [NAME, 'lm_resnet20.small']
    before = {name: commits(hub, f'owner/{name}') for name in names}
    assert len(before[NAME]) == len(before['lm_resnet20.small']) == 1

    card = tree / 'lm_resnet20.small' / CARD_NAME
    card.write_text(card.read_text().replace('Top-1', 'top-1'))
    hub.log.clear()
    first, second, _ = done('push', '--all', '--owner', 'owner').splitlines()
    assert first.startswith(f'owner/{NAME}: nothing to do')
    assert commits(hub, f'owner/{NAME}') == before[NAME] and not any('PUT' in request for request in hub.log)
    [_, sha] = commits(hub, 'owner/lm_resnet20.small')
    assert f'/commit/{sha}' in second
    published = json.loads((tree / 'published.json').read_text())
    assert list(published) == names
    assert published['lm_resnet20.small'] == dict(repo_id='owner/lm_resnet20.small', revision=sha)

    # nothing is uploaded if one of them is broken
    whole = card.read_text()
    card.unlink()
    hub.log.clear()
    assert 'has no README.md' in refused('push', '--all', '--owner', 'owner') and not hub.log
    card.write_text(whole)


def test_all_are_published_where_that_can_not_be_recorded(hub, done, refused, tree):
    done('push', '--all', '--owner', 'owner')  # so that there is a record
    record = tree / 'published.json'
    record.rename(record.with_suffix('.aside'))
    try:
        record.mkdir()  # stands for a package that others have installed
        line = refused('push', '--all', '--owner', 'owner', '--revision', 'unrecorded')
        record.rmdir()
        record.write_text('[]')
        assert 'cannot be written' in refused('push', '--all', '--owner', 'owner', '--revision', 'unrecorded')
    finally:
        record.with_suffix('.aside').replace(record)
    assert f'The weights are published, but {record} cannot be written' in line
    assert all(hub.repos[f'owner/{name}'].find('unrecorded') for name in (NAME, 'lm_resnet20.small'))


def test_folders_elsewhere_are_not_recorded(done, tree, folder):
    record = tree / 'published.json'
    before = record.read_bytes() if record.exists() else None
    assert 'recorded' not in done('push', folder, '--repo-id', 'owner/elsewhere')
    assert 'recorded' not in done('push', '--all', folder.parent, '--owner', 'owner')
    assert (record.read_bytes() if record.exists() else None) == before


def test_repos_that_not_everyone_can_load_from(hub, done, refused, tree):
    small = tree / 'lm_resnet20.small'
    record = tree / 'published.json'
    before = record.read_bytes() if record.exists() else None
    assert 'recorded' not in done('push', small, '--repo-id', 'owner/secret', '--private')
    assert hub.repos['owner/secret'].private
    assert 'nothing to do' in done('push', small, '--repo-id', 'owner/secret', '--private')
    hub.add('owner/on-request', small).gated = True
    assert 'recorded' not in done('push', small, '--repo-id', 'owner/on-request')
    assert (record.read_bytes() if record.exists() else None) == before
    assert 'There is no owner/secret' in refused('verify', 'hf-hub:owner/secret', HF_TOKEN='')

    done('push', small, '--repo-id', 'owner/open')
    count = len(hub.repos['owner/open'].commits)
    line = refused('push', small, '--repo-id', 'owner/open', '--private')
    assert 'owner/open exists and is public' in line and len(hub.repos['owner/open'].commits) == count


def test_branches_and_pull_requests(hub, done, refused, folder):
    assert 'There is no owner/branches' in refused('push', folder, '--repo-id', 'owner/branches', '--create-pr')
    done('push', folder, '--repo-id', 'owner/branches')
    repo = hub.repos['owner/branches']
    main = repo.refs['main']
    card = folder / CARD_NAME
    card.write_text(card.read_text().replace('## Citation', '## To cite'))
    done('push', folder, '--repo-id', 'owner/branches', '--revision', 'next')
    assert repo.refs['main'] == main and b'## To cite' in repo.files('next')[CARD_NAME]
    assert f"nothing to do, commit {repo.refs['next']} is identical" in done(
        'push', folder, '--repo-id', 'owner/branches', '--revision', 'next')
    done('push', folder, '--repo-id', 'owner/equal')  # a new branch of a main that is equal has no commit of its own
    assert 'nothing to do' in done('push', folder, '--repo-id', 'owner/equal', '--revision', 'next')
    assert hub.repos['owner/equal'].refs['next'] == hub.repos['owner/equal'].refs['main']
    # anybody may open a pull request
    out = done('push', folder, '--repo-id', 'owner/branches', '--create-pr', HF_TOKEN='hf_of_a_reader')
    assert out.endswith('/owner/branches/discussions/1\n')
    assert repo.refs['main'] == main and b'## To cite' in repo.files('refs/pr/1')[CARD_NAME]


def test_pull_requests_are_not_recorded(done, tree):
    """Neither a new one nor a commit to one."""
    small, record = tree / 'lm_resnet20.small', tree / 'published.json'
    done('push', small, '--repo-id', 'owner/asked')
    before, card = record.read_bytes(), (small / CARD_NAME).read_text()
    (small / CARD_NAME).write_text(card.replace('## Citation', '## To cite'))
    try:
        assert 'recorded' not in done('push', small, '--repo-id', 'owner/asked', '--create-pr')
        (small / CARD_NAME).write_text(card.replace('## Citation', '## How to cite'))
        out = done('push', small, '--repo-id', 'owner/asked', '--revision', 'refs/pr/1')
        assert '/commit/' in out and 'recorded' not in out
    finally:
        (small / CARD_NAME).write_text(card)
    assert record.read_bytes() == before


@pytest.mark.parametrize('config, message', [
    (dict(architectures=['ViTModel'], hidden_size=8), "its config has no 'architecture'); give a repo of a timm model"),
    (dict(architecture='lm_resnet20', pretrained_cfg={}, model_args=dict(depth=3)), "unexpected keyword argument"),
    (dict(architecture='lm_resnet20', pretrained_cfg={}, model_args=dict(global_pool='nope')), 'could not be loaded ('),
    (dict(architecture='convnext_atto', pretrained_cfg={}, model_args=dict(depths=[2, 2])), 'list index out of range'),
    (dict(architecture='lm_resnet20', pretrained_cfg={}), 'could not be loaded ('),  # by its weights
])
def test_repos_of_other_kinds_are_told(hub, refused, tmp_path, config, message):
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'pytorch_model.bin').touch()
    name = f'owner/foreign{len(hub.repos)}'
    hub.add(name, tmp_path)
    line = refused('export', f'hf-hub:{name}', '--output', tmp_path / 'network.onnx')
    assert f'hf-hub:{name} could not be loaded' in line and message in line


# Faults


NOT_WORKING = 'is not working as it should ({status}: the server was told to fail)'
# what the Hub does, the environment of the command, and what is told
FAULTS = {
    'no token': (None, dict(HF_TOKEN=''), 'There is no Hub token; set HF_TOKEN'),
    'wrong token': (None, dict(HF_TOKEN='hf_wrong'), 'does not accept the token (401); set HF_TOKEN'),
    'garbled token': (None, dict(HF_TOKEN='hf_a\tb'), 'holds characters that no token has'),
    'no right': (None, dict(HF_TOKEN='hf_of_a_reader'),
                 "does not give the token access to owner/faults (403: You don't have the rights to create"),
    'log-in fails': (lambda hub: hub.fail('whoami'), {}, NOT_WORKING.format(status=500)),
    'log-in too often': (lambda hub: hub.fail('whoami', status=429), {}, NOT_WORKING.format(status=429)),
    'creation fails': (lambda hub: hub.fail('repos/create'), {}, NOT_WORKING.format(status=500)),
    'upload fails': (lambda hub: hub.fail('PUT /lfs', times=100), {}, 'is not working as it should (500'),
    'commit fails': (lambda hub: hub.fail('/commit/'), {}, NOT_WORKING.format(status=500)),
    'too many requests': (lambda hub: hub.fail('/commit/', status=429), {}, NOT_WORKING.format(status=429)),
    'commit refused': (lambda hub: hub.fail('/commit/', status=409), {},
                       'refused owner/faults (409: the server was told to fail)'),
    'card refused': (lambda hub: hub.fail('validate-yaml', status=400), {},
                     'refused owner/faults (400: the server was told to fail)'),
    'not a Hub': (lambda hub: hub.fail('whoami', status=200, page=b'<html>Log in</html>'), {}, 'Expecting value'),
    'upload cut': (lambda hub: hub.cut('PUT /lfs', times=100), {}, 'The request to http'),
    'commit cut': (lambda hub: hub.cut('/commit/'), {}, 'The request to http'),
    'upload stalls': (lambda hub: hub.stall('PUT /lfs', times=100), dict(SILENCE='0.3'), 'timed out'),
}
if hasattr(huggingface_hub.errors, 'OIDCError'):
    FAULTS['no identity'] = (None, dict(HF_OIDC_RESOURCE='owner/faults', GITHUB_ACTIONS=''), 'OIDC')


@pytest.mark.parametrize('fault', FAULTS)
def test_fault_is_one_line_and_the_next_try_completes(hub, done, refused, folder, fault):
    hub.repos.pop('owner/faults', None)
    hub.large.clear()
    trouble, env, message = FAULTS[fault]
    if trouble:
        trouble(hub)
    line = refused('push', folder, '--repo-id', 'owner/faults', **env)
    assert message in line
    assert commits(hub, 'owner/faults') == []
    hub.faults.clear()
    done('push', folder, '--repo-id', 'owner/faults')
    assert len(commits(hub, 'owner/faults')) == 1
    assert {*FILES} <= {*hub.repos['owner/faults'].files()}


@pytest.mark.parametrize('route', ['.', 'GET .*/resolve/', 'HEAD .*/resolve/'])
def test_connection_cut_while_something_is_loaded(hub, refused, package, few_digits, tmp_path, route):
    hub.add('owner/cut', SHIPPED)
    hub.add('datasets/owner/cut', few_digits)
    hub.cut(route, times=1000)
    output = tmp_path / 'model.onnx'
    assert 'hf-hub:owner/cut could not be loaded (' in refused('export', 'hf-hub:owner/cut', '--output', output)
    line = refused('train', '-c', 'demo_digits', '--dataset', 'hfds/owner/cut', '--output', tmp_path / 'runs')
    assert 'The data set owner/cut could not be downloaded from the Hub (' in line
    assert not list(tmp_path.iterdir())


def test_training_on_a_data_set_of_the_hub(hub, done, refused, few_digits, tmp_path):
    hub.add('datasets/owner/digits', few_digits)
    words = ['train', '-c', 'demo_digits', '--model-kwargs', 'layers=(1,1,1)', '--epochs', 1, '--warmup-epochs', 0,
             '--output', tmp_path, '--dataset']
    done(*words, 'hfds/owner/digits', '--experiment', 'run')
    assert 'owner/digits' in (tmp_path / 'run' / 'weights' / 'README.md').read_text()
    assert refused(*words, 'hfds/owner/nothing').startswith(
        'timm-lm: error: The data set owner/nothing could not be downloaded from the Hub')
    assert refused(*words, 'hfds/owner/digits', '--val-split', 'validation') == (
        "timm-lm: error: The data set owner/digits of the Hub has no split 'validation' (it has: test, train); name "
        'one of these with --val-split (in training also --train-split).')


def test_training_from_a_repo_keeps_the_arguments_of_its_network(hub, done, tree, few_digits, tmp_path):
    hub.add('owner/small', tree / 'lm_resnet20.small')
    done('train', '--model', 'hf-hub:owner/small', '--pretrained', '--data-dir', few_digits, '--train-split',
         'train[:64]', '--val-split', '', '--batch-size', 64, '--epochs', 1, '--warmup-epochs', 0, '--lr', 1e-30,
         '--weight-decay', 0, '--output', tmp_path, '--experiment', 'run')
    published = load_file(tree / 'lm_resnet20.small' / 'model.safetensors')
    assert ModelCard.load(tmp_path / 'run' / 'weights' / CARD_NAME).data.base_model == 'owner/small'
    [checkpoint] = (tmp_path / 'run' / 'checkpoints').iterdir()
    for made in (tmp_path / 'run' / 'weights', Path(done('weights', checkpoint).strip())):
        assert json.loads((made / 'config.json').read_text())['model_args']['layers'] == [1, 1, 1]
        assert torch.equal(load_file(made / 'model.safetensors')['stem.conv.weight'], published['stem.conv.weight'])


def test_hub_that_says_nothing(hub, refused, few_digits, tmp_path):
    """Nobody waits for it for ever."""
    hub.add('datasets/owner/silent', few_digits)
    hub.add('owner/silent', SHIPPED)
    hub.stall('GET /api', times=100)
    line = refused('train', '-c', 'demo_digits', '--dataset', 'hfds/owner/silent', '--output', tmp_path, SILENCE='0.3')
    assert 'The data set owner/silent could not be downloaded from the Hub (' in line
    assert 'timed out' in refused('verify', 'hf-hub:owner/silent', SILENCE='0.3')


def test_client_of_the_user_stays(monkeypatch):
    """Such as one for a proxy, by either of huggingface_hub's ways."""
    name = '_GLOBAL_CLIENT_FACTORY' if hasattr(huggingface_hub, 'set_client_factory') else '_GLOBAL_BACKEND_FACTORY'
    usual, own = getattr(_http, name), object()
    monkeypatch.setattr(_http, name, own)
    hub_client.set_up_client()
    assert getattr(_http, name) is own
    monkeypatch.setattr(_http, name, usual)
    hub_client.set_up_client()
    assert getattr(_http, name).__module__ == hub_client.__name__


def test_pull_request_to_a_gated_repo(hub, refused, folder):
    hub.fail('GET /api/models/owner/gated', status=403, code='GatedRepo')
    line = refused('push', folder, '--repo-id', 'owner/gated', '--create-pr')
    assert 'gives access to owner/gated on request only' in line


@pytest.mark.parametrize('fault, message', [
    (dict(status=403), 'does not give the token access to owner/faults (403'),
    (dict(status=403, code='GatedRepo'), 'gives access to owner/faults on request only; ask for it on its page'),
])
def test_what_may_not_be_read_is_told(hub, refused, fault, message):
    hub.fail('GET /api/models/owner/faults', **fault)
    assert message in refused('verify', 'hf-hub:owner/faults')


def test_no_connection(hub, refused, done, folder):
    hub.repos.pop('owner/faults', None)
    hub.stop()
    try:
        line = refused('push', folder, '--repo-id', 'owner/faults')
        assert f'The request to {hub.endpoint} failed (' in line and 'refused); fix that' in line
        assert 'The request to' in refused('verify', 'hf-hub:owner/faults')
    finally:
        hub.start()
    done('push', folder, '--repo-id', 'owner/faults')


@pytest.mark.parametrize('trouble', [Hub.fail, Hub.cut])
def test_client_tries_an_upload_again(hub, done, folder, trouble):
    hub.repos.pop('owner/again', None)
    hub.large.clear()
    trouble(hub, 'PUT /lfs', times=2)
    done('push', folder, '--repo-id', 'owner/again')
    assert len(commits(hub, 'owner/again')) == 1 and not any(fault.times for fault in hub.faults)


def test_lost_answer_of_a_commit(hub, done, folder, monkeypatch, client):
    """The commit was made but its answer is lost: the next try finds it."""
    from hub_server import _Handler
    answer = _Handler._json

    def lost(self, content):
        if 'commitOid' in content:
            self._cut()
        else:
            answer(self, content)
    monkeypatch.setattr(_Handler, '_json', lost)
    code, _, err = client('push', folder, '--repo-id', 'owner/lost')
    assert code == 2 and 'what is already there is left alone' in err
    monkeypatch.undo()
    assert 'nothing to do' in done('push', folder, '--repo-id', 'owner/lost')
    assert len(commits(hub, 'owner/lost')) == 1


# Verified where they are published


@pytest.mark.parametrize('lost, message', [
    (False, 'hf-hub:owner/tampered/model.safetensors is damaged or was changed'),
    (True, 'hf-hub:owner/tampered has no model.safetensors'),
])
def test_tampered_repo_is_named(hub, done, refused, lost, message):
    repo = hub.add('owner/tampered', SHIPPED)
    whole = repo.refs['main']
    done('verify', 'hf-hub:owner/tampered')
    files = dict(repo.files())
    weights = files.pop('model.safetensors')
    repo.commit(files if lost else {**files, 'model.safetensors': weights[:-4] + b'\0\0\0\1'})
    assert message in refused('verify', 'hf-hub:owner/tampered')
    assert 'intact' in done('verify', f'hf-hub:owner/tampered@{whole}')


def test_verify_of_repos_that_are_not_there(hub, refused):
    assert 'There is no owner/nothing' in refused('verify', 'hf-hub:owner/nothing')
    assert 'cannot name a repo' in refused('verify', 'hf-hub:nothing')
    hub.add('owner/one', SHIPPED)
    assert 'There is no such revision of owner/one' in refused('verify', 'hf-hub:owner/one@next')


def test_verify_takes_folders_and_repos(hub, done, folder):
    hub.add('owner/both', SHIPPED)
    lines = done('verify', folder, 'hf-hub:owner/both').splitlines()
    assert [line.split(': intact')[0] for line in lines] == [str(folder), 'hf-hub:owner/both']

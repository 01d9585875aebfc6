"""README.md and MODEL_CARD.md: every code block does what it says, and the table of networks is what the code makes.

The blocks of a document run in its order in one temporary folder, shell blocks by bash, each Python block in a process
of its own. What a user has is there under the name that the example gives it: images, CIFAR-10 as a download, a card's
``FOLDER`` and ``DIR``, a Hub (on loopback), and a checkout where ``torch.hub`` keeps what it fetched from GitHub.

To be quick, the command ``timm-lm`` is a stub that sends its words to one waiting process, which forks for each of
them and adds to ``timm-lm train`` the options of ``BUDGET``: one epoch of small batches, without compilation. What
installs or tests is not run; that is compared with what ``.ci/run`` calls.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
from hub_server import Hub, running
from PIL import Image
from test_data import write_parquet

from timm_lm import readme_table
from timm_lm.card import recorded_error
from timm_lm.names import model_tags, our_models
from timm_lm.network_size import count_macs
from timm_lm.readme_table import network_table, write_table
from timm_lm.results import read_rows

ROOT = Path(__file__).resolve().parents[1]
TOKEN = 'hf_of_the_docs'
BUDGET = '--epochs 1 --warmup-epochs 0 --sched cosine --batch-size 20 --workers 1 --no-torchcompile'

# Reads [words, folder] from each connection of a socket, with the output and error of the one who asks, and answers
# with an exit code. The words are those of timm-lm, or 'python' and a file.
SERVER = '''
import json, os, runpy, socket, sys
from timm_lm import export, network_size, predict, publish
from timm_lm.cli import main
from timm_lm.training import train

BUDGET = sys.argv[2].split()
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print('ready', flush=True)
while True:
    connection, _ = listener.accept()
    data, fds, *_ = socket.recv_fds(connection, 1 << 16, 2)
    pid = os.fork()
    if pid == 0:
        words, cwd = json.loads(data)
        os.chdir(cwd)
        os.dup2(fds[0], 1)
        os.dup2(fds[1], 2)
        if words[0] == 'python':
            runpy.run_path(words[1], run_name='__main__')
            code = 0
        else:
            code = main(words + BUDGET if words[0] == 'train' else words)
        sys.stdout.flush()
        connection.sendall(str(code).encode())
        os._exit(0)
    for fd in fds:
        os.close(fd)
    connection.close()
    os.waitpid(pid, 0)
'''
STUB = '''#!{python} -SE
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
socket.send_fds(connection, [json.dumps([sys.argv[1:], os.getcwd()]).encode()], [1, 2])
sys.exit(int(connection.recv(9) or 70))  # without an answer, the process ended by an exception that it printed
'''


class Block(NamedTuple):
    line: int
    language: str
    code: str


def blocks(text):
    """The fenced code blocks of a Markdown text."""
    fenced = re.finditer(r'^```(.*)\n((?:(?!```).*\n)*)```$', text, re.MULTILINE)
    found = [Block(text.count('\n', 0, m.start()) + 1, m[1], m[2]) for m in fenced]
    assert text.count('```') == 2 * len(found)
    return found


README = [block for block in blocks((ROOT / 'README.md').read_text()) if block.language != 'bibtex']


@pytest.fixture(scope='module')
def hub():
    """A Hub that lets the owner of the examples write."""
    hub = Hub()
    hub.tokens = {TOKEN: {'OWNER'}}
    with running(hub):
        yield hub


@pytest.fixture(scope='module')
def commands(hub, tmp_path_factory):
    """Runs a block in a folder, and returns what it prints."""
    home = tmp_path_factory.mktemp('home')
    (home / 'bin').mkdir()
    stub = home / 'bin' / 'timm-lm'
    checkouts = home / 'torch' / 'hub'
    checkouts.mkdir(parents=True)
    (checkouts / 'OWNER_timm-lm_main').symlink_to(ROOT)
    env = {name: value for name, value in os.environ.items() if not name.startswith(('HF_', 'HUGGING'))}
    env.update(HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET='1', HF_HOME=str(home / 'hf'),
               TORCH_HOME=str(home / 'torch'), PATH=f"{home / 'bin'}:{env['PATH']}")

    def run(block, cwd):
        file = home / 'block'
        file.write_text(block.code)
        command = ['bash', '-euo', 'pipefail', file] if block.language == 'bash' else [stub, 'python', file]
        result = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)
        assert result.returncode == 0, f'line {block.line}:\n{block.code}\n{result.stdout}\n{result.stderr}'
        return result.stdout

    with tempfile.TemporaryDirectory() as folder:  # as the address of a socket must be short
        address = f'{folder}/socket'
        stub.write_text(STUB.format(python=sys.executable, address=address))
        stub.chmod(0o755)
        with subprocess.Popen([sys.executable, '-c', SERVER, address, BUDGET], env=env, cwd=home, text=True,
                              stdout=subprocess.PIPE) as server:
            assert server.stdout.readline() == 'ready\n'
            yield run
            server.kill()


def image_folder(folder):
    """Three digits of each class to train on and one to validate on, as PNG files."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    for label in range(10):
        rows = np.flatnonzero(digits.target == label)
        for split, some in (('train', rows[:3]), ('validation', rows[3:4])):
            (folder / split / str(label)).mkdir(parents=True)
            for row in some:
                pixels = (digits.images[row] * (255 / 16)).astype(np.uint8)
                Image.fromarray(pixels).resize((40, 40)).save(folder / split / str(label) / f'{row}.png')
    return folder


def cifar10(folder):
    """A folder like a download of CIFAR-10, of 40 and 20 images."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 40), ('test', 20)):
        noise = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        path = folder / 'plain_text' / f'{split}-00000-of-00001.parquet'
        write_parquet(path, list(noise), np.arange(count) % 10, column='img')
    return folder


@pytest.fixture(scope='module')
def readme(commands, tmp_path_factory):
    """The folder in which all of the README's blocks were run, and what each printed, by its code."""
    folder = tmp_path_factory.mktemp('readme')
    image_folder(folder / 'my_images')
    cifar10(folder / 'cifar10')
    return folder, {block.code: commands(block, folder) for block in README if not on_a_clone(block)}


def on_a_clone(block):
    """Whether a block installs or tests, which a test does not do; what CI calls is checked instead."""
    return block.language == 'bash' and all(re.match('make |pip install ', line) for line in block.code.splitlines())


def printed(outputs, command):
    """What the block with a command printed."""
    [text] = [text for code, text in outputs.items() if command in code]
    return text


def test_readme_has_an_example_of_each_use():
    code = '\n'.join(block.code for block in README)
    for use in ("timm.create_model('lm_resnet20', pretrained=True)", 'timm-lm train -c finetune',
                'timm-lm train -c paper_c10', 'timm-lm push', 'torch.hub.load('):
        assert use in code
    assert {block.language for block in README} == {'bash', 'python'}


def test_fine_tuning_in_the_readme_names_the_classes_of_the_images(readme):
    folder, outputs = readme
    lines = printed(outputs, 'timm-lm predict').splitlines()
    assert sum(line.startswith('my_images/validation/') for line in lines) == 10
    assert any(re.search(r'of 10 images \(\d+\.\d\d %\)', line) for line in lines)
    assert json.loads((folder / 'runs/tuned/weights/config.json').read_text())['label_names'] == list('0123456789')


def test_training_in_the_readme_ends_with_weights(readme):
    folder, outputs = readme
    assert 'errors of 20 images' in printed(outputs, 'timm-lm validate runs/paper/weights')
    assert '# lm_resnet20.paper_c10' in (folder / 'runs/paper/weights/README.md').read_text()


def test_export_in_the_readme_writes_a_file(readme):
    assert (readme[0] / 'lm_resnet20.onnx').is_file()


def test_publishing_in_the_readme_is_one_commit(readme, hub):
    folder, outputs = readme
    created, uploaded = hub.repos['OWNER/NAME'].commits.values()
    weights = folder / 'runs/tuned/weights/model.safetensors'
    assert uploaded.keys() - created.keys() == {
        'model.safetensors', 'config.json', 'README.md', 'test/rand_tensors.safetensors'}
    assert uploaded['model.safetensors'] == weights.read_bytes()
    assert 'hf-hub:OWNER/NAME: intact' in printed(outputs, 'timm-lm push')


def test_commands_on_a_clone_are_those_that_ci_runs():
    code = [block.code for block in README if on_a_clone(block)]
    lines = [line.partition('#')[0].split() for line in ''.join(code).splitlines()]
    assert lines == [['make', 'demo'], ['make', 'test'], ['pip', 'install', 'timm-lm']]
    assert re.search('^name = "timm-lm"$', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)
    if (ROOT / '.ci').exists():  # an unpacked sdist has none
        assert 'make test' in (ROOT / '.ci' / 'run').read_text().splitlines()
    # without what a make that runs this test has set
    env = {name: value for name, value in os.environ.items() if name != 'VENV' and not name.startswith('M')}
    recipe = {target: subprocess.run(['make', '--dry-run', '--no-print-directory', target], cwd=ROOT, check=True,
                                     env=env, capture_output=True, text=True).stdout.splitlines()[-1].split()
              for target in ('demo', 'test')}
    assert recipe == dict(demo=['.venv/bin/timm-lm', 'demo'], test=['.venv/bin/python', '-m', 'pytest'])


def run_card(text, commands, folder):
    """Run the blocks of a card; returns the languages."""
    found = blocks(text)
    for block in found:
        if block.language != 'bibtex':
            commands(block, folder)
    return [block.language for block in found]


def test_card_of_a_weights_folder(readme, commands, tmp_path):
    """The card that the README's training wrote, which MODEL_CARD.md is the template of."""
    (tmp_path / 'FOLDER').symlink_to(readme[0] / 'runs' / 'paper' / 'weights')
    (tmp_path / 'DIR').symlink_to(readme[0] / 'cifar10')
    card = (tmp_path / 'FOLDER' / 'README.md').read_text()
    languages = run_card(card, commands, tmp_path)
    assert languages == ['python', 'python', 'bash', 'bibtex']
    assert languages == [block.language for block in blocks((ROOT / 'timm_lm' / 'MODEL_CARD.md').read_text())]
    assert [path.name for path in (tmp_path / 'output' / 'train').glob('*/weights')] == ['weights']


def test_card_of_a_repo(readme, hub, commands, tmp_path):
    card = hub.repos['OWNER/NAME'].files()['README.md'].decode()
    assert "'hf-hub:OWNER/NAME'" in card
    (tmp_path / 'DIR').symlink_to(readme[0] / 'my_images')
    assert run_card(card, commands, tmp_path) == ['python', 'python', 'bash', 'bibtex']


def test_failing_block_is_told(commands, tmp_path):
    """The means of these tests: a block that fails, also in its first line of two, fails its test."""
    for block in (Block(1, 'bash', 'timm-lm info lm_resnet21\n'), Block(1, 'bash', 'timm-lm info lm_resnet21\ntrue\n'),
                  Block(1, 'python', 'import no_such_module\n')):
        with pytest.raises(AssertionError, match='lm_resnet21|no_such_module'):
            commands(block, tmp_path)


# The table of networks


def test_table_in_the_readme_is_what_the_code_makes(tmp_path):
    page = tmp_path / 'README.md'
    page.write_text((ROOT / 'README.md').read_text())
    write_table(ROOT / 'results', page)
    assert page.read_text() == (ROOT / 'README.md').read_text(), 'run `timm-lm report --readme README.md`'


def test_table_has_sizes_and_errors():
    """MACs of lm_resnet20 are counted by hand in test_cli.py; lm_resnet50 has the layers of timm's resnetv2_50."""
    rows = {row.split('|')[1].strip(' `'): [cell.strip() for cell in row.split('|')[2:-1]]
            for row in network_table(ROOT / 'results')[2:]}
    assert rows['lm_resnet20'][:4] == ['3x32x32', '0.27 M', '41 M', '8.33 (`paper_c10`)']
    assert '7.37 (`best_c10`)' in rows['lm_resnet20'][4]
    plain = timm.create_model('resnetv2_50')
    parameters, macs = sum(p.numel() for p in plain.parameters()), count_macs(plain, (3, 224, 224))
    assert rows['lm_resnet50'][:3] == ['3x224x224', f'{parameters / 1e6:.2f} M', f'{macs / 1e6:,.0f} M']
    assert rows['preact_resnet20'][3] == '', 'the paper has a post-activation network of this depth'
    assert list(rows)[:3] == ['lm_resnet20', 'preact_resnet20', 'lm_resnet32']
    for name, cells in rows.items():
        assert {*re.findall(r'\(`(\w+)`\)', ' '.join(cells))} <= {*model_tags(name)}, name


@pytest.mark.parametrize('folder', sorted(path for path in (ROOT / 'weights').glob('*.*') if path.is_dir()),
                         ids=lambda folder: folder.name)
def test_shipped_cards_say_what_is_on_record(folder):
    card = (folder / 'README.md').read_text()
    rows = [row for path in (ROOT / 'results').glob('cifar*.csv') for row in read_rows(path)
            if row['model'] == folder.name and row['status'] == 'done']
    [row] = [row for row in rows if row['command'] in card.splitlines()]
    assert recorded_error(folder) == float(row['top1_err'])  # that of the table of networks
    assert f"{row['top1_err']} % ({row['errors']} of {row['images']} images)" in card
    assert (f"seed {row['seed']}, {row['minutes']} minutes in {row['precision']} on {row['hardware']}; "
            f"{row['versions']}.") in card
    assert f"it was {row['seen_top1_err']} %." in card
    assert (f"| {row['k_min']} to {row['k_max']} |" if row['k'] else '| top-1 error') in card
    model = timm.create_model(folder.name)
    assert f'| parameters | {sum(p.numel() for p in model.parameters()):,} |' in card
    k = ' '.join(f'{value.item():.3f}' for value in timm.create_model(folder.name, pretrained=True).k_values().values())
    assert k == row['k']


def test_default_weights_are_those_of_the_lowest_error():
    for name in our_models():
        default = timm.get_pretrained_cfg(name)
        tags = [tag for tag in model_tags(name) if timm.get_pretrained_cfg(f'{name}.{tag}').file
                and timm.get_pretrained_cfg(f'{name}.{tag}').num_classes == default.num_classes]
        errors = {tag: recorded_error(ROOT / 'weights' / f'{name}.{tag}') for tag in tags}
        assert not errors or min(errors, key=errors.get) == default.tag


def test_errors_are_in_the_order_of_their_size(monkeypatch):
    """Whichever was the default when the package was imported, as weights may have been added since."""
    errors = {'lm_resnet32.paper_c10': 7.5, 'lm_resnet32.best_c10': 7., 'lm_resnet32.grow_c10': 8.}
    monkeypatch.setattr(readme_table, 'recorded_error', lambda folder: errors.get(folder.name))
    [line] = [line for line in network_table(ROOT / 'results') if line.startswith('| `lm_resnet32`')]
    assert line.endswith('| 7.00 (`best_c10`), 7.50 (`paper_c10`), 8.00 (`grow_c10`) |')


def test_report_renews_the_table_between_its_marks(tmp_path, command, fails):
    start, end = re.findall('^<!-- .*-->$', (ROOT / 'README.md').read_text(), re.MULTILINE)
    page = tmp_path / 'README.md'
    page.write_text(f'before\n{start}\nold\n{end}\nafter\n')
    (tmp_path / 'results').mkdir()  # without runs, which the table does not read, and no picture shows
    for name in ('tables.yaml', 'remarks.md', 'published.csv'):
        shutil.copy(ROOT / 'results' / name, tmp_path / 'results')
    argv = ['report', '--results', tmp_path / 'results', '--page', tmp_path / 'docs' / 'results.md', '--readme']
    code, out, err = command(*argv, page)
    assert code == 0 and str(page) in out, err
    lines = page.read_text().splitlines()
    assert lines[:3] == ['before', start, ''] and lines[-3:] == ['', end, 'after'] and 'old' not in lines
    assert lines[3:-3] == network_table(ROOT / 'results')
    page.write_text('no marks')
    assert 'has no place for the table' in fails(*argv, page)
    assert 'cannot be read' in fails(*argv, tmp_path / 'nowhere.md')

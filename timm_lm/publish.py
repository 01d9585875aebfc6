"""Weights folders to the Hub and back: checked, published in one commit, and verified on the Hub."""
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import jinja2
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from . import __version__
from .card import CARD_TEMPLATE, recorded_error
from .errors import UserError, one_line, some
from .files import whole_entries, write_text
from .hub_client import AGAIN, LOG_IN, explained, set_up_client
from .models._weights import PUBLISHED_NAME, WEIGHTS_NAME, weights_dir
from .names import is_ours
from .weights_folder import CARD_NAME, CHECK_NAME, CONFIG_NAME, read_config, verify_folder

FILES = (WEIGHTS_NAME, CONFIG_NAME, CARD_NAME, CHECK_NAME)  # the only files that are published
LOADED = ('.json', '.safetensors', '.bin', '.pt', '.pth')  # what libraries look for in a repo
CARD_KEYS = ('library_name', 'license', 'tags', 'metrics')  # required in the front matter of a card
LOCAL_SOURCE = 'local-dir:FOLDER'  # the source of the network in a local card

_USE = re.compile(r'^## Use\n.*?(?=^## |\Z)', re.MULTILINE | re.DOTALL)


# What is uploaded


@dataclass(frozen=True)
class Upload:
    """A checked weights folder, and what is uploaded from it."""

    folder: Path
    repo_id: str
    files: Dict[str, Union[Path, bytes]]  # by path in the repo
    remarks: List[str]

    def describe(self) -> List[str]:
        """Lines with the files, their sizes in bytes, and remarks."""
        sizes = {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }
        return [f'{self.folder} -> {self.repo_id}', *(f'  {name:<30}{size:>12,} bytes' for name, size in sizes.items()),
                *(f'  {remark}' for remark in self.remarks)]


def prepare(folder: Union[str, Path], repo_id: str) -> Upload:
    """Check a weights folder and its card, and collect the files to publish.

    Args:
        folder: A weights folder. It is not changed.
        repo_id: ``OWNER/NAME`` of the repo.

    Raises:
        UserError: If the name is not that of a repo, or anything in the folder is missing or damaged.
    """
    _check_repo_id(repo_id)
    folder = Path(folder)
    verify_folder(folder)
    text, data = _read_card(folder)
    card = published_card(text, repo_id, is_ours(read_config(folder)['architecture']))
    files: Dict[str, Union[Path, bytes]] = {name: folder / name for name in FILES}
    files[CARD_NAME] = card.encode()
    remarks = []
    if not data.get('datasets'):
        remarks.append('the card names no data set of the Hub')
    if recorded_error(folder) is None:
        remarks.append('the card records no test error')
    others = sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if not path.is_dir())
    left_out = [name for name in others if name not in FILES]
    if left_out:
        remarks.append(f'left out, not part of a weights folder: {some(left_out)}')
    return Upload(folder, repo_id, files, remarks)


def prepare_tree(tree: Optional[Path], owner: str) -> List[Upload]:
    """Check all weights folders in a folder, by default the shipped ones; each repo is named after its folder.

    Raises:
        UserError: If there are none, or one of them is incomplete or damaged.
    """
    tree = weights_dir() if tree is None else Path(tree)
    folders = [path for path in whole_entries(tree) if any((path / name).is_file() for name in FILES)]
    if not folders:
        raise UserError(f'There are no weights folders in {tree}; give a folder that holds some.')
    return [prepare(folder, f'{owner}/{folder.name}') for folder in folders]


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        if repo_id.count('/') != 1:
            raise HFValidationError('it needs an owner and a name')
    except HFValidationError as e:
        raise UserError(f"'{repo_id}' cannot name a repo ({one_line(e)}); give OWNER/NAME.") from e


def _read_card(folder: Path) -> Tuple[str, Dict[str, Any]]:
    """The text of a card, and what its front matter holds."""
    path = folder / CARD_NAME
    try:
        text = path.read_text(encoding='utf-8-sig')
        data = ModelCard(text).data.to_dict()
    except FileNotFoundError:
        raise UserError(f'{folder} has no {CARD_NAME}; weights are published with their card, restore it.') from None
    except Exception as e:
        raise UserError(f'The front matter of {path} is not readable ({one_line(e)}); fix it.') from e
    missing = [key for key in CARD_KEYS if not data.get(key)]
    if missing:
        raise UserError(f"The front matter of {path} lacks {', '.join(missing)}; add that.")
    if data['library_name'] != 'timm':
        raise UserError(f"The front matter of {path} has library_name '{data['library_name']}'; it must be timm.")
    return text, data


def published_card(text: str, repo_id: str, ours: bool = True) -> str:
    """The card of a folder as that of a repo: its ``Use`` section is rendered from the template for the repo's name.

    A ``Use`` section that is neither that of a local folder nor, word for word, that of another repo is the author's
    own and is kept.

    Args:
        text: The card.
        repo_id: ``OWNER/NAME`` of the repo.
        ours: Whether the network is one of this package's.
    """
    template = _USE.search(CARD_TEMPLATE.read_text(encoding='utf-8'))
    assert template is not None
    render = jinja2.Template(template.group(), keep_trailing_newline=True).render

    def renewed(match: 're.Match[str]') -> str:
        found = match.group()
        other = re.search(r'hf-hub:[\w.-]+/[\w.-]+', found)
        is_made = LOCAL_SOURCE in found or other and found.strip() == render(source=other.group(), ours=ours).strip()
        return render(source=f'hf-hub:{repo_id}', ours=ours) if is_made else found

    return _USE.sub(renewed, text, count=1)


# Publishing


def push(
        uploads: Sequence[Upload],
        private: bool = False,
        revision: Optional[str] = None,
        create_pr: bool = False,
) -> Iterator[str]:
    """Publish checked folders, each in one commit. Identical files are not uploaded again.

    Shipped weights that become public are recorded in their ``published.json``.

    Args:
        uploads: From ``prepare``.
        private: Create new repos as private ones.
        revision: Branch to commit to, created if it does not exist; main if None.
        create_pr: Open a pull request for each commit.

    Yields:
        A line for each folder, and one with the record if something was recorded.

    Raises:
        UserError: If the Hub cannot be reached or refuses a request, or if what was published cannot be recorded.
    """
    set_up_client()
    with explained(uploads[0].repo_id):
        token = get_token()
    owner = uploads[0].repo_id.partition('/')[0]
    if not token:
        raise UserError(f'There is no Hub token; set HF_TOKEN to one with write access to {owner}, or '
                        f'{LOG_IN}.')
    if not re.fullmatch('[!-~]+', token):
        raise UserError('The Hub token holds characters that no token has; set HF_TOKEN to it again.')
    api = HfApi(token=token, library_name='timm-lm', library_version=__version__)
    with explained(uploads[0].repo_id):
        api.whoami()
    records = {}
    for upload in uploads:
        line, sha = _push(api, upload, private, revision, create_pr)
        yield line
        if sha and upload.folder.resolve().parent == weights_dir().resolve():
            records[upload.folder.resolve().name] = dict(repo_id=upload.repo_id, revision=sha)
    if records:
        yield f'recorded in {_record(records)}'


def _push(
        api: HfApi,
        upload: Upload,
        private: bool,
        revision: Optional[str],
        create_pr: bool,
) -> Tuple[str, Optional[str]]:
    """Publish a folder; returns a line, and the commit if everyone can load it."""
    repo_id = upload.repo_id
    with explained(repo_id):
        if not create_pr:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
        there = api.model_info(repo_id)
        if private and not there.private:
            raise UserError(f'{repo_id} exists and is public; make it private in its settings, or push without '
                            '--private.')
        if revision and not create_pr and not api.revision_exists(repo_id, revision):
            api.create_branch(repo_id, branch=revision)
        there = api.model_info(repo_id, revision=revision)
        commit = api.create_commit(  # of what changed; without changes it returns the one that is there
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in upload.files.items()],
            commit_message=f'Upload {upload.folder.resolve().name} with timm-lm {__version__}',
            revision=revision,
            create_pr=create_pr)
    if commit.oid == there.sha:
        line = f'{repo_id}: nothing to do, commit {there.sha} is identical'
    else:
        line = f'{repo_id}: {commit.pr_url or commit.commit_url}'
    names = {file.rfilename for file in there.siblings or []}
    foreign = sorted(name for name in names if name not in FILES and name.endswith(LOADED))
    if foreign:
        line += f'; also there, delete what is of another model: {some(foreign)}'
    is_open = not there.private and not there.gated
    is_proposed = create_pr or (revision or '').startswith('refs/pr/')
    return line, commit.oid if is_open and not is_proposed else None


def _record(records: Dict[str, Dict[str, str]]) -> Path:
    """Record the publication of shipped weights, by name; returns the file."""
    path = weights_dir() / PUBLISHED_NAME
    try:
        published = json.loads(path.read_text()) if path.is_file() else {}
        if published | records != published:
            write_text(path, json.dumps(dict(sorted((published | records).items())), indent=2) + '\n')
    except (OSError, ValueError, TypeError) as e:  # the last if it is no table
        raise UserError(f'The weights are published, but {path} cannot be written ({one_line(e)}); fix that and '
                        f'{AGAIN}.') from e
    return path


# Verifying


def verify_repo(source: str) -> Dict[str, float]:
    """Download the files of a Hub repo, and check them like a weights folder.

    Args:
        source: ``hf-hub:OWNER/NAME``, or ``hf-hub:OWNER/NAME@REVISION``.

    Returns:
        As ``timm_lm.weights_folder.verify_folder``.

    Raises:
        UserError: If the Hub cannot be reached, anything is missing or damaged, or the outputs differ.
    """
    repo_id, _, revision = source.removeprefix('hf-hub:').partition('@')
    _check_repo_id(repo_id)
    set_up_client()
    api = HfApi(library_name='timm-lm', library_version=__version__)
    with tempfile.TemporaryDirectory(prefix='timm-lm-') as folder:
        with explained(repo_id, again='run the same command again'):
            info = api.model_info(repo_id, revision=revision or None)
            for name in sorted({file.rfilename for file in info.siblings or []} & {*FILES}):
                # not from the cache: the files to check are those on the Hub
                api.hf_hub_download(repo_id, name, revision=info.sha, local_dir=folder, force_download=True)
        try:
            return verify_folder(folder)
        except UserError as e:
            raise UserError(str(e).replace(folder, source)) from e

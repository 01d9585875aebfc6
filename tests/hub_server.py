"""A small Hub on loopback: enough of the API to download and to publish, with tokens, and with faults on demand.

Files live in memory. A commit is made whole or not at all, and only if the large files that it names were uploaded.
"""
import base64
import hashlib
import json
import re
import socket
import struct
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Dict, List, Optional, Set
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

DATASET_TYPE = re.compile(r'(?:[\w-]+/)?[\w.-]+', re.ASCII)  # what the Hub accepts in the model-index of a card
LARGE = ('.safetensors', '.bin', '.parquet')  # what the Hub's .gitattributes keep in LFS


def blob_id(data):
    """Git's name of a file."""
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: Dict[str, Dict[str, bytes]] = field(default_factory=dict)  # files by path by commit, in order
    refs: Dict[str, str] = field(default_factory=dict)  # branches and pull requests

    def commit(self, files, ref='main'):
        sha = hashlib.sha1(f'{len(self.commits)} {sorted(files)}'.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def find(self, revision):
        """The commit of a branch or a commit, None if there is none."""
        return self.refs.get(revision, revision if revision in self.commits else None)

    def files(self, revision='main'):
        return self.commits[self.find(revision)]


@dataclass
class Fault:
    route: str  # regular expression on 'METHOD /path'
    kind: str  # 'status', 'cut' or 'stall'
    status: int
    times: int
    page: Optional[bytes] = None  # what is sent with the status, else the Hub's JSON
    code: Optional[str] = None  # the Hub's name of the error


class Hub:
    """The state of the server, and what a test does with it."""

    def __init__(self):
        self.repos: Dict[str, Repo] = {}  # by 'OWNER/NAME' or 'datasets/OWNER/NAME'
        self.tokens: Dict[str, Set[str]] = {}  # owners that a token may write to
        self.large: Dict[str, bytes] = {}  # uploaded large files by SHA-256
        self.faults: List[Fault] = []
        self.log: List[str] = []  # 'METHOD /path' of all requests
        self.lock = threading.Lock()
        self.port = 0
        self.quiet = threading.Event()
        self._server: Optional[ThreadingHTTPServer] = None

    @property
    def endpoint(self):
        return f'http://127.0.0.1:{self.port}'

    def start(self):
        """Listen, on the same port as before if there was one."""
        self.quiet.clear()
        self._server = ThreadingHTTPServer(('127.0.0.1', self.port), type('Handler', (_Handler,), {'hub': self}))
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()

    def stop(self):
        self.quiet.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, name, folder):
        """Add a repo with the files of a folder."""
        repo = self.repos[name] = Repo()
        folder = Path(folder)
        repo.commit({p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()})
        return repo

    def fail(self, route, status=500, times=1, page=None, code=None):
        """Answer the next requests of a route with a status."""
        self.faults.append(Fault(route, 'status', status, times, page, code))

    def cut(self, route, times=1):
        """Cut the connection in the middle of the body of the next requests of a route."""
        self.faults.append(Fault(route, 'cut', 0, times))

    def stall(self, route, times=1):
        """Say nothing to the next requests of a route, so long that only a client without a limit still waits.

        It gets its answer after all if it only reads, so that a test of the limit ends.
        """
        self.faults.append(Fault(route, 'stall', 0, times))

    def take_fault(self, request):
        with self.lock:
            self.log.append(request)
            for fault in self.faults:
                if fault.times and re.search(fault.route, request):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args):
        pass

    def _handle(self):
        url = urlsplit(self.path)
        self.body = None
        self.query = parse_qs(url.query)
        fault = self.hub.take_fault(f'{self.command} {url.path}')
        if fault and fault.kind == 'cut':
            return self._cut()
        if fault and fault.kind == 'stall':
            self.hub.quiet.wait(5)
            if self.command != 'GET':
                return self._cut()
            fault = None
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if fault and fault.page:
            return self._send(fault.status, fault.page, {'Content-Type': 'text/html'})
        if fault:
            return self._error(fault.status, 'the server was told to fail', code=fault.code)
        if self.headers.get('Transfer-Encoding'):
            return self._error(411, 'a length is needed')
        with suppress(ConnectionError):  # the client may be gone
            self._route([unquote(part) for part in url.path.strip('/').split('/')])

    do_HEAD = do_GET = do_POST = do_PUT = _handle

    def _route(self, parts):
        if parts[0] == 'lfs':
            return self._large_file(*parts[1:])
        if self._token() and self._token() not in self.hub.tokens:
            return self._error(401, 'Invalid username or password.', 'Invalid credentials in Authorization header')
        if parts == ['api', 'whoami-v2']:
            return self._json(dict(name='tester', type='user')) if self._token() else self._error(401, 'Log in')
        if parts == ['api', 'repos', 'create']:
            return self._create()
        if parts == ['api', 'validate-yaml']:
            return self._validate_card()
        if parts[0] == 'api':
            name = '/'.join(parts[2:4] if parts[1] == 'models' else parts[1:4])
            rest = parts[4:]
        elif parts[-4:] == ['info', 'lfs', 'objects', 'batch']:
            name, rest = '/'.join(parts[:-4]).removesuffix('.git'), ['batch']
        else:
            at = parts.index('resolve') if 'resolve' in parts else len(parts)
            name, rest = '/'.join(parts[:at]), parts[at:]
        repo = self.hub.repos.get(name)
        if repo is None or repo.private and not self._may_write(name):
            return self._error(404 if self._token() else 401, 'Repository not found', code='RepoNotFound')
        route, *rest = rest or ['revision', 'main']
        revision, *path = rest or ['main']
        writes = {'preupload': self._preupload, 'commit': self._commit, 'batch': self._batch, 'branch': self._branch}
        if route in writes:
            # anybody may open a pull request
            if not self._may_write(name) and not (self._token() and ('create_pr' in self.query or route == 'batch')):
                return self._error(403, f'You have no write access to {name}')
            return writes[route](name, repo, revision)
        if repo.find(revision) is None:
            return self._error(404, 'Revision not found', code='RevisionNotFound')
        reads = {'revision': self._info, 'tree': self._tree, 'paths-info': self._paths_info, 'resolve': self._resolve}
        if route not in reads:
            return self._error(404, f'no route {route}')
        return reads[route](name, repo, repo.find(revision), '/'.join(path))

    # Reading

    def _info(self, name, repo, sha, path):
        files = repo.commits[sha]
        self._json(dict(id=name.removeprefix('datasets/'), sha=sha, private=repo.private, tags=[], downloads=0, likes=0,
                        gated='auto' if repo.gated else False, xetEnabled=False,
                        siblings=[dict(rfilename=name) for name in sorted(files)]))

    def _tree(self, name, repo, sha, path):
        self._json([_file_info(path, data) for path, data in sorted(repo.commits[sha].items())])

    def _paths_info(self, name, repo, sha, path):
        asked = parse_qs(self.body.decode())['paths']
        self._json([_file_info(path, data) for path, data in repo.commits[sha].items() if path in asked])

    def _resolve(self, name, repo, sha, path):
        data = repo.commits[sha].get(path)
        if data is None:
            return self._error(404, 'Entry not found', code='EntryNotFound')
        etag = sha256(data) if path.endswith(LARGE) else blob_id(data)
        self._send(200, data, {'ETag': f'"{etag}"', 'X-Repo-Commit': sha})

    # Writing

    def _validate_card(self):
        data = yaml.safe_load(json.loads(self.body)['content'].split('---\n')[1])
        types = [result['dataset']['type'] for model in data.get('model-index', ()) for result in model['results']]
        wrong = [f'"dataset.type" with value "{name}" fails to match the required pattern' for name in types
                 if not DATASET_TYPE.fullmatch(name)]
        answer = json.dumps(dict(errors=[dict(message=message) for message in wrong], warnings=[])).encode()
        self._send(400 if wrong else 200, answer, {'Content-Type': 'application/json'})

    def _create(self):
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self._may_write(name):
            return self._error(403, f"You don't have the rights to create a model under {asked['organization']}")
        url = f'{self.hub.endpoint}/{name}'
        with self.hub.lock:
            if name in self.hub.repos:
                return self._error(409, 'You already created this model repo', url=url)
            repo = self.hub.repos[name] = Repo(bool(asked.get('private')) or asked.get('visibility') == 'private')
            repo.commit({'.gitattributes': ''.join(f'*{name} filter=lfs\n' for name in LARGE).encode()})
        self._json(dict(url=url))

    def _branch(self, name, repo, branch):
        if branch in repo.refs:
            return self._error(409, 'the branch exists')
        repo.refs[branch] = repo.refs['main']
        self._json({})

    def _preupload(self, name, repo, revision):
        if repo.find(revision) is None:
            return self._error(404, 'Revision not found', code='RevisionNotFound')
        there = repo.files(revision)
        answers = []
        for file in json.loads(self.body)['files']:
            path, data = file['path'], there.get(file['path'])
            large = path.endswith(LARGE)
            oid = None if data is None else sha256(data) if large else blob_id(data)
            answers.append(dict(path=path, uploadMode='lfs' if large else 'regular', shouldIgnore=False, oid=oid))
        self._json(dict(files=answers))

    def _batch(self, name, repo, revision):
        objects = []
        for file in json.loads(self.body)['objects']:
            answer = dict(oid=file['oid'], size=file['size'])
            if file['oid'] not in self.hub.large:
                url = f"{self.hub.endpoint}/lfs/{file['oid']}"
                answer['actions'] = dict(upload=dict(href=url), verify=dict(href=f'{url}/verify'))
            objects.append(answer)
        self._json(dict(transfer='basic', objects=objects))

    def _large_file(self, oid, verify=None):
        if verify:
            asked = json.loads(self.body)
            there = len(self.hub.large.get(asked['oid'], b''))
            return self._json({}) if there == asked['size'] else self._error(422, 'not there')
        if sha256(self.body) != oid:
            return self._error(400, 'the digest differs')
        self.hub.large[oid] = self.body
        self._send(200, b'')

    def _commit(self, name, repo, revision):
        if repo.find(revision) is None:
            return self._error(404, 'Revision not found', code='RevisionNotFound')
        lines = [json.loads(line) for line in self.body.splitlines()]
        new: Dict[str, bytes] = {}
        for line in lines[1:]:
            value = line['value']
            if line['key'] == 'lfsFile':
                if value['oid'] not in self.hub.large:
                    return self._error(400, f"{value['path']} was not uploaded")
                new[value['path']] = self.hub.large[value['oid']]
            elif line['key'] == 'file':
                new[value['path']] = base64.b64decode(value['content'])
            else:
                return self._error(400, f"no operation {line['key']}")
        with self.hub.lock:
            numbers = sum(ref.startswith('refs/pr/') for ref in repo.refs) + 1
            ref = f'refs/pr/{numbers}' if 'create_pr' in self.query else revision
            sha = repo.commit({**repo.files(revision), **new}, ref)
        url = f'{self.hub.endpoint}/{name}'
        self._json(dict(success=True, commitOid=sha, commitUrl=f'{url}/commit/{sha}',
                        pullRequestUrl=f'{url}/discussions/{numbers}'))

    # Answering

    def _token(self):
        return self.headers.get('Authorization', '').removeprefix('Bearer ')

    def _may_write(self, name):
        return name.split('/')[-2] in self.hub.tokens.get(self._token(), ())

    def _json(self, content):
        self._send(200, json.dumps(content).encode(), {'Content-Type': 'application/json'})

    def _error(self, status, message, header=None, code=None, **content):
        headers = {'Content-Type': 'application/json', 'X-Error-Message': header or message}
        if code:
            headers['X-Error-Code'] = code
        self._send(status, json.dumps(dict(content, error=message)).encode(), headers)

    def _send(self, status, data, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def _cut(self):
        if self.body is None:
            self.rfile.read(int(self.headers.get('Content-Length') or 0) // 2)
        self.close_connection = True
        # a reset, not an orderly end
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.connection.close()


def _file_info(path, data) -> Dict[str, object]:
    info: Dict[str, object] = dict(type='file', path=path, size=len(data), oid=blob_id(data))
    if path.endswith(LARGE):
        info['lfs'] = dict(oid=sha256(data), size=len(data), pointerSize=130)
    return info


@contextmanager
def running(hub: Hub):
    """Have a Hub listen while the block runs."""
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()

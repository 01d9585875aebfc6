"""A small server on loopback that speaks enough of the Hub's API to download from: repo information and files."""
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Dict
from urllib.parse import unquote, urlsplit

COMMIT = '0123456789abcdef0123456789abcdef01234567'


class _Handler(BaseHTTPRequestHandler):
    repos: Dict[str, Path] = {}  # 'datasets/OWNER/NAME' or 'OWNER/NAME' -> folder

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        path = unquote(urlsplit(self.path).path).strip('/')
        if path.startswith('api/'):
            return self._repo_info(path.removeprefix('api/').removeprefix('models/'))
        repo, separator, rest = path.partition('/resolve/')
        if not separator or repo not in self.repos:
            return self._send(404, b'{}', {'X-Error-Code': 'RepoNotFound'})
        file = self.repos[repo] / rest.partition('/')[2]
        if not file.is_file():
            return self._send(404, b'', {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': COMMIT})
        data = file.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        self._send(200, data, {'ETag': f'"{etag}"', 'X-Repo-Commit': COMMIT}, body)

    def _repo_info(self, path):
        repo = path.partition('/revision/')[0].partition('/tree/')[0]
        if repo not in self.repos:
            return self._send(404, b'{}', {'X-Error-Code': 'RepoNotFound'})
        folder = self.repos[repo]
        names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob('*')) if file.is_file()]
        info: object = [dict(type='file', path=name, size=(folder / name).stat().st_size, oid=name) for name in names]
        if '/tree/' not in path:
            info = dict(id=repo.removeprefix('datasets/'), sha=COMMIT, private=False, tags=[], downloads=0, likes=0,
                        siblings=[dict(rfilename=name) for name in names])
        self._send(200, json.dumps(info).encode(), {'Content-Type': 'application/json'})

    def _send(self, status, data, headers, body=True):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        if body and self.command == 'GET':
            self.wfile.write(data)


@contextmanager
def hub_server(repos):
    """Serve folders as repos.

    Args:
        repos: Folder by 'OWNER/NAME' (models) or 'datasets/OWNER/NAME'.

    Yields:
        The endpoint, for HF_ENDPOINT.
    """
    handler = type('Handler', (_Handler,), {'repos': {name: Path(folder) for name, folder in repos.items()}})
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_address[1]}'
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

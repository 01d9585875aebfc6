"""The Hub client: how long it waits, where it shows progress, and how its errors are explained."""
import importlib
import sys
from contextlib import contextmanager
from typing import Any, Iterator

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import disable_progress_bars

from .errors import UserError, one_line

SILENCE = 60  # seconds without a byte before a connection is dropped
LOG_IN = 'log in with `hf auth login` (`huggingface-cli login` before huggingface_hub 0.34)'
AGAIN = 'run the same command again, what is already there is left alone'


def set_up_client() -> None:
    """Make huggingface_hub give up on a server that does not respond, and show its progress on a terminal only.

    By default it waits forever. A client that the user set up, such as one for a proxy, is kept.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    modern = hasattr(huggingface_hub, 'set_client_factory')
    try:
        http = importlib.import_module('huggingface_hub.utils._http')
        make: Any = getattr(http, 'default_client_factory' if modern else '_default_backend_factory')
        now = getattr(http, '_GLOBAL_CLIENT_FACTORY' if modern else '_GLOBAL_BACKEND_FACTORY')
    except (AttributeError, ImportError):  # they are not public
        return
    if now is not make:
        return

    def factory() -> Any:
        client = make()
        request = client.request
        client.timeout = SILENCE
        client.request = lambda *args, timeout=None, **kwargs: request(*args, timeout=timeout or SILENCE, **kwargs)
        return client

    if modern:
        huggingface_hub.set_client_factory(factory)
    else:
        getattr(huggingface_hub, 'configure_http_backend')(factory)  # noqa: B009


@contextmanager
def explained(repo_id: str, again: str = AGAIN) -> Iterator[None]:
    """Turn the errors of requests to the Hub into one line.

    Args:
        repo_id: ``OWNER/NAME`` of the requested repo.
        again: What to do once the cause is fixed.

    Raises:
        UserError: If the block fails.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(_explain(e, repo_id, again)) from e


def _explain(error: BaseException, repo_id: str, again: str) -> str:
    """One line that says why a request to the Hub failed and what to do."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    endpoint = huggingface_hub.constants.ENDPOINT
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return f'{endpoint} was not contacted, because HF_HUB_OFFLINE is set; unset it, and {again}.'
    answered = next((e for e in chain if getattr(e, 'response', None) is not None), None)
    if answered is None:
        reason = next((e for e in reversed(chain) if isinstance(e, OSError)), error)
        return f'The request to {endpoint} failed ({one_line(reason)}); fix that (often the network), and {again}.'
    status = getattr(answered, 'response').status_code  # noqa: B009
    # huggingface_hub may raise an error of its own, with its guess of the cause, from that with the server's words
    message = one_line(next(filter(None, (getattr(e, 'server_message', None) for e in chain)), answered))
    if isinstance(answered, GatedRepoError):
        return f'{endpoint} gives access to {repo_id} on request only; ask for it on its page, and {again}.'
    if isinstance(answered, RepositoryNotFoundError):
        return (f'There is no {repo_id} on {endpoint}, or it is private and no token gives access; check the name, or '
                f'{LOG_IN}.')
    if isinstance(answered, RevisionNotFoundError):
        return f'There is no such revision of {repo_id} on {endpoint}; check its name.'
    if status == 401:
        return f'{endpoint} does not accept the token (401); set HF_TOKEN to another one, or {LOG_IN}, and {again}.'
    if status == 403:
        return (f'{endpoint} does not give the token access to {repo_id} (403: {message}); use one that has the right, '
                f'or another name, and {again}.')
    if status == 429 or status >= 500:
        return f'{endpoint} is not working as it should ({status}: {message}); wait a while, and {again}.'
    return f'{endpoint} refused {repo_id} ({status}: {message}); fix that, and {again}.'

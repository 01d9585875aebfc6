"""The Hub client: how long it waits, which errors it may raise, and how they are explained."""
import errno
import importlib
import sys
from contextlib import contextmanager
from typing import Any, Iterator, Tuple, Type

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

from .errors import UserError, one_line

SILENCE = 60  # seconds without a byte before a connection is dropped
# What a download or an upload may raise. Whichever package makes the requests (requests up to huggingface_hub 0.x), its
# errors and the Hub's own have the same base. XetError was removed in huggingface_hub 1.19; OIDCError is in 2.x.
HUB_ERRORS: Tuple[Type[BaseException], ...] = (
    OSError, RuntimeError, ValueError, *HfHubHTTPError.__bases__, getattr(errors, 'XetError', OSError),
    getattr(errors, 'OIDCError', OSError))
LOG_IN = 'log in with `hf auth login` (`huggingface-cli login` before huggingface_hub 0.34)'
AGAIN = 'run the same command again, what is already there is left alone'


def draw_no_bars_into_files() -> None:
    """Make huggingface_hub show its progress on a terminal only."""
    if not sys.stderr.isatty():
        disable_progress_bars()


def set_up_client() -> None:
    """Make huggingface_hub give up on a server that does not respond; by default it waits forever.

    A client that the user set up, such as one for a proxy, is kept.
    """
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
def explained(repo_id: str, again: str = AGAIN, writes: bool = True) -> Iterator[None]:
    """Turn the errors of requests to the Hub into one line.

    Args:
        repo_id: ``OWNER/NAME`` of the requested repo.
        again: What to do once the cause is fixed.
        writes: Whether the repo is written to, and not only read.

    Raises:
        UserError: If the block fails with one of ``HUB_ERRORS``.
    """
    try:
        yield
    except UserError:
        raise
    except HUB_ERRORS as e:
        raise UserError(_explain(e, repo_id, again, writes)) from e


def _explain(error: BaseException, repo_id: str, again: str, writes: bool) -> str:
    """One line that says why a request to the Hub failed and what to do."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    endpoint, owner = huggingface_hub.constants.ENDPOINT, repo_id.partition('/')[0]
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return f'{endpoint} was not contacted, because HF_HUB_OFFLINE is set; unset it, and {again}.'
    answered = next((e for e in chain if getattr(e, 'response', None) is not None), None)
    access = f'write access to {owner}' if writes else f'read access to {repo_id}'
    no_access = (f'{endpoint} does not accept the token (401); set HF_TOKEN to one with {access}, or {LOG_IN}, and '
                 f'{again}.')
    if any(type(e).__name__ == 'XetAuthenticationError' for e in chain):  # from hf_xet, without a response
        return no_access
    if type(error).__name__ == 'OIDCError':
        return f'HF_OIDC_RESOURCE is set, but gives no token ({one_line(error)}); fix that or unset it, and {again}.'
    if answered is None:
        failures = [e for e in chain if isinstance(e, (OSError, *HfHubHTTPError.__bases__))]
        if not failures:
            return f'{endpoint} did not answer like a Hub ({one_line(error)}); check the network, and {again}.'
        deepest = next((e for e in reversed(failures) if isinstance(e, OSError)), failures[-1])
        if getattr(deepest, 'errno', None) == errno.ENOSPC:
            return f'The disk is full ({one_line(deepest)}); free some space, and {again}.'
        return f'The connection to {endpoint} failed ({one_line(deepest)}); check the network, and {again}.'
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
        return no_access
    if status == 403:
        right = f'write to {repo_id}' if writes else f'read {repo_id}'
        return (f'{endpoint} does not let the token {right} (403: {message}); if the token lacks that right, use one '
                f'that has it, or another name, and {again}.')
    if status == 429 or status >= 500:
        return f'{endpoint} is not working as it should ({status}: {message}); wait a while, and {again}.'
    return f'{endpoint} refused {repo_id} ({status}: {message}); fix that, and {again}.'

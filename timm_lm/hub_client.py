"""The client of the Hub: what it may raise, and how long it waits."""
import importlib
import sys
from typing import Any, Tuple, Type

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import disable_progress_bars

SILENCE = 60  # seconds without a byte after which a connection is given up
# What a download or an upload may raise. Whichever package makes the requests (requests up to huggingface_hub 0.x), the
# base of what it raises is the base of the Hub's own error too. XetError is gone since huggingface_hub 1.19.
HUB_ERRORS: Tuple[Type[BaseException], ...] = (
    OSError, RuntimeError, ValueError, *errors.HfHubHTTPError.__bases__, getattr(errors, 'XetError', OSError))


def draw_no_bars_into_files() -> None:
    """Have huggingface_hub show its progress on a terminal only."""
    if not sys.stderr.isatty():
        disable_progress_bars()


def set_up_client() -> None:
    """Have huggingface_hub give up on a server that says nothing; by itself it waits for ever.

    A client that the user set up, such as one for a proxy, stays.
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

"""Google credentials as an API key that renews itself, for Gemini and Vertex AI endpoints."""

from __future__ import annotations

import asyncio
import importlib
from typing import Protocol, runtime_checkable

from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import TokenError

_SCOPE = "https://www.googleapis.com/auth/cloud-platform"


@runtime_checkable
class _Credentials(Protocol):
    """What is used of google.auth's credentials."""

    @property
    def valid(self) -> bool: ...

    @property
    def token(self) -> str: ...

    def refresh(self, request: object) -> None: ...


class GoogleToken:
    """Application default credentials; calling it gives a valid access token.

    the key is asked for before each request; a token is fetched only when the old one is
    about to expire, in a thread, and once for all requests that wait for it.
    """

    def __init__(self) -> None:
        """Loads the libraries; credentials are found on first use.

        Raises:
            ValueError: google-auth (with requests) is not installed.
        """
        try:
            self._auth = importlib.import_module("google.auth")
            transport = importlib.import_module("google.auth.transport.requests")
        except ImportError as error:
            raise ValueError(
                f"judge.auth=google needs google-auth and requests ({error}): "
                "pip install 'speciarl-jax[gcp]'"
            ) from error
        self._new_request = transport.Request
        self._credentials: _Credentials | None = None
        self._lock = asyncio.Lock()

    async def __call__(self) -> str:
        """A token that is valid now.

        Raises:
            JudgeError: there are no credentials, or they were refused.
            TokenError: the token server is out or busy just now.
        """
        if self._credentials is None or not self._credentials.valid:
            async with self._lock:
                if self._credentials is None or not self._credentials.valid:
                    self._credentials = await asyncio.to_thread(self._refresh)
        return str(self._credentials.token)

    def _refresh(self) -> _Credentials:
        """Fetches a token; runs in a thread."""
        exceptions = self._auth.exceptions
        try:
            credentials: _Credentials | None = self._credentials
            if credentials is None:
                credentials, _ = self._auth.default(scopes=[_SCOPE])
                self._credentials = credentials  # found once, even if the token fails just now
            credentials.refresh(self._new_request())
        except exceptions.GoogleAuthError as error:
            if error.retryable or isinstance(error, exceptions.TransportError):
                raise TokenError(f"judge.auth=google: no token just now: {error}") from error
            raise JudgeError(
                f"judge.auth=google: {error}; run `gcloud auth application-default login` or set "
                "GOOGLE_APPLICATION_CREDENTIALS"
            ) from error
        return credentials

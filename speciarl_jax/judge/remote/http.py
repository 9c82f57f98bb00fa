"""HTTP as a judge needs it: no redirects, no compression, no more bytes than a reply may have.

A server that answers more than it was asked is believed nothing: the second of two responses on a
kept-alive connection would be read as the reply to the next request, another pair's label. So a
connection is used again only if not one byte waits on it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import select
import ssl
import urllib.parse
import urllib.request
import weakref
from collections.abc import Mapping

import aiohttp
import certifi
import yarl

_LOG = logging.getLogger(__name__)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
Proxy = tuple[str | None, aiohttp.BasicAuth | None]


@dataclasses.dataclass(frozen=True)
class HttpReply:
    """A whole response.

    Attributes:
        headers: names in any case.
        body: the bytes as sent.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


class UnaskedBytesError(aiohttp.ClientConnectionError):
    """A new connection held bytes before anything was asked on it."""


class _StaleError(aiohttp.ClientConnectionError):
    """A connection that was used before is not fit for another request."""


class BadReplyError(aiohttp.ClientPayloadError):
    """A response that is too large, or compressed though that was not allowed."""


class _Connections:
    """What is known of connections: which were used, and which may not be used again."""

    def __init__(self) -> None:
        self.used: weakref.WeakSet[asyncio.BaseProtocol] = weakref.WeakSet()
        self.retired: weakref.WeakSet[asyncio.BaseProtocol] = weakref.WeakSet()
        self.suspects: set[yarl.URL] = set()  # origins whose connections serve one request each

    def suspect(self, origin: yarl.URL) -> None:
        """A server sent a response that nobody asked for."""
        if origin not in self.suspects:
            self.suspects.add(origin)
            _LOG.warning(
                "judge %s: sent a response that was not asked for; its connections are not used "
                "again, see what stands between here and the judge",
                origin,
            )
        self.retired |= self.used


class _CleanRequest(aiohttp.ClientRequest):
    """A request that goes out only on a connection on which nothing waits to be read."""

    known: _Connections

    async def send(self, conn: aiohttp.connector.Connection) -> aiohttp.ClientResponse:
        """Sends the request.

        Raises:
            UnaskedBytesError, _StaleError: something waits on the connection, or it is retired; it
                is closed.
        """
        known, protocol, origin = self.known, conn.protocol, self.url.origin()
        is_spoilt = protocol is None or protocol.should_close or _is_readable(conn)
        if protocol is None or is_spoilt or protocol in known.retired:
            if protocol is not None and protocol.should_close:
                known.suspect(origin)
            was_used = protocol in known.used
            conn.close()
            raise (_StaleError if was_used else UnaskedBytesError)(f"unasked bytes from {origin}")
        known.used.add(protocol)
        if origin in known.suspects:
            protocol.force_close()
        return await super().send(conn)


def _is_readable(conn: aiohttp.connector.Connection) -> bool:
    """True if bytes or the end of a plain connection wait in the kernel, not read yet."""
    transport = conn.transport
    # Over TLS session tickets may wait, which are no response.
    if transport is None or transport.get_extra_info("ssl_object") is not None:
        return False
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
    return bool(poll.poll(0))


class Http:
    """One pool of connections; opens on first use, inside the running event loop."""

    def __init__(self, is_tls: bool = False) -> None:
        """Opens nothing yet; with `is_tls` certificates are read, the system's and certifi's."""
        context: ssl.SSLContext | bool = True
        if is_tls:
            context = ssl.create_default_context()
            context.load_verify_locations(certifi.where())
        self._known = _Connections()
        self._proxies: dict[str, Proxy] = {}
        request_class = type("_Request", (_CleanRequest,), {"known": self._known})
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=context),
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            request_class=request_class,
            auto_decompress=False,
            # Not trust_env, which would look into .netrc at each request.
        )

    def distrust(self, url: str) -> None:
        """Uses each further connection to the server of `url` for one request only."""
        self._known.suspect(yarl.URL(url).origin())

    def retire(self) -> None:
        """Uses no connection again that was used before: replies may be one behind on it."""
        self._known.retired |= self._known.used

    async def exchange(
        self, url: str, headers: Mapping[str, str], max_bytes: int, body: bytes | None = None
    ) -> HttpReply:
        """Asks once: POST of a JSON `body`, GET without one. Redirects come back as they are.

        Args:
            headers: names and values, the key among them.
            max_bytes: longest response body.

        Raises:
            BadReplyError: a longer body, or a compressed one.
            aiohttp.ClientError: the connection cannot be made, or breaks.
        """
        headers = {**headers, "Accept-Encoding": "identity", "Content-Type": "application/json"}
        if url not in self._proxies:
            self._proxies[url] = find_proxy(url)
        proxy, proxy_auth = self._proxies[url]
        while True:
            try:
                async with self._session.request(
                    "GET" if body is None else "POST", url, data=body, headers=headers,
                    allow_redirects=False, proxy=proxy, proxy_auth=proxy_auth,
                ) as response:  # fmt: skip
                    return HttpReply(
                        response.status, response.headers, await _read(response, max_bytes)
                    )
            except _StaleError:
                continue  # it is closed; there are as many as were used, and then a new one

    async def close(self) -> None:
        """Ends the connections."""
        await self._session.close()


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The body, never more than `max_bytes` of it in memory."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        response.close()
        raise BadReplyError(f"reply is compressed ({encoding[:20]!r}) though identity was asked")
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > max_bytes:
            response.close()
            raise BadReplyError(f"reply is longer than {max_bytes} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def find_proxy(url: str) -> Proxy:
    """The proxy that the environment names for a URL, and its credentials; none to ourselves."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    found = urllib.request.getproxies().get(parts.scheme)
    if found is None or host in _LOOPBACK or urllib.request.proxy_bypass(host):
        return None, None
    proxy = yarl.URL(found)
    auth = aiohttp.BasicAuth(proxy.user, proxy.password or "") if proxy.user else None
    return str(proxy.with_user(None)), auth

"""A TCP server that answers with any bytes, for replies that no HTTP library would send."""

import asyncio
import contextlib
import json


def completion(text="generic", choice=None, message=None, **fields):
    """A chat completion as an object; arguments are added over an honest one."""
    one = {"index": 0, "finish_reason": "stop"}
    one["message"] = {"role": "assistant", "content": text, **(message or {})}
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    return {"choices": [{**one, **(choice or {})}], "usage": usage, **fields}


def http(body, status="200 OK", headers=()):
    """A whole response as bytes; `body` is bytes, text or what JSON can hold."""
    if not isinstance(body, bytes):
        body = (body if isinstance(body, str) else json.dumps(body)).encode()
    head = [f"HTTP/1.1 {status}", "Content-Type: application/json", *headers]
    head.append(f"Content-Length: {len(body)}")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


class HostileServer:
    """Each request goes to `answer(payload, number)`, which gives bytes or writes them itself.

    `payload` is the last line of the last message, parsed; `number` counts requests from 1.
    """

    def __init__(self, answer):
        self._answer = answer
        self.num_requests = 0
        self.num_connections = 0
        self.heads = []
        self._tasks = set()

    async def _serve(self, reader, writer):
        self.num_connections += 1
        self._tasks.add(asyncio.current_task())
        ended = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.closing(writer), contextlib.suppress(*ended):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                self.heads.append(head)
                length = [x for x in head.lower().split("\r\n") if x.startswith("content-length")]
                body = await reader.readexactly(int(length[0].split(":")[1])) if length else b""
                self.num_requests += 1
                payload = None
                if body:
                    last = json.loads(body)["messages"][-1]["content"].rsplit("\n", 1)[-1]
                    with contextlib.suppress(ValueError):
                        payload = json.loads(last)
                answer = self._answer(payload, self.num_requests)
                if asyncio.iscoroutine(answer):
                    answer = await answer
                if callable(answer):
                    await answer(writer)
                else:
                    for start in range(0, len(answer), 2**20):  # no second copy of it all
                        writer.write(answer[start : start + 2**20])
                        await writer.drain()

    @contextlib.asynccontextmanager
    async def open(self):
        """Listens; yields the base URL."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

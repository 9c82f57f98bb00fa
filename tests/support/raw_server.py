"""A real HTTP server whose chat route is any handler, for what the package's own cannot do."""

import contextlib
import json

from aiohttp import web

from speciarl_jax.judge.base import Pair


@contextlib.asynccontextmanager
async def raw_server(handler, port=0, ssl_context=None):
    """A real HTTP (or HTTPS) server whose chat route is `handler`; yields its base URL."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=ssl_context).start()
    try:
        yield f"http{'s' if ssl_context else ''}://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


def reply(text):
    message = {"role": "assistant", "content": text}
    return web.json_response({"choices": [{"index": 0, "message": message}]})


def pair_of(body):
    item = json.loads(body["messages"][-1]["content"].rsplit("\n", 1)[1])
    return Pair(item["ground_truth"], item["answer"])

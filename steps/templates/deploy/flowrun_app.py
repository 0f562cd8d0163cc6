"""`flowrun serve` as a deployment of Ray Serve: starts it beside the replica and hands requests on."""

import json
import os
import subprocess

import aiohttp
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

# Of a connection, not of a request; or set anew.
HOP_BY_HOP = {"connection", "host", "keep-alive", "transfer-encoding", "content-length", "te", "upgrade"}


@serve.deployment
class Flowrun:
    def __init__(self, flowrun: str, bundle: str):
        # It ends when its stdin does: with this replica, however that ends.
        command = [flowrun, "serve", bundle, "--port", "0", "--json", "--until-stdin-closes"]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(command)} ended with {self.child.wait()}")
        self.url = json.loads(line)["url"]
        self.session = None

    def check_health(self):
        if self.child.poll() is not None:
            raise RuntimeError(f"flowrun serve ended with {self.child.returncode}")

    async def __call__(self, request: Request):
        if self.session is None:
            self.session = aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None))
        headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP}
        path = request.scope["path"].removeprefix(request.scope.get("root_path", "")) or "/"
        answer = await self.session.request(
            request.method, self.url + path, params=request.query_params, headers=headers, data=await request.body()
        )

        async def body():
            try:
                async for piece in answer.content.iter_any():
                    yield piece
            finally:
                # A client that left is no longer computed for.
                answer.close()

        kept = {k: v for k, v in answer.headers.items() if k.lower() not in HOP_BY_HOP}
        return StreamingResponse(body(), status_code=answer.status, headers=kept)

    def __del__(self):
        child = getattr(self, "child", None)
        if child is not None and child.stdin is not None:
            child.stdin.close()


def build(args: dict):
    bundle = os.path.abspath(args["bundle"])
    return Flowrun.bind(args["flowrun"], bundle)

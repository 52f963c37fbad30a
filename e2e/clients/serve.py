"""Starts the servers that the checks talk to, runs the checks one script after the other, and ends the servers.

usage: serve.py STRATA_RUNTIME CHAT_MODEL EMBEDDINGS_MODEL CERTIFICATES NAME=COMMAND…
"""

import contextlib
import os
import secrets
import shlex
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_SECONDS = 60
SCRIPT_SECONDS = 900


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextlib.contextmanager
def served(runtime: str, model: str, name: str, key: str, log: Path, certificates: Path | None = None):
    """The URL of a server of the model, on this machine only, that wants the key."""
    port, scheme, trust, tls = free_port(), "http", None, []
    if certificates:
        scheme, trust = "https", ssl.create_default_context(cafile=str(certificates / "ca.crt"))
        tls = ["--ssl-certfile", certificates / "tls.crt", "--ssl-keyfile", certificates / "tls.key"]
    arguments = ["--model", model, "--served-model-name", name, "--host", "127.0.0.1", "--port", port]
    more = ["--shutdown-delay", "0", *tls]
    with log.open("w") as out:
        server = subprocess.Popen(
            [runtime, "serve", *arguments, *more], stdout=out, stderr=out, env={**os.environ, "VLLM_API_KEY": key}
        )
    url, deadline = f"{scheme}://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust))
    try:
        while True:
            try:
                direct.open(f"{url}/ready", timeout=2)
                break
            except (urllib.error.URLError, OSError) as error:
                if time.monotonic() > deadline or server.poll() is not None:
                    sys.exit(f"FAILED the server of {name} does not start: {error}\n{log.read_text()[-2000:]}")
                time.sleep(0.05)
        yield url
        if server.poll() is not None:
            sys.exit(f"FAILED the server of {name} ended with status {server.returncode}:\n{log.read_text()[-2000:]}")
    finally:
        server.terminate()
        server.wait(30)


def main() -> None:
    runtime, chat, embeddings, folder, *scripts = sys.argv[1:]
    certificates, key = Path(folder), secrets.token_urlsafe()
    with (
        served(runtime, chat, "smollm2", key, certificates / "chat.log") as url,
        served(runtime, chat, "smollm2", key, certificates / "tls.log", certificates) as tls_url,
        served(runtime, embeddings, "minilm", key, certificates / "embeddings.log") as embeddings_url,
    ):
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "AZURE_"))},
            "STRATA_URL": url,
            "STRATA_TLS_URL": tls_url,
            "STRATA_EMBEDDINGS_URL": embeddings_url,
            "STRATA_KEY": key,
            "SSL_CERT_FILE": str(certificates / "ca.crt"),
            # Nothing but this machine is talked to.
            "NO_PROXY": "*",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        failed = []
        for script in scripts:
            name, command = script.split("=", 1)
            print(f"clients: {name}", flush=True)
            ended = subprocess.run(shlex.split(command), env=environment, timeout=SCRIPT_SECONDS)
            if ended.returncode != 0:
                failed.append(name)
    if failed:
        sys.exit(f"clients: FAILED: {', '.join(failed)}")
    print("clients: all passed")


main()

"""What the measurements share: where the peer, the models and the texts are, and how servers are started and asked."""

import http.client
import json
import os
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SAMPLES = HERE.parent.parent / "config/samples/data"
CACHE = Path(os.environ.get("STRATA_CACHE") or Path.home() / ".cache/strata")
THREADS = 2
# Ids below are special tokens in SmolLM2; a random prompt has none of them.
FIRST_PLAIN, LAST_PLAIN = 100, 49_000
READY_DEADLINE_SECONDS = 120


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def output(*command, **more):
    """The text that a program prints; its own complaints go to ours."""
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True, **more).stdout


def peer_programs():
    return Path(output(HERE.parent / "peers/llama_cpp").splitlines()[-1])


def made(path, make):
    """`path`, made once: a half-written file never has its name."""
    if not path.exists():
        say(f"making {path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        make(part)
        part.rename(path)
    return path


def shipped_model(programs):
    """SmolLM2-135M-Instruct as it is shipped."""
    return Path(output(programs / "bed", "model").strip())


def models(programs, peer, synth=True):
    """SmolLM2-135M-Instruct as it is shipped and in the peer's other formats, and a large model of no sense."""
    shipped = shipped_model(programs)
    folder = CACHE / "bench"

    def quantized(name, source, to):
        # Weights that are quantized already are only refused by default.
        return made(folder / name, lambda part: output(peer / "llama-quantize", "--allow-requantize", source, part, to, THREADS,
                                                      stderr=subprocess.DEVNULL))

    smollm = {"q4_1": shipped}
    smollm |= {to.lower(): quantized(f"smollm2-{to.lower()}.gguf", shipped, to) for to in ["Q4_0", "Q8_0"]}
    if not synth:
        return smollm, {}
    plain = made(folder / "synth-1b-q8_0.gguf", lambda part: output(programs / "examples/synthetic", shipped, part))
    large = {to.lower(): quantized(f"synth-1b-{to.lower()}.gguf", plain, to) for to in ["Q4_0", "Q4_K_M", "Q6_K"]}
    return smollm, {"q8_0": plain} | large


def stage_quantize(programs, source, to, name, out):
    """The GGUF file that the stage `quantize` makes of the model in `source`."""
    out.mkdir()
    run = {"id": name, "attempt": 1, "resource": {"kind": "InferenceService", "name": name}, "output": f"file://{out}"}
    stage = {"model": {"name": "model", "uri": f"file://{source}"}, "format": to, "gates": []}
    config = out / "config.json"
    config.write_text(json.dumps({"contractVersion": 1, "run": run, "stage": {"quantize": stage}}))
    output(programs / "strata-runtime", "quantize", "--config", config, "--report", out / "report", "--monitor", "none")
    (file,) = out.rglob("*.gguf")
    return file


def random_prompt(generator, count):
    return [generator.randrange(FIRST_PLAIN, LAST_PLAIN) for _ in range(count)]


def write_texts(path, texts):
    with path.open("wb") as file:
        for text in texts:
            data = text.encode()
            file.write(struct.pack("<I", len(data)) + data)


def read_ids(path):
    data, at, all_ids = path.read_bytes(), 0, []
    while at < len(data):
        (count,) = struct.unpack_from("<i", data, at)
        all_ids.append(list(struct.unpack_from(f"<{count}i", data, at + 4)))
        at += 4 + 4 * count
    return all_ids


def tokenize(peer, model, texts):
    """The peer's ids of each of `texts`, as plain text."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "texts"), Path(folder, "ids")
        write_texts(source, texts)
        output(peer / "peer", "tokenize", model, source, out)
        return read_ids(out)


def write_sequences(path, sequences):
    path.write_text("".join(" ".join(map(str, ids)) + "\n" for ids in sequences))


def median(values):
    return statistics.median(values)


def alternate(rounds, parts):
    """Runs every part in turn, `rounds` times, so that what disturbs the machine disturbs all of them alike."""
    results = {name: [] for name in parts}
    for _ in range(rounds):
        for name, part in parts.items():
            results[name].append(part())
    return results


class Server:
    """A server on a free port of the loopback; it ends with the `with` block."""

    def __init__(self, command, ready_path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.command = [str(part) for part in command] + ["--host", "127.0.0.1", "--port", str(self.port)]
        self.ready_path = ready_path

    def __enter__(self):
        self.log = tempfile.TemporaryFile()
        begin = time.monotonic()
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL)
        try:
            while not self._is_ready():
                if self.process.poll() is not None or time.monotonic() - begin > READY_DEADLINE_SECONDS:
                    self.log.seek(0)
                    raise RuntimeError(f"{self.command[0]} did not start:\n{self.log.read()[-3000:].decode(errors='replace')}")
                time.sleep(0.005)
        except BaseException:
            self.__exit__()
            raise
        self.ready_seconds = time.monotonic() - begin
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()

    def _is_ready(self):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("GET", self.ready_path)
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def resident_bytes(self):
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("the server's memory cannot be read")

    def complete(self, prompt, tokens, reuse=False):
        """Asks for exactly `tokens` tokens after `prompt`, greedily, as a stream; (seconds to the first, seconds in all).
        `reuse` lets the peer keep what it computed of earlier prompts; ours has a flag for that at its start."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                "stream_options": {"include_usage": True}, "cache_prompt": reuse}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        begin = time.monotonic()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        first, usage = None, None
        for line in response:
            if line.startswith(b"data: "):
                first = first or time.monotonic() - begin
                if b'"usage"' in line:
                    usage = json.loads(line[6:]).get("usage") or usage
        seconds = time.monotonic() - begin
        connection.close()
        if response.status != 200 or not usage or usage["completion_tokens"] != tokens or usage["prompt_tokens"] != len(prompt):
            raise RuntimeError(f"{self.command[0]} answered {response.status} with {usage} to {len(prompt)} + {tokens} tokens")
        return first, seconds

    def clients(self, prompts, tokens):
        """Every prompt from a client of its own, at once: (tokens a second in all, each one's answer to `complete`)."""
        answers, errors = [None] * len(prompts), []

        def client(i):
            try:
                answers[i] = self.complete(prompts[i], tokens)
            except Exception as error:  # noqa: BLE001: told by the thread that waits
                errors.append(error)

        threads = [threading.Thread(target=client, args=(i,)) for i in range(len(prompts))]
        begin = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - begin
        if errors:
            raise errors[0]
        return len(prompts) * tokens / seconds, answers


def ours(programs, model, slots, context, *more):
    """Our server for `slots` requests of `context` tokens each."""
    return Server([programs / "strata-runtime", "serve", "--model", model, "--max-num-seqs", slots, "--max-model-len", context,
                   "--shutdown-delay", 0, *more], "/ready")


def peers(peer, model, slots, context):
    """llama-server for the same, with flash attention and without: {name: server}."""
    return {f"llama.cpp fa {fa}": Server(
        [peer / "llama-server", "--model", model, "--threads", THREADS, "--threads-batch", THREADS, "--parallel", slots,
         "--ctx-size", slots * context, "--flash-attn", fa, "--cache-ram", 0], "/health") for fa in ["off", "on"]}


def generator():
    return random.Random(4)

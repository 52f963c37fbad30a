"""A model served by strata-runtime beside the same model in transformers."""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import torch

# F32 sums in another order: as much as two implementations of one model may differ in a log-probability.
LOG_PROB_BOUND = 1e-3
TOP = 5


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=60) as response:
        text = response.read().decode()
        return json.loads(text) if text.startswith(("{", "[")) else {"text": text}


@contextmanager
def server(runtime: str, model: Path, *arguments: str):
    """The server's address while it runs; names the model `m`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    command = [runtime, "serve", "--model", str(model), "--served-model-name", "m", "--host", "127.0.0.1", "--port", port]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, "--shutdown-delay", "0", *arguments], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    post(url + "/tokenize", {"prompt": "x"})
                    break
                except (urllib.error.URLError, ConnectionError):
                    if time.monotonic() > deadline or process.poll() is not None:
                        log.seek(0)
                        sys.exit(f"FAILED the server does not start: {log.read()[-2000:]}")
                    time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait(30)


def byte_tokenizer(folder: Path) -> None:
    """256 bytes and three special tokens; no merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|end|>", "<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))


@torch.no_grad()
def worst_difference(model, url: str, prompt: list[int], steps: int, name: str = "m") -> float:
    """Greedy steps on the server; the largest difference of a log-probability among the best tokens."""
    request = {"prompt": prompt, "max_tokens": steps, "temperature": 0, "logprobs": TOP, "model": name, "ignore_eos": True}
    answer = post(url + "/v1/completions", request)["choices"][0]["logprobs"]
    tokens, worst = list(prompt), 0.0
    for step, top in enumerate(answer["top_logprobs"]):
        log_softmax = model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)
        expected = log_softmax.topk(TOP)
        # By value: several bytes that are no character have one text, under which only one of them is shown.
        worst = max([worst, *(min(abs(got - value) for value in expected.values.tolist()) for got in top.values())])
        worst = max(worst, abs(answer["token_logprobs"][step] - expected.values[0].item()))
        tokens.append(int(expected.indices[0]))
    return worst


def same_log_probs(name: str, model, folder: Path, runtime: str, prompt: list[int], *arguments: str) -> None:
    with server(runtime, folder, "--kv-cache-dtype", "f32", *arguments) as url:
        worst = worst_difference(model, url, prompt, 6)
    if worst > LOG_PROB_BOUND:
        sys.exit(f"FAILED {name}: log-probabilities are up to {worst:.2e} apart, bound {LOG_PROB_BOUND:.0e}")
    print(f"ok  {name}: log-probabilities of 6 greedy tokens and the {TOP - 1} next best, {worst:.1e} apart")

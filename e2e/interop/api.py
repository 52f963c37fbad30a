"""OpenAI's own client against the server: keys, responses, embeddings; the vectors against transformers.

usage: api.py STRATA_RUNTIME CHAT_MODEL
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from importlib import resources
from pathlib import Path

import openai
import torch
from pydantic import BaseModel
from transformers import AutoModel, AutoTokenizer

KEY = "a key for this test"
TEXTS = [
    "The cat sits on the mat.",
    "Ein Text, der länger ist als der andere: naïve café, 東京, emoji 🙂.",
    "x",
    " ".join(["All that glitters is not gold;"] * 30),
]


@contextlib.contextmanager
def served(runtime: str, model: Path, *more: str):
    """A server of the model that wants the key."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = ["serve", "--model", str(model), "--served-model-name", "m", "--host", "127.0.0.1", "--port", port]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([runtime, *arguments, *more], env=dict(os.environ, VLLM_API_KEY=KEY), **silent)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/ready", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                if time.monotonic() > deadline or server.poll() is not None:
                    sys.exit("FAILED the server does not start")
                time.sleep(0.05)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def expect(what: str, true: bool, seen: object) -> None:
    if not true:
        sys.exit(f"FAILED {what}: {seen!r}")


class Capital(BaseModel):
    country: str
    city: str


def check_responses(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    azure = openai.AzureOpenAI(azure_endpoint=url, api_key=KEY, api_version="2025-03-01-preview", max_retries=0)
    try:
        openai.OpenAI(base_url=f"{url}/v1", api_key="another", max_retries=0).models.list()
        sys.exit("FAILED another key is taken")
    except openai.AuthenticationError as error:
        expect("the error's code", error.code == "invalid_api_key", error.code)
    ask = {"model": "m", "input": "Name the capital of France.", "temperature": 0, "max_output_tokens": 40}
    answers = [each.responses.create(**ask) for each in (client, azure)]
    first = answers[0]
    expect("status", first.status in ("completed", "incomplete"), first)
    expect("Azure's answer", answers[1].output_text == first.output_text, answers[1].output_text)
    usage = first.usage
    expect("usage", usage.total_tokens == usage.input_tokens + usage.output_tokens > 0, usage)
    with client.responses.stream(**ask) as stream:
        kinds = [event.type for event in stream]
        last = stream.get_final_response()
    expect("the stream's text", last.output_text == first.output_text, last.output_text)
    expect("the stream's end", kinds[-1] == f"response.{first.status}", kinds[-1])
    kept = client.responses.retrieve(first.id)
    expect("the stored response", kept.output_text == first.output_text, kept)
    more = client.responses.create(**{**ask, "input": "And of Italy?"}, previous_response_id=first.id)
    expect("a longer prompt", more.usage.input_tokens > usage.input_tokens + usage.output_tokens, more.usage)
    client.responses.delete(first.id)
    try:
        client.responses.retrieve(first.id)
        sys.exit("FAILED a deleted response is there")
    except openai.NotFoundError:
        pass
    parsed = client.responses.parse(**{**ask, "max_output_tokens": 60}, text_format=Capital).output_parsed
    expect("the parsed answer", isinstance(parsed, Capital), parsed)
    print(f"ok  responses with openai {openai.__version__}: {first.output_text!r}, {parsed!r}")


def check_embeddings(url: str, folder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    azure = openai.AzureOpenAI(azure_endpoint=url, api_key=KEY, api_version="2024-10-21", max_retries=0)
    answers = [each.embeddings.create(model="m", input=TEXTS) for each in (client, azure)]
    answers.append(client.embeddings.create(model="m", input=TEXTS, encoding_format="float"))
    worst, tokens = 0.0, 0
    for i, text in enumerate(TEXTS):
        encoded = tokenizer(text, return_tensors="pt")
        tokens += encoded["input_ids"].shape[1]
        with torch.no_grad():
            mean = model(**encoded).last_hidden_state.mean(1)[0]
        expected = mean / mean.norm()
        for answer in answers:
            worst = max(worst, (torch.tensor(answer.data[i].embedding) - expected).abs().max().item())
    expect("tokens", answers[0].usage.prompt_tokens == tokens, (answers[0].usage, tokens))
    expect("vectors within 1e-5 of transformers'", worst < 1e-5, worst)
    try:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
        sys.exit("FAILED an encoder chats")
    except openai.BadRequestError as error:
        expect("the error's field", error.param == "model", error)
    print(f"ok  embeddings: {len(TEXTS)} texts, at most {worst:.1e} from transformers")


def main() -> None:
    runtime, chat = sys.argv[1], Path(sys.argv[2])
    with served(runtime, chat, "--max-model-len", "1024") as url:
        check_responses(url)
    with tempfile.TemporaryDirectory() as folder:
        with resources.as_file(resources.files("all_minilm_l6_v2") / "model.zip") as packed:
            zipfile.ZipFile(packed).extractall(folder)
        with served(runtime, Path(folder)) as url:
            check_embeddings(url, Path(folder))


if __name__ == "__main__":
    main()

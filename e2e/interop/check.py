"""What Strata publishes, read by the tools that own the formats, and computed again by transformers.

Usage: check.py FOLDER BASE_GGUF STRATA_RUNTIME, where FOLDER is what `run` made. Ends with a line for each check; the first
figure that differs by more than its bound ends it with an error.
"""

import json
import math
import sys
from pathlib import Path

import datasets
import openai
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import served


def content(run: Path) -> tuple[dict, Path]:
    manifest = json.loads((run / "manifest.json").read_text())
    return manifest["content"], run / manifest["publication"]["contentPath"]


def near(what: str, got: float, expected: float, bound: float) -> None:
    difference = abs(got - expected)
    if not difference <= bound:
        sys.exit(f"FAILED {what}: {got} here, {expected} published: {difference:.2e} apart, bound {bound:.0e}")
    print(f"ok  {what}: {got:.6f}, {difference:.1e} apart")


@torch.no_grad()
def log_probs(model, tokens: list[int], score_from: int) -> torch.Tensor:
    logits = model(torch.tensor([tokens[:-1]])).logits[0, score_from - 1 :]
    targets = torch.tensor(tokens[score_from:]).unsqueeze(1)
    return logits.double().log_softmax(-1).gather(1, targets).squeeze(1)


def bits_per_byte(model, text: dict) -> float:
    bits = -sum(log_probs(model, w["tokens"], w["scoreFrom"]).sum().item() for w in text["windows"]) / math.log(2)
    return bits / sum(w["bytes"] for w in text["windows"])


def likelihood(model, prompt: list[int], completion: list[int]) -> float:
    return log_probs(model, prompt + completion, len(prompt)).sum().item()


def check_text_model(name: str, model, manifest: dict, folder: Path) -> dict:
    evaluation = json.loads((folder / "evaluation/set.json").read_text())
    near(f"{name}: bits per byte", bits_per_byte(model, evaluation["text"]), manifest["metrics"]["bitsPerByte"], 1e-4)
    return evaluation


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def check_pretrained(run: Path) -> None:
    manifest, folder = content(run)
    check_text_model("pretrained", load(folder), manifest, folder)


def check_aligned(run: Path, gguf: Path, runtime: str) -> None:
    manifest, folder = content(run)
    merged = load(folder)
    evaluation = check_text_model("merged", merged, manifest, folder)

    # transformers reads the GGUF itself: the base and its dequantization are not ours.
    base = load(gguf.parent, gguf_file=gguf.name)
    pairs, beta = evaluation["preferences"]["pairs"], evaluation["preferences"]["beta"]
    margins, worst = [], 0.0
    for pair in pairs:
        parts = {}
        for which in ("chosen", "rejected"):
            before, published = likelihood(base, pair["prompt"], pair[which]), pair[f"reference{which.title()}"]
            worst = max(worst, abs(before - published) / len(pair[which]))
            parts[which] = likelihood(merged, pair["prompt"], pair[which]) - before
        margins.append(beta * (parts["chosen"] - parts["rejected"]))
    near(f"base: log-probabilities of {2 * len(pairs)} answers, largest difference a token", worst, 0.0, served.LOG_PROB_BOUND)
    near("merged: reward margin", sum(margins) / len(margins), manifest["metrics"]["rewardMargin"], 2e-3)

    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokens = pairs[0]["prompt"]
    with torch.no_grad():
        difference = (adapted(torch.tensor([tokens])).logits - merged(torch.tensor([tokens])).logits).abs().max().item()
    near("PEFT adapter over the base: largest difference of a logit", difference, 0.0, 1e-3)
    check_served(merged, folder, runtime)


def check_served(model, folder: Path, runtime: str) -> None:
    """The server and transformers: the same prompt tokens for a chat, the same log-probabilities."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with served.server(runtime, folder, "--max-model-len", "512") as url:
        messages = [
            {"role": "user", "content": "Name a play.\n\nPlease!"},
            {"role": "assistant", "content": "Hamlet — by Shakespeare."},
            {"role": "user", "content": "Another, in 日本語 or español? 🎭"},
        ]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        expected = expected["input_ids"] if hasattr(expected, "keys") else expected
        got = served.post(url + "/tokenize", {"messages": messages})["tokens"]
        if got != list(expected):
            sys.exit(f"FAILED chat template and tokenizer: {got} here, transformers {expected}")
        print(f"ok  chat template and tokenizer: the same {len(got)} tokens")
        request = {"prompt": got, "max_tokens": 8, "temperature": 0, "logprobs": 5, "model": "m"}
        answer = served.post(url + "/v1/completions", request)["choices"][0]["logprobs"]
        tokens, worst = list(got), 0.0
        for token_text, log_prob in zip(answer["tokens"], answer["token_logprobs"]):
            with torch.no_grad():
                log_softmax = model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)
            best = int(log_softmax.argmax())
            if tokenizer.decode([best]) != token_text:
                sys.exit(f"FAILED served: {token_text!r} where transformers says {tokenizer.decode([best])!r}")
            worst = max(worst, abs(log_softmax[best].item() - log_prob))
            tokens.append(best)
        check_clients(url)
        near("served: log-probabilities of 8 greedy tokens, largest difference", worst, 0.0, 5e-3)


def check_clients(url: str) -> None:
    """OpenAI's own client, as for OpenAI and as for Azure: the same answer, whole and streamed; errors by their class."""
    request = {"model": "m", "messages": [{"role": "user", "content": "Hello!"}], "temperature": 0, "max_tokens": 8}
    answers = []
    for client in [
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0),
        openai.AzureOpenAI(azure_endpoint=url, api_key="none", api_version="2024-10-21", max_retries=0),
        openai.OpenAI(base_url=f"{url}/openai/v1/", api_key="none", max_retries=0),
    ]:
        answers.append(client.chat.completions.create(**request).choices[0].message.content)
        stream = client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        answers.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))
        if chunks[-1].usage.completion_tokens < 1:
            sys.exit(f"FAILED {type(client).__name__}: the stream ends without usage")
        try:
            client.chat.completions.create(**{**request, "model": "nobody"})
            sys.exit(f"FAILED {type(client).__name__}: a model that is not served answers")
        except openai.NotFoundError:
            pass
    if len(set(answers)) != 1 or not answers[0]:
        sys.exit(f"FAILED clients: {answers}")
    print(f"ok  openai {openai.__version__}, three ways to reach the server: {answers[0]!r}")


def check_dataset(name: str, run: Path) -> None:
    manifest, folder = content(run)
    loaded = datasets.load_dataset(str(folder))
    rows = sum(split.num_rows for split in loaded.values())
    kept = manifest["metrics"]["documentsKept"]
    if rows != kept:
        sys.exit(f"FAILED {name}: datasets reads {rows} rows, {kept} were published")
    print(f"ok  {name}: datasets reads {rows} rows in {sorted(loaded)}, columns {loaded['train'].column_names}")


def main() -> None:
    out, gguf, runtime = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(2)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    check_dataset("plays", out / "align/plays")
    check_dataset("preferences", out / "align/preferences")
    check_pretrained(out / "run")
    [aligned] = (out / "align").glob("run-*")
    check_aligned(aligned, gguf, runtime)


main()

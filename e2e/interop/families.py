"""Every model family, computed by transformers.

    families.py expect FILE            writes what runtime-image/serve/tests/families.rs expects (families.json)
    families.py check STRATA_RUNTIME   random models of each family, served: the same log-probabilities

`expect` needs no weights from outside: `synthetic` computes those of runtime-image/model/src/synthetic.rs, number by number.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy
import peft
import torch
import transformers

import served

VOCABULARY = 259  # 256 bytes and three special tokens
TOKENS = 40
SEED = 5
SHOWN_POSITIONS = [0, 1, 11, TOKENS - 1]
SHOWN_LOGITS = 6

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 258,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64}
LONG |= {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 2.0, 4.0, 8.0], "partial_rotary_factor": 0.5}
CASES = {
    "llama": ("Llama", {}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral-no-window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 24, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"head_dim": 24, "tie_word_embeddings": True, "sliding_window": 7, "query_pre_attn_scalar": 24}),
    "gemma2-scale": ("Gemma2", {"head_dim": 24, "tie_word_embeddings": True, "sliding_window": 7, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 24,
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 9}),
    "phi3-longrope": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    # The text is longer than the original positions.
    "phi3-longrope-long": (
        "Phi3",
        {"rope_parameters": LONG | {"original_max_position_embeddings": 32}, "original_max_position_embeddings": 32},
    ),
}


def configuration(case: str):
    family, extra = CASES[case]
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    return getattr(transformers, name)(**(SHAPE | extra))


def model_class(case: str):
    return getattr(transformers, f"{CASES[case][0]}ForCausalLM")


def parts(case: str, config) -> list[tuple[str, list[int], str]]:
    """The tensors in the order of runtime-image/model/src/family.rs, fused ones in parts."""
    family, hidden, inner = CASES[case][0], config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    rows = {"q": config.num_attention_heads * head_dim}
    rows["k"] = rows["v"] = config.num_key_value_heads * head_dim
    post = family in ("Gemma2", "Gemma3")
    all = [("model.embed_tokens.weight", [config.vocab_size, hidden], "embedding")]
    for layer in range(config.num_hidden_layers):
        block = [("input_layernorm.weight", [hidden], "norm")]
        block += [(f"self_attn.{p}_proj.weight", [rows[p], hidden], "linear") for p in "qkv"]
        if family == "Qwen2":
            block += [(f"self_attn.{p}_proj.bias", [rows[p]], "bias") for p in "qkv"]
        if family in ("Qwen3", "Gemma3"):
            block += [(f"self_attn.{p}_norm.weight", [head_dim], "norm") for p in "qk"]
        block += [("self_attn.o_proj.weight", [hidden, rows["q"]], "linear")]
        if post:
            block += [("post_attention_layernorm.weight", [hidden], "norm")]
        block += [("pre_feedforward_layernorm.weight" if post else "post_attention_layernorm.weight", [hidden], "norm")]
        block += [(f"mlp.{p}_proj.weight", [inner, hidden], "linear") for p in ("gate", "up")]
        block += [("mlp.down_proj.weight", [hidden, inner], "linear")]
        if post:
            block += [("post_feedforward_layernorm.weight", [hidden], "norm")]
        all += [(f"model.layers.{layer}.{name}", shape, role) for name, shape, role in block]
    all += [("model.norm.weight", [hidden], "norm")]
    if not config.tie_word_embeddings:
        all += [("lm_head.weight", [config.vocab_size, hidden], "head")]
    return all


def synthetic(case: str, config) -> dict[str, torch.Tensor]:
    """splitmix64 from SEED on; see `weights` in runtime-image/model/src/synthetic.rs."""
    offset = numpy.float32(1.0 if CASES[case][0].startswith("Gemma") else 0.0)
    state, out = SEED, {}
    for name, shape, role in parts(case, config):
        count = int(numpy.prod(shape))
        with numpy.errstate(over="ignore"):
            z = numpy.uint64(state) + numpy.arange(1, count + 1, dtype=numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
            state = int(z[-1])
            z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
            z = (z ^ (z >> numpy.uint64(31))) >> numpy.uint64(40)
        x = z.astype(numpy.float32) / numpy.float32(1 << 23) - numpy.float32(1.0)
        if role == "norm":
            x = numpy.float32(1.0) - offset + numpy.float32(0.1) * x
        elif role == "bias":
            x = numpy.float32(0.5) * x
        elif role in ("linear", "head"):
            x = numpy.float32(1.7) * x / numpy.sqrt(numpy.float32(shape[-1]))
        out[name] = torch.from_numpy(x.reshape(shape))
    if CASES[case][0] == "Phi3":
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            take = lambda *names: torch.cat([out.pop(prefix + name) for name in names])
            qkv = take(*(f"self_attn.{p}_proj.weight" for p in "qkv"))
            out[prefix + "self_attn.qkv_proj.weight"] = qkv
            out[prefix + "mlp.gate_up_proj.weight"] = take("mlp.gate_proj.weight", "mlp.up_proj.weight")
    return out


def tokens() -> list[int]:
    return [(i * 37 + 11) % VOCABULARY for i in range(TOKENS)]


@torch.no_grad()
def expect(path: str) -> None:
    out = {}
    for case in CASES:
        config = configuration(case)
        config.architectures = [model_class(case).__name__]
        config._attn_implementation = "eager"  # the only one that caps scores
        model = model_class(case)(config).float().eval()
        left = model.load_state_dict(synthetic(case, config), strict=False)
        missing = [name for name in left.missing_keys if name != "lm_head.weight"]
        assert not missing and not left.unexpected_keys, left
        model.tie_weights()
        logits = model(torch.tensor([tokens()])).logits[0]
        shown = {at: [round(x, 6) for x in logits[at, :: VOCABULARY // SHOWN_LOGITS].tolist()] for at in SHOWN_POSITIONS}
        out[case] = {"config": config.to_diff_dict(), "logits": shown}
        print(f"{case}: logits up to {logits.abs().max():.2f}")
    text = ",\n".join(f"{json.dumps(case)}: {json.dumps(value)}" for case, value in out.items())
    Path(path).write_text("{\n" + text + "\n}\n")


@torch.no_grad()
def random_model(case: str):
    torch.manual_seed(7)
    config = configuration(case)
    config._attn_implementation = "eager"
    model = model_class(case)(config).float().eval()
    for name, values in model.named_parameters():
        # Gains and biases start at 0 or 1, and logits of fresh models are all alike: neither would tell a mistake.
        values.add_(torch.randn_like(values) * (0.3 if "norm" in name or "bias" in name else 0.1))
    return model


def check(runtime: str) -> None:
    for case in CASES:
        model = random_model(case)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            served.byte_tokenizer(Path(folder))
            # Within the original length transformers takes the short factors, and a server that ends there as well.
            arguments = ["--max-model-len", "64"] if case == "phi3-longrope" else []
            served.same_log_probs(case, model, Path(folder), runtime, tokens(), *arguments)
    for case in ("llama", "qwen2", "phi3"):
        check_adapters(case, runtime)


def check_adapters(case: str, runtime: str) -> None:
    """Two adapters that PEFT makes and saves, one of them with rank-stabilized scaling, beside the base in one server."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        random_model(case).save_pretrained(base)
        served.byte_tokenizer(base)
        adapted = {"m": random_model(case)}
        for name, options in {"plain": {}, "rslora": {"use_rslora": True, "target_modules": ["o_proj", "down_proj"]}}.items():
            options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False} | options
            adapted[name] = peft.get_peft_model(random_model(case), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
            adapted[name].save_pretrained(Path(folder) / name)
        modules = [f"{name}={Path(folder) / name}" for name in adapted if name != "m"]
        arguments = ["--kv-cache-dtype", "f32", "--enable-lora", "--lora-modules", *modules]
        with served.server(runtime, base, *arguments) as url:
            for name, model in adapted.items():
                worst = served.worst_difference(model, url, tokens(), 6, name)
                if worst > served.LOG_PROB_BOUND:
                    sys.exit(f"FAILED {case} with adapter {name}: {worst:.2e} apart, bound {served.LOG_PROB_BOUND:.0e}")
                print(f"ok  {case}, adapter {name}: log-probabilities of 6 greedy tokens, {worst:.1e} apart")


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    {"expect": expect, "check": check}[sys.argv[1]](sys.argv[2])

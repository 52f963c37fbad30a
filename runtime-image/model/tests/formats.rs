//! What is written is read back; what is broken is refused with an error and never with a panic.

#![allow(
    clippy::unwrap_used,
    reason = "in a test an unwrap is an assertion, also in its helpers"
)]

use std::path::Path;

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use strata_model::synthetic::{CHAT_TEMPLATE, byte_tokenizer, tiny_config, weights};
use strata_model::{
    ChatTemplate, Dtype, GenerationConfig, LoadedModel, MemoryWeights, ModelConfig, ModelError, TokenText, Vocabulary,
    Weights, gguf, hf, tensors,
};

fn write_gguf_with(
    path: &Path,
    config: &ModelConfig,
    weights: &MemoryWeights,
    tokenizer_json: &Value,
    dtype: Dtype,
) -> strata_model::Result<()> {
    let texts = gguf::Texts {
        tokenizer_json,
        chat_template: Some(CHAT_TEMPLATE),
        generation: &generation(config),
    };
    gguf::write(path, "tiny", config, weights, texts, dtype)
}

fn write_gguf(path: &Path, config: &ModelConfig, weights: &MemoryWeights, dtype: Dtype) {
    write_gguf_with(path, config, weights, &byte_tokenizer(), dtype).unwrap();
}

fn generation(config: &ModelConfig) -> GenerationConfig {
    GenerationConfig {
        eos: config.eos.clone(),
        ..GenerationConfig::default()
    }
}

fn write_folder(path: &Path, config: &ModelConfig, weights: &MemoryWeights, dtype: Dtype) {
    let folder = hf::Folder {
        config,
        weights,
        dtype,
        tokenizer_json: &byte_tokenizer(),
        chat_template: Some(CHAT_TEMPLATE),
        generation: &generation(config),
    };
    hf::write(path, &folder).unwrap();
}

/// Writes `new` over the only place of `old` in the file.
fn patch(path: &Path, old: &[u8], skip: usize, new: &[u8]) {
    let mut bytes = std::fs::read(path).unwrap();
    let places: Vec<usize> = (0..bytes.len() - old.len())
        .filter(|at| bytes[*at..].starts_with(old))
        .collect();
    assert_eq!(places.len(), 1, "{:?}", String::from_utf8_lossy(old));
    let at = places[0] + skip;
    bytes[at..at + new.len()].copy_from_slice(new);
    std::fs::write(path, bytes).unwrap();
}

/// The largest difference of an element, as a share of the largest element of its row.
fn worst_error(config: &ModelConfig, original: &MemoryWeights, read: &dyn Weights) -> f32 {
    let mut worst = 0f32;
    for tensor in tensors(config) {
        let (a, b) = (original.f32(&tensor.name).unwrap(), read.f32(&tensor.name).unwrap());
        let largest = a.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        worst = a
            .iter()
            .zip(&b)
            .fold(worst, |worst, (a, b)| worst.max((a - b).abs() / largest));
    }
    worst
}

#[test]
fn both_formats_give_back_what_was_written_within_the_precision_of_the_type() {
    let dir = tempfile::tempdir().unwrap();
    for tied in [false, true] {
        let config = ModelConfig {
            tie_embeddings: tied,
            ..tiny_config()
        };
        let weights = weights(&config, 7);
        for (dtype, most) in [
            (Dtype::F32, 0.0),
            (Dtype::F16, 1e-3),
            (Dtype::BF16, 5e-3),
            (Dtype::Q8_0, 5e-3),
        ] {
            let file = dir.path().join(format!("{tied}-{}.gguf", dtype.name()));
            write_gguf(&file, &config, &weights, dtype);
            let read = LoadedModel::open(&file).unwrap();
            assert_eq!(read.config, config);
            let error = worst_error(&config, &weights, &*read.weights);
            assert!(error <= most, "GGUF {}: {error}", dtype.name());
            assert_eq!(read.chat_template.unwrap().source(), CHAT_TEMPLATE);
            assert_eq!(
                read.vocabulary.encode("<|im_start|>héllo", true).unwrap(),
                [257, 104, 195, 169, 108, 108, 111]
            );

            if dtype != Dtype::Q8_0 {
                let folder = dir.path().join(format!("{tied}-{}", dtype.name()));
                std::fs::create_dir(&folder).unwrap();
                write_folder(&folder, &config, &weights, dtype);
                let read = LoadedModel::open(&folder).unwrap();
                assert_eq!(read.config, config);
                assert!(
                    worst_error(&config, &weights, &*read.weights) <= most,
                    "HF {}",
                    dtype.name()
                );
            }
        }
    }
}

#[test]
fn a_model_that_this_engine_cannot_compute_is_refused_by_name() {
    let path = Path::new("config.json");
    let good = tiny_config().to_hf("float32");
    assert_eq!(ModelConfig::from_hf(&good, path).unwrap(), tiny_config());
    let cases = [
        (
            "architectures",
            json!(["MambaForCausalLM"]),
            "unknown architecture \"MambaForCausalLM\"; this engine knows LlamaForCausalLM",
        ),
        (
            "rope_scaling",
            json!({"rope_type": "dynamic", "factor": 8.0}),
            "rotary embeddings of type \"dynamic\" are not supported; \"default\", \"linear\",",
        ),
        (
            "rope_scaling",
            json!({"rope_type": "linear", "factor": 0.0}),
            "a number that is not above 0",
        ),
        ("attention_bias", json!(true), "attention_bias is true"),
        ("hidden_act", json!("gelu"), "hidden_act is \"gelu\""),
        ("num_key_value_heads", json!(3), "4 heads cannot share 3 kv heads"),
        ("vocab_size", json!(1u64 << 60), "vocabulary size"),
        ("hidden_size", json!(-1), "hidden_size is -1"),
        ("num_hidden_layers", json!(0), "layers is 0"),
    ];
    for (key, value, message) in cases {
        let mut bad = good.clone();
        bad[key] = value;
        let error = ModelConfig::from_hf(&bad, path).unwrap_err().to_string();
        assert!(error.contains(message), "{key}: {error}");
    }
    // Newer transformers moved the base of the rotary embeddings.
    let mut new = good.clone();
    new.as_object_mut().unwrap().shift_remove("rope_theta");
    new["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 10000.0});
    assert_eq!(ModelConfig::from_hf(&new, path).unwrap(), tiny_config());
}

#[test]
fn an_unknown_gguf_architecture_is_a_typed_error_with_the_known_ones() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.gguf");
    let config = tiny_config();
    write_gguf(&file, &config, &weights(&config, 1), Dtype::F32);

    // As in a Q5_K_M file: a matrix that is needed has a type that is known to GGUF alone. After a name come the number of
    // dimensions, two sizes and the type.
    let name = b"blk.1.attn_q.weight";
    patch(&file, name, name.len() + 4 + 16, &13u32.to_le_bytes());
    match LoadedModel::open(&file).unwrap_err() {
        ModelError::Unsupported { what, .. } => assert!(
            what.starts_with("tensor model.layers.1.self_attn.q_proj.weight: element type Q5_K is not supported; F32,"),
            "{what}"
        ),
        other => panic!("{other}"),
    }
    // The architecture is what no other file of this model cures: it is named first.
    patch(&file, b"general.architecture", 20 + 4 + 8, b"mamba");
    match LoadedModel::open(&file).unwrap_err() {
        ModelError::UnknownArchitecture { found, known, .. } => {
            assert_eq!(
                (found.as_str(), known.as_str()),
                ("mamba", "llama, qwen2, qwen3, gemma, gemma2, gemma3, phi3")
            )
        }
        other => panic!("{other}"),
    }
}

#[test]
fn another_version_or_byte_order_of_gguf_is_unsupported_and_not_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.gguf");
    for version in [1u32.to_le_bytes(), 4u32.to_le_bytes(), 3u32.to_be_bytes()] {
        std::fs::write(&file, [b"GGUF".as_slice(), &version, &[0; 64]].concat()).unwrap();
        let error = LoadedModel::open(&file).unwrap_err();
        assert!(matches!(error, ModelError::Unsupported { .. }), "{error}");
    }
}

#[test]
fn a_folder_without_a_model_and_one_with_two_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let config = tiny_config();
    let open = || LoadedModel::open(dir.path()).unwrap_err();
    assert!(matches!(open(), ModelError::Missing { .. }), "{}", open());
    for name in ["a.gguf", "b.gguf"] {
        write_gguf(&dir.path().join(name), &config, &weights(&config, 1), Dtype::F32);
    }
    assert!(matches!(open(), ModelError::InvalidRequest { .. }), "{}", open());
    assert!(open().to_string().contains("has 2 .gguf files: name one of them"));

    write_folder(dir.path(), &config, &weights(&config, 1), Dtype::F32);
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    assert!(matches!(open(), ModelError::Missing { .. }), "{}", open());
}

#[test]
fn an_end_token_that_the_model_does_not_have_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = tiny_config();
    write_folder(dir.path(), &config, &weights(&config, 1), Dtype::F32);
    let file = dir.path().join("generation_config.json");
    std::fs::write(&file, json!({"eos_token_id": [258, 259]}).to_string()).unwrap();
    let error = LoadedModel::open(dir.path()).unwrap_err();
    assert!(matches!(error, ModelError::Malformed { .. }), "{error}");
    assert!(error.to_string().contains("token id 259 is outside"), "{error}");
}

#[test]
fn a_tokenizer_that_gguf_cannot_say_is_not_passed_off_as_another() {
    let dir = tempfile::tempdir().unwrap();
    let config = tiny_config();
    let file = dir.path().join("a.gguf");
    let mut sentence_piece = byte_tokenizer();
    sentence_piece["normalizer"] = json!({"type": "Prepend", "prepend": "x"});
    sentence_piece["pre_tokenizer"] = Value::Null;
    let mut lower_case = byte_tokenizer();
    lower_case["normalizer"] = json!({"type": "Lowercase"});
    let mut other_split = byte_tokenizer();
    other_split["pre_tokenizer"] = json!({"type": "Whitespace"});
    for tokenizer in [sentence_piece, lower_case, other_split] {
        write_gguf_with(&file, &config, &weights(&config, 1), &tokenizer, Dtype::F32).unwrap();
        let written = gguf::Gguf::open(&file).unwrap();
        assert_eq!(written.string("tokenizer.ggml.model"), Some("none"));
        assert_eq!(LoadedModel::open(&file).unwrap().tokenizer_json, tokenizer);
    }

    // A file of somebody else's has no whole tokenizer; one that does not name the split either could be read as anything.
    write_gguf(&file, &config, &weights(&config, 1), Dtype::F32);
    assert_eq!(
        gguf::Gguf::open(&file).unwrap().string("tokenizer.ggml.pre"),
        Some("gpt-2")
    );
    patch(&file, b"tokenizer.huggingface.json", 0, b"tokenizer.somebody");
    LoadedModel::open(&file).unwrap();
    patch(&file, b"tokenizer.ggml.pre", 0, b"tokenizer.ggml.not");
    let error = LoadedModel::open(&file).unwrap_err();
    assert!(matches!(error, ModelError::Unsupported { .. }), "{error}");
    assert!(
        error.to_string().contains("pre-tokenizer \"default\" is not known"),
        "{error}"
    );
}

#[test]
fn a_value_that_the_format_cannot_hold_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let config = tiny_config();
    let file = dir.path().join("a.gguf");
    let write = |value: f32, dtype: Dtype| {
        let mut weights = weights(&config, 1);
        weights.0.get_mut("lm_head.weight").unwrap().1[7] = value;
        write_gguf_with(&file, &config, &weights, &byte_tokenizer(), dtype)
    };
    write(65504.0, Dtype::F16).unwrap();
    let error = write(-70_000.0, Dtype::F16).unwrap_err();
    assert!(matches!(error, ModelError::InvalidRequest { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains("tensor lm_head.weight has the value -70000, and F16 ends at 65504"),
        "{error}"
    );
    write(-70_000.0, Dtype::Q8_0).unwrap();
    assert!(matches!(
        write(1e8, Dtype::Q8_0),
        Err(ModelError::InvalidRequest { .. })
    ));
    assert!(matches!(
        write(f32::NAN, Dtype::Q8_0),
        Err(ModelError::Malformed { .. })
    ));
}

/// SentencePiece's BPE as Llama 2, Mistral and Phi-3 have it: byte tokens, "▁" for a space, special tokens among the others.
fn sentence_piece(prefix: bool) -> Value {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    let pairs = [
        ("▁", "t"),
        ("h", "e"),
        ("▁t", "he"),
        ("▁the", "s"),
        ("s", ">"),
        ("<", "s>"),
        ("▁", "▁"),
        ("l", "l"),
        ("e", "ll"),
    ];
    let characters = ["▁", "t", "h", "e", "s", "<", "/", ">", "l", "o"];
    tokens.extend(characters.map(str::to_owned));
    // The pair "<" + "s>" makes a special token out of plain text: nobody's real merges do, and the guard holds even then.
    tokens.extend(
        pairs
            .iter()
            .map(|(a, b)| format!("{a}{b}"))
            .filter(|text| text != "<s>"),
    );
    let normalizer = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let special = |id: u32, text: &str| json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "pre_tokenizer": null, "post_processor": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": match prefix {
            true => json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, normalizer]}),
            false => normalizer,
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": tokens.iter().enumerate().map(|(id, text)| (text.clone(), json!(id))).collect::<Map<_, _>>(),
            "merges": pairs.map(|(a, b)| json!([a, b])),
        },
    })
}

#[test]
fn sentence_piece_reads_and_streams_alike_from_both_formats_and_keeps_its_special_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.gguf");
    for prefix in [true, false] {
        let json = sentence_piece(prefix);
        let config = ModelConfig {
            vocab_size: json["model"]["vocab"].as_object().unwrap().len(),
            bos: Some(1),
            eos: vec![2],
            ..tiny_config()
        };
        write_gguf_with(&file, &config, &weights(&config, 1), &json, Dtype::F32).unwrap();
        assert_eq!(
            gguf::Gguf::open(&file).unwrap().string("tokenizer.ggml.model"),
            Some("llama")
        );
        // A file of somebody else's has the lists only.
        patch(&file, b"tokenizer.huggingface.json", 0, b"tokenizer.somebody");
        let read = LoadedModel::open(&file).unwrap().vocabulary;
        let whole = Vocabulary::from_json(&json).unwrap();
        for text in ["the cells", " the  these\nö🎭", "hello <s>x</s> the", "", "the"] {
            let ids = whole.encode_literal(text).unwrap();
            assert_eq!(
                read.encode(text, false).unwrap(),
                whole.encode(text, false).unwrap(),
                "{text:?}"
            );
            assert!(!ids.iter().any(|id| whole.is_special(*id)), "{text:?}: {ids:?}");
            assert!(!read.encode_literal(text).unwrap().iter().any(|id| read.is_special(*id)));
            assert_eq!(whole.decode(&ids, true).unwrap(), text, "{ids:?}");
            // Streamed after a prompt, nothing is lost between the two: neither a space nor part of a character.
            for split in 0..ids.len() {
                let prompt = whole.decode(&ids[..split], true).unwrap();
                if prompt.ends_with('\u{FFFD}') {
                    continue;
                }
                let mut stream = TokenText::default().after(&whole, ids[..split].last().copied());
                let mut answer = String::new();
                for id in &ids[split..] {
                    answer += &stream.push(&whole, *id).unwrap();
                }
                answer += &stream.finish(&whole).unwrap();
                assert_eq!(prompt + &answer, text, "{ids:?} at {split}");
            }
        }
        let the = whole.encode("the", false).unwrap();
        let shown: String = the.iter().map(|id| whole.token_text(*id)).collect();
        assert_eq!(shown.trim_start(), "the");
    }
}

fn ids(template: &ChatTemplate, vocabulary: &Vocabulary, messages: &Value, opens_turn: bool) -> Vec<u32> {
    let messages = messages.as_array().unwrap();
    let rendered = template
        .render(vocabulary, messages, None, opens_turn, &Map::new())
        .unwrap();
    vocabulary.encode_rendered(&rendered).unwrap()
}

#[test]
fn a_quoted_special_token_changes_no_other_token_of_the_template() {
    let mut json = byte_tokenizer();
    let think = json!({"id": 259, "content": "<think>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": false});
    json["added_tokens"].as_array_mut().unwrap().push(think);
    let vocabulary = Vocabulary::from_json(&json).unwrap();
    let template = ChatTemplate::from_source("{{ messages[0].content }}<|im_end|><think>", None, None).unwrap();
    assert_eq!(
        ids(&template, &vocabulary, &json!([{"content": "a"}]), false),
        [97, 258, 259]
    );
    let quoted = ids(&template, &vocabulary, &json!([{"content": "<|im_end|>"}]), false);
    let text: Vec<u32> = "<|im_end|>".bytes().map(u32::from).collect();
    assert_eq!(quoted, [text.as_slice(), &[258, 259]].concat());
    // As HF with `encode_special_tokens`: only special tokens are plain text.
    let literal = vocabulary.encode_literal("<|im_end|><think>").unwrap();
    assert_eq!(literal, [text.as_slice(), &[259]].concat());

    // Mistral 0.3: only the beginning of the whole text begins as if a space stood before it.
    let mut json = sentence_piece(true);
    json["normalizer"] = Value::Null;
    json["pre_tokenizer"] = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    let vocabulary = Vocabulary::from_json(&json).unwrap();
    let template = ChatTemplate::from_source("{{ messages[0].content }}</s>the", None, None).unwrap();
    let [plain, quoted] = ["o", "</s>o"].map(|text| ids(&template, &vocabulary, &json!([{"content": text}]), false));
    let end = |ids: &[u32]| ids.iter().skip_while(|id| **id != 2).copied().collect::<Vec<u32>>();
    assert_eq!(end(&quoted), end(&plain));
    assert_eq!(end(&plain).len(), 3, "{plain:?}");
}

#[test]
fn a_model_without_a_template_speaks_in_words_and_only_the_template_ends_a_turn() {
    let dir = tempfile::tempdir().unwrap();
    // As the pretrain stage publishes it: one token opens and ends a text.
    let config = ModelConfig {
        bos: Some(256),
        eos: vec![256],
        ..tiny_config()
    };
    write_folder(dir.path(), &config, &weights(&config, 1), Dtype::F32);
    std::fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    let model = LoadedModel::open(dir.path()).unwrap();
    let (template, vocabulary) = (model.plain_template().unwrap(), &model.vocabulary);
    let asked = json!([{"role": "user", "content": " Is <|endoftext|> the end?\n"}]);
    let answered = json!([asked[0], {"role": "assistant", "content": "\nYes."}]);
    let prompt = ids(&template, vocabulary, &asked, true);
    let whole = ids(&template, vocabulary, &answered, false);
    let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<u32>>();
    let question = bytes("User:\nIs <|endoftext|> the end?\n\nAssistant:\n");
    assert_eq!(prompt, [&[256], question.as_slice()].concat());
    assert_eq!(
        whole,
        [prompt.as_slice(), &bytes("Yes."), &[256], &bytes("\n\n")].concat()
    );

    // What is published with the template renders alike, with the names that the published folder gives its tokens.
    std::fs::write(dir.path().join("chat_template.jinja"), template.source()).unwrap();
    let published = LoadedModel::open(dir.path()).unwrap().chat_template.unwrap();
    assert_eq!(ids(&published, vocabulary, &answered, false), whole);

    // Without a special token that ends a text, an answer's end would be text like any other.
    std::fs::write(
        dir.path().join("generation_config.json"),
        json!({"eos_token_id": 10}).to_string(),
    )
    .unwrap();
    let error = LoadedModel::open(dir.path()).unwrap().plain_template().unwrap_err();
    assert!(matches!(error, ModelError::InvalidRequest { .. }), "{error}");
}

#[test]
fn a_shard_name_cannot_lead_out_of_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let config = tiny_config();
    write_folder(dir.path(), &config, &weights(&config, 1), Dtype::F32);
    std::fs::rename(dir.path().join("model.safetensors"), dir.path().join("a.safetensors")).unwrap();
    let index = dir.path().join("model.safetensors.index.json");
    let map = |file: &str| json!({"weight_map": tensors(&config).into_iter().map(|tensor| (tensor.name, json!(file))).collect::<serde_json::Map<_, _>>()});
    std::fs::write(&index, map("a.safetensors").to_string()).unwrap();
    LoadedModel::open(dir.path()).unwrap();
    std::fs::write(&index, map("../a.safetensors").to_string()).unwrap();
    assert!(
        LoadedModel::open(dir.path())
            .unwrap_err()
            .to_string()
            .contains("not the name of a file in this folder")
    );
}

/// A GGUF and a safetensors file as small as they get.
fn small_files() -> (Vec<u8>, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let config = ModelConfig {
        hidden_size: 32,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        intermediate_size: 32,
        ..tiny_config()
    };
    let weights = weights(&config, 3);
    write_gguf(&dir.path().join("m.gguf"), &config, &weights, Dtype::Q8_0);
    write_folder(dir.path(), &config, &weights, Dtype::F16);
    (
        std::fs::read(dir.path().join("m.gguf")).unwrap(),
        std::fs::read(dir.path().join("model.safetensors")).unwrap(),
    )
}

#[test]
fn a_truncated_file_is_refused_at_every_length() {
    let (gguf_bytes, safetensors_bytes) = small_files();
    let dir = tempfile::tempdir().unwrap();
    let (gguf_path, safetensors_path) = (dir.path().join("t.gguf"), dir.path().join("t.safetensors"));
    for share in 0..60 {
        let length = gguf_bytes.len() * share / 60;
        std::fs::write(&gguf_path, &gguf_bytes[..length]).unwrap();
        assert!(gguf::open(&gguf_path).is_err(), "{length} bytes");
        let length = safetensors_bytes.len() * share / 60;
        std::fs::write(&safetensors_path, &safetensors_bytes[..length]).unwrap();
        assert!(hf::Safetensors::open_file(&safetensors_path).is_err(), "{length} bytes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn a_corrupted_header_never_panics(places in prop::collection::vec((0usize..6000, any::<u8>()), 1..8), huge in prop::option::of(0usize..6000)) {
        static FILES: std::sync::OnceLock<(Vec<u8>, Vec<u8>)> = std::sync::OnceLock::new();
        let (gguf_bytes, safetensors_bytes) = FILES.get_or_init(small_files);
        let dir = tempfile::tempdir().unwrap();
        for (source, name) in [(gguf_bytes, "f.gguf"), (safetensors_bytes, "f.safetensors")] {
            let mut bytes = source.clone();
            for (at, byte) in &places {
                let at = at % bytes.len();
                bytes[at] = *byte;
            }
            if let Some(at) = huge {
                let at = at % (bytes.len() - 8);
                bytes[at..at + 8].fill(0xFF);
            }
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            if name == "f.gguf" {
                if let Ok(model) = LoadedModel::open(&path) {
                    for tensor in tensors(&model.config) {
                        let _ = model.weights.f32(&tensor.name);
                    }
                }
            } else if let Ok(weights) = hf::Safetensors::open_file(&path) {
                for name in weights.names() {
                    let _ = weights.f32(name);
                }
            }
        }
    }
}

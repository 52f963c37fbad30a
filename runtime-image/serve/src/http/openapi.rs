//! The OpenAPI document, from the table of routes and one table of fields for each body.

use std::sync::LazyLock;

use axum::Json;
use serde_json::{Map, Value, json};

use super::auth::OPEN;
use super::routes::{Route, table};

/// A field of a body: its name, its JSON schema, and what it is.
type Field = (&'static str, Kind, &'static str);

/// The JSON type of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Flag,
    Integer,
    Number,
    List,
    Object,
    /// A text or a list of texts.
    Texts,
    /// A text, texts, token ids, or lists of them.
    Prompt,
    /// A text or a list of objects.
    Items,
    /// A text or an object.
    Choice,
}

use Kind::{Choice, Flag, Integer, Items, List, Number, Object, Prompt, Text, Texts};

/// A request's body: its name, the field that it must have, and all fields that the server acts on.
pub(super) struct Body {
    name: &'static str,
    required: &'static [&'static str],
    fields: &'static [&'static [Field]],
}

/// What chat and plain completions share.
const OPTIONS: &[Field] = &[
    ("n", Integer, "How many answers to give"),
    ("model", Text, "The model; by default the one that is served"),
    ("max_tokens", Integer, "The most tokens to generate"),
    (
        "temperature",
        Number,
        "How freely tokens are drawn; 0 takes the most likely",
    ),
    (
        "top_p",
        Number,
        "Draw from the most likely tokens with this share of the probability",
    ),
    (
        "top_k",
        Integer,
        "Draw from that many of the most likely tokens; 0 and -1: from all",
    ),
    (
        "min_p",
        Number,
        "Draw from tokens with at least this share of the most likely one's probability",
    ),
    ("seed", Integer, "The same seed draws the same tokens"),
    ("stop", Texts, "Texts that end the answer"),
    ("stop_token_ids", List, "Tokens that end the answer"),
    (
        "include_stop_str_in_output",
        Flag,
        "What ended the answer is part of it",
    ),
    ("skip_special_tokens", Flag, "Special tokens are no part of the text"),
    ("min_tokens", Integer, "Before that many tokens nothing ends the answer"),
    ("ignore_eos", Flag, "The model's end tokens do not end the answer"),
    (
        "presence_penalty",
        Number,
        "Taken from the logits of tokens that were generated",
    ),
    (
        "frequency_penalty",
        Number,
        "Taken from them for each time that they were",
    ),
    (
        "repetition_penalty",
        Number,
        "Divides the logits of tokens that are in prompt or answer",
    ),
    ("logit_bias", Object, "From token ids to what is added to their logits"),
    ("user", Text, "Who asks: each shares the server fairly"),
    ("priority", Integer, "Lower goes first"),
    (
        "cache_salt",
        Text,
        "Prompts share computed beginnings only with those of the same salt",
    ),
    ("stream", Flag, "Send the answer as server-sent events"),
    ("stream_options", Object, "include_usage: end the stream with the usage"),
    ("response_format", Object, "text, json_object or json_schema"),
    (
        "structured_outputs",
        Object,
        "vLLM's json, json_object, regex, choice or grammar",
    ),
];

pub(super) const CHAT: Body = Body {
    name: "ChatCompletionRequest",
    required: &["messages"],
    fields: &[
        OPTIONS,
        &[
            ("messages", List, "The conversation"),
            ("tools", List, "Functions that the model may call"),
            ("tool_choice", Choice, "auto, none, required, or which function"),
            (
                "parallel_tool_calls",
                Flag,
                "Several calls in one answer (default true)",
            ),
            (
                "max_completion_tokens",
                Integer,
                "The most tokens to generate; before max_tokens",
            ),
            ("logprobs", Flag, "Report each token's log-probability"),
            ("top_logprobs", Integer, "And those of that many alternatives"),
            ("chat_template_kwargs", Object, "More arguments of the chat template"),
        ],
    ],
};

pub(super) const COMPLETION: Body = Body {
    name: "CompletionRequest",
    required: &["prompt"],
    fields: &[
        OPTIONS,
        &[
            ("prompt", Prompt, "What is continued"),
            ("echo", Flag, "Put the prompt before the answer"),
            (
                "best_of",
                Integer,
                "Generate that many answers, and give the n likeliest of them",
            ),
            (
                "logprobs",
                Integer,
                "Report each token's log-probability and those of that many alternatives",
            ),
            (
                "add_special_tokens",
                Flag,
                "Put around the prompt what the tokenizer does",
            ),
        ],
    ],
};

pub(super) const RESPONSE: Body = Body {
    name: "ResponseRequest",
    required: &["input"],
    fields: &[&[
        ("model", Text, "The model; by default the one that is served"),
        ("input", Items, "A text, or the items of the conversation"),
        ("instructions", Text, "What the model is told before the conversation"),
        ("max_output_tokens", Integer, "The most tokens to generate"),
        (
            "temperature",
            Number,
            "How freely tokens are drawn; 0 takes the most likely",
        ),
        (
            "top_p",
            Number,
            "Draw from the most likely tokens with this share of the probability",
        ),
        ("text", Object, "format: text, json_object or json_schema"),
        ("stream", Flag, "Send the answer as server-sent events"),
        ("store", Flag, "Keep the response for a while (default true)"),
        ("tools", List, "Functions that the model may call"),
        ("tool_choice", Choice, "auto, none, required, or which function"),
        (
            "parallel_tool_calls",
            Flag,
            "Several calls in one answer (default true)",
        ),
        ("previous_response_id", Text, "Go on from this response"),
        ("metadata", Object, "Repeated in the response"),
    ]],
};

pub(super) const EMBEDDING: Body = Body {
    name: "EmbeddingRequest",
    required: &["input"],
    fields: &[&[
        ("model", Text, "The model; by default the one that is served"),
        ("input", Prompt, "The texts"),
        ("encoding_format", Text, "float or base64"),
        ("dimensions", Integer, "The model's own number, or nothing"),
    ]],
};

pub(super) const TOKENIZE: Body = Body {
    name: "TokenizeRequest",
    required: &[],
    fields: &[&[
        ("model", Text, "The model; by default the one that is served"),
        ("prompt", Text, "A text"),
        ("messages", List, "Or a conversation"),
        (
            "add_special_tokens",
            Flag,
            "Put around the text what the tokenizer does",
        ),
        (
            "add_generation_prompt",
            Flag,
            "End the conversation with the beginning of an answer",
        ),
        ("return_token_strs", Flag, "Also the tokens' texts"),
    ]],
};

pub(super) const DETOKENIZE: Body = Body {
    name: "DetokenizeRequest",
    required: &["tokens"],
    fields: &[&[
        ("model", Text, "The model; by default the one that is served"),
        ("tokens", List, "Token ids"),
    ]],
};

impl Kind {
    fn schema(self) -> Value {
        let kind = |name: &str| json!({ "type": name });
        let strings = json!({ "type": "array", "items": { "type": "string" } });
        match self {
            Text => kind("string"),
            Flag => kind("boolean"),
            Integer => kind("integer"),
            Number => kind("number"),
            List => json!({ "type": "array", "items": {} }),
            Object => kind("object"),
            Texts => json!({ "oneOf": [kind("string"), strings] }),
            Prompt => {
                let tokens = json!({ "type": "array", "items": { "type": "integer" } });
                json!({ "oneOf": [kind("string"), strings, tokens.clone(), { "type": "array", "items": tokens }] })
            }
            Choice => json!({ "oneOf": [kind("string"), kind("object")] }),
            Items => json!({ "oneOf": [kind("string"), { "type": "array", "items": { "type": "object" } }] }),
        }
    }
}

impl Body {
    fn schema(&self) -> Value {
        let fields = self.fields.iter().flat_map(|fields| fields.iter());
        let properties: Map<String, Value> = fields
            .map(|(name, kind, what)| {
                let mut schema = kind.schema();
                schema["description"] = json!(what);
                ((*name).to_owned(), schema)
            })
            .collect();
        json!({ "type": "object", "required": self.required, "properties": properties })
    }
}

static DOCUMENT: LazyLock<Value> = LazyLock::new(|| document(&table()));

/// `GET /openapi.json`
pub(super) async fn serve() -> Json<&'static Value> {
    Json(&DOCUMENT)
}

fn document(routes: &[Route]) -> Value {
    let (mut paths, mut schemas) = (Map::new(), Map::new());
    for route in routes {
        for path in route.paths() {
            let mut item = Map::new();
            for operation in &route.operations {
                let mut described = json!({
                    "summary": operation.summary,
                    "responses": {
                        "200": { "description": "As asked for" },
                        "default": { "$ref": "#/components/responses/Error" },
                    },
                });
                if OPEN.contains(&path.as_str()) {
                    described["security"] = json!([]);
                }
                if let Some(body) = operation.body {
                    schemas.entry(body.name).or_insert_with(|| body.schema());
                    let schema = json!({ "$ref": format!("#/components/schemas/{}", body.name) });
                    described["requestBody"] =
                        json!({ "required": true, "content": { "application/json": { "schema": schema } } });
                }
                item.insert(operation.method.to_owned(), described);
            }
            let names = path.split('{').skip(1).filter_map(|rest| rest.split('}').next());
            let parameters: Vec<Value> = names
                .map(|name| {
                    let name = name.trim_start_matches('*');
                    json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } })
                })
                .collect();
            if !parameters.is_empty() {
                item.insert("parameters".to_owned(), json!(parameters));
            }
            paths.insert(path.replace("{*", "{"), Value::Object(item));
        }
    }
    let text = json!({ "type": ["string", "null"] });
    let error = json!({
        "type": "object", "required": ["error"],
        "properties": { "error": {
            "type": "object", "required": ["message", "type", "param", "code"],
            "properties": { "message": { "type": "string" }, "type": { "type": "string" }, "param": text.clone(), "code": text },
        } },
    });
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Strata", "version": env!("CARGO_PKG_VERSION"),
            "description": "The API of OpenAI and Azure OpenAI, with vLLM's additions.",
        },
        "security": [{ "bearer": [] }, { "key": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer" },
                "key": { "type": "apiKey", "in": "header", "name": "api-key" },
            },
            "responses": { "Error": {
                "description": "What is wrong, and with which field",
                "content": { "application/json": { "schema": error } },
            } },
            "schemas": schemas,
        },
    })
}

//! The OpenAPI document says what the server does.

use reqwest::StatusCode;
use serde_json::{Value, json};
use strata_model::bert::synthetic;

use super::Running;

/// A value that a field of this schema cannot have.
fn wrong(schema: &Value) -> Value {
    match schema["type"].as_str() {
        Some("object" | "array") => json!(true),
        None => json!(7),
        _ => json!({ "not": "this" }),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_documented_path_answers_and_every_documented_field_is_read() {
    let folder = tempfile::tempdir().unwrap();
    synthetic::write(folder.path()).unwrap();
    let encoder = Running::begin_in(folder, "").await;
    encoder
        .until("it is ready", async || encoder.get("/ready").await.0 == StatusCode::OK)
        .await;
    let server = Running::start("--max-model-len 256").await;
    let document: Value = serde_json::from_str(&server.get("/openapi.json").await.1).unwrap();
    assert_eq!(document["openapi"], "3.1.0");
    let mut fields = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        let url = path.replace("{name}", "tiny").replace("{id}", "tiny");
        if item.get("get").is_some() {
            let (status, answer) = server.get(&url).await;
            let stored = url.contains("/responses/tiny");
            assert_eq!(status == StatusCode::OK, !stored, "{path}: {answer}");
        }
        let Some(reference) = item["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].as_str()
        else {
            continue;
        };
        let schema = document.pointer(reference.trim_start_matches('#')).unwrap();
        let server = if path.ends_with("/embeddings") {
            &encoder
        } else {
            &server
        };
        let needed = |field: &str| match field {
            "messages" => json!([{ "role": "user", "content": "x" }]),
            "tokens" => json!([97]),
            _ => json!("x"),
        };
        let required = schema["required"].as_array().unwrap().iter().filter_map(Value::as_str);
        let mut whole: Value = required.map(|field| (field.to_owned(), needed(field))).collect();
        if path == "/tokenize" {
            whole["prompt"] = json!("x");
        }
        let ask = async |body: &Value| server.post(&url, body.to_string()).await;
        let (status, answer) = ask(&whole).await;
        assert_eq!(status, StatusCode::OK, "{path} with {whole}: {answer}");
        for (field, schema) in schema["properties"].as_object().unwrap() {
            let mut body = whole.clone();
            body[field] = wrong(schema);
            let (status, answer) = ask(&body).await;
            // Under a deployment the body's model is not looked at: the path has it.
            let expected = match field == "model" && path.contains("/deployments/") {
                true => StatusCode::OK,
                false => StatusCode::BAD_REQUEST,
            };
            assert_eq!(status, expected, "{path} with {body}: {answer}");
            fields += 1;
        }
        if let Some(first) = schema["required"][0].as_str() {
            let mut body = whole.clone();
            body.as_object_mut().unwrap().remove(first);
            assert_eq!(ask(&body).await.0, StatusCode::BAD_REQUEST, "{path} without {first}");
        }
    }
    assert!(fields > 100, "{fields}");
    server.stop().await;
    encoder.stop().await;
}

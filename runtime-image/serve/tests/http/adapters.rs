//! LoRA adapters over HTTP: chosen by name, loaded and unloaded while the server runs.

use super::*;
use crate::peft;

fn folders(count: u64) -> Vec<tempfile::TempDir> {
    let config = ModelConfig {
        max_positions: 2048,
        ..tiny_config()
    };
    let folder = |seed| {
        let folder = tempfile::tempdir().unwrap();
        peft::write(folder.path(), &config, seed, 4, "all");
        folder
    };
    (1..=count).map(folder).collect()
}

impl Running {
    async fn text(&self, model: &str) -> String {
        let (status, body) = self
            .post(
                "/v1/chat/completions",
                chat("tell me", json!({ "model": model })).to_string(),
            )
            .await;
        assert_eq!(status, StatusCode::OK, "{body}");
        assert_eq!(body["model"], model);
        body["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    }

    /// Status and text of a request to load or unload.
    async fn lora(&self, path: &str, body: Value) -> (StatusCode, String) {
        let response = self.stream(path, body).await;
        (response.status(), response.text().await.unwrap())
    }

    async fn names(&self) -> Vec<(String, Value)> {
        let models: Value = serde_json::from_str(&self.get("/v1/models").await.1).unwrap();
        let models = models["data"].as_array().unwrap();
        models
            .iter()
            .map(|model| (model["id"].as_str().unwrap().to_owned(), model["parent"].clone()))
            .collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_chooses_its_adapter_and_gets_the_same_answer_among_others_and_from_the_prefix_cache() {
    let folders = folders(2);
    let modules = format!(
        "one={} two={}",
        folders[0].path().display(),
        folders[1].path().display()
    );
    let server = Running::start(&format!(
        "--enable-prefix-caching --block-size 4 --enable-lora --lora-modules {modules}"
    ))
    .await;
    let names = server.names().await;
    assert!(names.contains(&("tiny".to_owned(), Value::Null)), "{names:?}");
    assert!(names.contains(&("one".to_owned(), json!("tiny"))), "{names:?}");

    let (base, one, two) = (
        server.text("tiny").await,
        server.text("one").await,
        server.text("two").await,
    );
    assert!(base != one && one != two && base != two, "{base:?} {one:?} {two:?}");
    // All at once, their prompts now in the prefix cache under three salts.
    let again = tokio::join!(
        server.text("one"),
        server.text("tiny"),
        server.text("two"),
        server.text("one")
    );
    assert_eq!(again, (one.clone(), base, two, one));
    // On Azure's paths an adapter is a deployment.
    let body = chat("tell me", json!({ "model": "gpt-4o" })).to_string();
    let (_, azure) = server.post("/openai/deployments/one/chat/completions", body).await;
    assert_eq!(azure["model"], "one", "{azure}");
    let info = server.get("/metrics").await.1;
    let shown = |line: &str| line.starts_with("vllm:lora_requests_info{") && line.contains("max_lora=\"8\"");
    assert!(info.lines().any(shown), "{info}");
    // Without the flag the endpoints do not exist.
    let (status, _) = server
        .lora("/v1/unload_lora_adapter", json!({ "lora_name": "one" }))
        .await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_that_is_unloaded_finishes_what_runs_with_it_and_its_place_is_free_after() {
    let folders = folders(2);
    let server = Running::start_long("--enable-lora --enable-lora-updates --max-loras 1").await;
    let load = |name: &str, i: usize| json!({ "lora_name": name, "lora_path": folders[i].path() });
    assert_eq!(
        server.lora("/v1/load_lora_adapter", load("one", 0)).await,
        (
            StatusCode::OK,
            "Success: LoRA adapter 'one' added successfully.".to_owned()
        )
    );
    let one = server.text("one").await;
    let (status, text) = server.lora("/v1/load_lora_adapter", load("one", 0)).await;
    assert!(status == StatusCode::BAD_REQUEST && text.contains("is taken"), "{text}");

    let mut body = endless();
    body["model"] = json!("one");
    let mut running = server.stream("/v1/chat/completions", body).await;
    running.chunk().await.unwrap().unwrap();
    let unload = json!({ "lora_name": "one" });
    let (status, text) = server.lora("/v1/unload_lora_adapter", unload.clone()).await;
    assert_eq!((status, text.contains("removed")), (StatusCode::OK, true), "{text}");
    assert_eq!(
        server.lora("/v1/unload_lora_adapter", unload).await.0,
        StatusCode::NOT_FOUND
    );
    let gone = chat("x", json!({ "model": "one" })).to_string();
    assert_eq!(server.post("/v1/chat/completions", gone).await.0, StatusCode::NOT_FOUND);
    // The request goes on; until it ends, its adapter is in memory.
    running.chunk().await.unwrap().unwrap();
    let (status, text) = server.lora("/v1/load_lora_adapter", load("two", 1)).await;
    assert!(
        status == StatusCode::TOO_MANY_REQUESTS && text.contains("--max-loras"),
        "{text}"
    );
    drop(running);
    server
        .until("the place is free", async || {
            server.lora("/v1/load_lora_adapter", load("two", 1)).await.0 == StatusCode::OK
        })
        .await;
    assert_ne!(server.text("two").await, one);
    server.stop().await;
}

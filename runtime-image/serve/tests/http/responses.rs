//! `/v1/responses`: the same answers as chat completions, as items and events.

use reqwest::StatusCode;
use serde_json::{Value, json};

use super::{Running, chat};

fn body(input: Value, more: Value) -> Value {
    let mut body =
        json!({ "model": "tiny", "input": input, "temperature": 0, "max_output_tokens": 24, "ignore_eos": true });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// The events of a stream, each named as its type.
fn events(text: &str) -> Vec<Value> {
    let event = |block: &str| {
        let (name, data) = block.split_once('\n').unwrap();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(name.strip_prefix("event: "), data["type"].as_str(), "{block}");
        data
    };
    text.split("\n\n")
        .filter(|block| !block.is_empty())
        .map(event)
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_response_says_what_a_chat_says_whole_streamed_and_continued() {
    let server = Running::start("--max-model-len 1024").await;
    let post = async |body: Value| {
        let (status, answer) = server.post("/v1/responses", body.to_string()).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    };
    let text = |response: &Value| response["output"][0]["content"][0]["text"].as_str().unwrap().to_owned();
    let said = async |messages: Value| {
        let more = json!({ "messages": messages });
        let answer = server.post("/v1/chat/completions", chat("", more).to_string()).await.1;
        answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    let user = |content: &str| json!({ "role": "user", "content": content });
    let first = post(body(json!("Hi"), json!({ "metadata": { "a": "b" } }))).await;
    assert_eq!(text(&first), said(json!([user("Hi")])).await);
    assert_eq!(
        (
            &first["object"],
            &first["status"],
            &first["incomplete_details"]["reason"]
        ),
        (&json!("response"), &json!("incomplete"), &json!("max_output_tokens"))
    );
    assert_eq!(
        (&first["metadata"]["a"], &first["usage"]["output_tokens"]),
        (&json!("b"), &json!(24))
    );

    // Streamed, with instructions; the events tell the same story as the response at their end.
    let request = body(
        json!([{ "role": "user", "content": [{ "type": "input_text", "text": "Hi" }] }]),
        json!({ "stream": true, "instructions": "Be brief." }),
    );
    let stream = server
        .stream("/openai/v1/responses", request)
        .await
        .text()
        .await
        .unwrap();
    let all = events(&stream);
    let kinds: Vec<&str> = all.iter().map(|event| event["type"].as_str().unwrap()).collect();
    let mut story = kinds.clone();
    story.dedup();
    assert_eq!(
        story,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete"
        ]
    );
    assert!(all.iter().enumerate().all(|(i, event)| event["sequence_number"] == i));
    let deltas: String = all.iter().filter_map(|event| event["delta"].as_str()).collect();
    let last = &all.last().unwrap()["response"];
    assert_eq!(deltas, text(last));
    let system = json!({ "role": "system", "content": "Be brief." });
    assert_eq!(deltas, said(json!([system, user("Hi")])).await);

    // Going on from it: what was said is there, the instructions are not.
    let next = post(body(json!("And?"), json!({ "previous_response_id": last["id"] }))).await;
    let turns = json!([user("Hi"), { "role": "assistant", "content": deltas }, user("And?")]);
    assert_eq!(text(&next), said(turns).await);

    // Stored until it is deleted, unless it is not to be.
    let url = format!("/v1/responses/{}", first["id"].as_str().unwrap());
    assert_eq!(serde_json::from_str::<Value>(&server.get(&url).await.1).unwrap(), first);
    let deleted = server
        .client
        .delete(format!("{}{url}", server.url))
        .send()
        .await
        .unwrap();
    assert_eq!(deleted.json::<Value>().await.unwrap()["deleted"], true);
    let unstored = post(body(json!("Hi"), json!({ "store": false }))).await;
    for id in [&first["id"], &unstored["id"]] {
        let (status, answer) = server.get(&format!("/v1/responses/{}", id.as_str().unwrap())).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{answer}");
        let more = json!({ "previous_response_id": id });
        let (status, answer) = server.post("/v1/responses", body(json!("x"), more).to_string()).await;
        assert_eq!(
            (status.as_u16(), &answer["error"]["param"]),
            (404, &json!("previous_response_id"))
        );
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_is_an_item_of_its_own_and_its_result_goes_on_from_it() {
    let server = Running::start("--max-model-len 1024").await;
    let parameters =
        json!({ "type": "object", "properties": { "city": { "enum": ["Rome", "Bern"] } }, "required": ["city"] });
    let tools =
        json!([{ "type": "function", "name": "weather", "description": "Of a city", "parameters": parameters }]);
    let ask = json!({ "tools": tools, "tool_choice": { "type": "function", "name": "weather" }, "max_output_tokens": 400,
        "parallel_tool_calls": false, "ignore_eos": false });
    let (status, whole) = server
        .post("/v1/responses", body(json!("Rain?"), ask.clone()).to_string())
        .await;
    assert_eq!(status, StatusCode::OK, "{whole}");
    assert_eq!(whole["status"], "completed", "{whole}");
    let call = &whole["output"][0];
    assert_eq!(
        (&call["type"], &call["name"]),
        (&json!("function_call"), &json!("weather")),
        "{whole}"
    );
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!(
        ["Rome", "Bern"].iter().any(|city| arguments["city"] == *city),
        "{arguments}"
    );

    let mut streamed = ask;
    streamed["stream"] = json!(true);
    let stream = server
        .stream("/v1/responses", body(json!("Rain?"), streamed))
        .await
        .text()
        .await
        .unwrap();
    let all = events(&stream);
    let of = |kind: &str| -> Vec<&Value> { all.iter().filter(|event| event["type"] == kind).collect() };
    let deltas: String = of("response.function_call_arguments.delta")
        .iter()
        .filter_map(|event| event["delta"].as_str())
        .collect();
    assert_eq!(deltas, call["arguments"].as_str().unwrap());
    assert_eq!(
        of("response.function_call_arguments.done")[0]["arguments"],
        call["arguments"]
    );
    assert_eq!(of("response.output_item.done")[0]["item"]["name"], "weather");
    assert_eq!(of("response.completed").len(), 1);

    let result = json!([{ "type": "function_call_output", "call_id": call["call_id"], "output": "dry" }]);
    let more = json!({ "previous_response_id": whole["id"], "tools": tools, "max_output_tokens": 4 });
    let (status, next) = server.post("/v1/responses", body(result, more).to_string()).await;
    assert_eq!(status, StatusCode::OK, "{next}");
    let before = whole["usage"]["input_tokens"].as_u64().unwrap();
    assert!(
        next["usage"]["input_tokens"].as_u64().unwrap() > before + 10,
        "call and result are in the prompt: {next}"
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_request_for_a_response_is_told_its_own_field() {
    let server = Running::start("--max-model-len 128").await;
    let long = "x".repeat(200);
    for (input, more, param) in [
        (json!(long), json!({}), "input"),
        (json!([]), json!({}), "input"),
        (json!(7), json!({}), "input"),
        (json!([{ "type": "item_reference", "id": "x" }]), json!({}), "input"),
        (json!([{ "type": "computer_call" }]), json!({}), "input"),
        (
            json!([{ "role": "user", "content": [{ "type": "input_image" }] }]),
            json!({}),
            "input",
        ),
        (json!("x"), json!({ "max_output_tokens": 0 }), "max_output_tokens"),
        (json!("x"), json!({ "background": true }), "background"),
        (json!("x"), json!({ "n": 2 }), "n"),
        (json!("x"), json!({ "conversation": "conv_1" }), "conversation"),
        (json!("x"), json!({ "truncation": "auto" }), "truncation"),
        (json!("x"), json!({ "top_logprobs": 2 }), "include"),
        (json!("x"), json!({ "instructions": ["x"] }), "instructions"),
        (
            json!("x"),
            json!({ "reasoning": { "effort": "high" } }),
            "reasoning.effort",
        ),
        (json!("x"), json!({ "tools": [{ "type": "web_search" }] }), "tools"),
        (
            json!("x"),
            json!({ "text": { "format": { "type": "unheard" } } }),
            "text.format",
        ),
    ] {
        let (status, answer) = server
            .post("/v1/responses", body(input, more.clone()).to_string())
            .await;
        assert_eq!(
            (status.as_u16(), &answer["error"]["param"]),
            (400, &json!(param)),
            "{more}: {answer}"
        );
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_stored_response_answers_can_be_listed() {
    let server = Running::start("--max-model-len 1024").await;
    let post = async |input: &str, more: Value| {
        let (status, answer) = server.post("/v1/responses", body(json!(input), more).to_string()).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    };
    let first = post("One", json!({})).await;
    let second = post("Two", json!({ "previous_response_id": first["id"] })).await;
    let list = async |query: &str| {
        let path = format!("/v1/responses/{}/input_items{query}", second["id"].as_str().unwrap());
        let (status, text) = server.get(&path).await;
        (status, serde_json::from_str::<Value>(&text).unwrap())
    };
    let (status, all) = list("?order=asc").await;
    assert_eq!(status, StatusCode::OK, "{all}");
    let texts: Vec<&Value> = all["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| &item["content"][0]["text"])
        .collect();
    assert_eq!(
        texts,
        [&json!("One"), &first["output"][0]["content"][0]["text"], &json!("Two")]
    );
    let (_, newest) = list("?limit=1").await;
    assert_eq!(
        (&newest["data"][0]["content"][0]["text"], &newest["has_more"]),
        (&json!("Two"), &json!(true))
    );
    let (_, rest) = list(&format!("?after={}", newest["last_id"].as_str().unwrap())).await;
    assert_eq!(rest["data"].as_array().map(Vec::len), Some(2));
    for (query, param) in [
        ("?limit=0", "limit"),
        ("?limit=x", "limit"),
        ("?order=up", "order"),
        ("?after=x", "after"),
    ] {
        let (status, answer) = list(query).await;
        assert_eq!(
            (status.as_u16(), &answer["error"]["param"]),
            (400, &json!(param)),
            "{query}"
        );
    }
    assert_eq!(
        server.get("/v1/responses/resp_x/input_items").await.0,
        StatusCode::NOT_FOUND
    );
    server.stop().await;
}

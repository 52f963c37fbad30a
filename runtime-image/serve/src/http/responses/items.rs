//! `GET /v1/responses/{id}/input_items`: what a response answers, page by page.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State as Extract};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::error::ApiError;
use super::super::{Served, State, Task};
use super::unknown;

/// Items on a page, at most and where the client does not say.
const MAX_LIMIT: usize = 100;
const DEFAULT_LIMIT: usize = 20;

#[derive(Debug, Default, Deserialize)]
pub(in super::super) struct Page {
    limit: Option<usize>,
    order: Option<String>,
    after: Option<String>,
}

pub(in super::super) async fn list(
    Extract(state): Extract<Arc<State>>,
    Path(id): Path<String>,
    query: Result<Query<Page>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<Value>, ApiError> {
    let Query(query) = query.map_err(|error| ApiError::invalid("limit", error.body_text()))?;
    let inputs = Served::of(state.any()?)?.responses.inputs(&id);
    page(&id, inputs.ok_or_else(|| unknown(&id))?, &query).map(Json)
}

/// The items that were asked for: the newest first, unless the order says otherwise.
fn page(id: &str, inputs: Vec<Value>, query: &Page) -> Result<Value, ApiError> {
    let limit = query.limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        let message = format!("limit is {limit}; it must lie between 1 and {MAX_LIMIT}");
        return Err(ApiError::invalid("limit", message));
    }
    let mut items: Vec<Value> = inputs
        .into_iter()
        .enumerate()
        .map(|(i, item)| shown(id, i, item))
        .collect();
    match query.order.as_deref() {
        None | Some("desc") => items.reverse(),
        Some("asc") => (),
        Some(other) => {
            let message = format!("order is {other:?}; it must be asc or desc");
            return Err(ApiError::invalid("order", message));
        }
    }
    if let Some(after) = &query.after {
        let at = items.iter().position(|item| item["id"] == **after);
        let at = at.ok_or_else(|| ApiError::invalid("after", format!("the response has no item {after:?}")))?;
        items.drain(..=at);
    }
    let has_more = items.len() > limit;
    items.truncate(limit);
    let end = |item: Option<&Value>| item.map_or(Value::Null, |item| item["id"].clone());
    let (first, last) = (end(items.first()), end(items.last()));
    Ok(json!({ "object": "list", "data": items, "first_id": first, "last_id": last, "has_more": has_more }))
}

/// An item as it is listed: with an id and a type, and the content of messages as parts, whatever the client wrote.
fn shown(response: &str, index: usize, mut item: Value) -> Value {
    let Some(fields) = item.as_object_mut() else {
        return item;
    };
    let kind = fields.entry("type").or_insert_with(|| json!("message"));
    let prefix = match kind.as_str() {
        Some("function_call") => "fc",
        Some("function_call_output") => "fco",
        _ => "msg",
    };
    let response = response.trim_start_matches("resp_");
    fields
        .entry("id")
        .or_insert_with(|| json!(format!("{prefix}_{response}_{index}")));
    let mut part = match fields.get("role").and_then(Value::as_str) {
        Some("assistant") => json!({ "type": "output_text", "annotations": [] }),
        _ => json!({ "type": "input_text" }),
    };
    if let Some(content) = fields.get_mut("content")
        && content.is_string()
    {
        part["text"] = content.take();
        *content = json!([part]);
    }
    item
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_each_other_in_either_order_and_every_item_can_be_named() {
        let inputs = || {
            vec![
                json!({ "role": "user", "content": "a" }),
                json!({ "type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}" }),
                json!({ "type": "message", "role": "user", "content": [{ "type": "input_text", "text": "b" }] }),
            ]
        };
        let page = |limit, order: &str, after: Option<&str>| {
            let (order, after) = (Some(order.to_owned()), after.map(str::to_owned));
            page(
                "resp_7",
                inputs(),
                &Page {
                    limit: Some(limit),
                    order,
                    after,
                },
            )
        };
        let first = page(2, "asc", None).expect("a page");
        assert_eq!(
            first["data"][0]["content"],
            json!([{ "type": "input_text", "text": "a" }])
        );
        assert_eq!(
            (&first["first_id"], &first["last_id"]),
            (&json!("msg_7_0"), &json!("fc_1"))
        );
        assert_eq!(first["has_more"], true);
        let second = page(2, "asc", Some("fc_1")).expect("a page");
        assert_eq!(
            (second["data"].as_array().map(Vec::len), &second["has_more"]),
            (Some(1), &json!(false))
        );
        assert_eq!(page(1, "desc", None).expect("a page")["first_id"], second["last_id"]);
        for (limit, order, after) in [
            (0, "asc", None),
            (101, "asc", None),
            (1, "up", None),
            (1, "asc", Some("x")),
        ] {
            assert!(page(limit, order, after).is_err(), "{limit} {order} {after:?}");
        }
    }
}

//! vLLM's endpoints to load and unload LoRA adapters at run time. They read paths that a client names, so they exist only where
//! the operator of the server said so.

use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::State as Extract;
use serde::Deserialize;

use super::admit::Admitted;
use super::error::ApiError;
use super::{Served, State};
use crate::adapters::{AdapterError, Adapters};

#[derive(Deserialize)]
struct Load {
    lora_name: String,
    lora_path: PathBuf,
}

#[derive(Deserialize)]
struct Unload {
    lora_name: String,
}

/// `POST /v1/load_lora_adapter`
pub(super) async fn load(Extract(state): Extract<Arc<State>>, request: Admitted) -> Result<String, ApiError> {
    request.prepare(&state, loaded).await
}

/// `POST /v1/unload_lora_adapter`
pub(super) async fn unload(Extract(state): Extract<Arc<State>>, request: Admitted) -> Result<String, ApiError> {
    request.prepare(&state, unloaded).await
}

fn adapters(served: &Served) -> Result<&Adapters, ApiError> {
    match served.adapter_updates {
        true => Ok(&served.adapters),
        false => Err(ApiError::not_found(
            "adapters are not loaded over HTTP here: start the server with --enable-lora --enable-lora-updates"
                .to_owned(),
        )),
    }
}

fn loaded(served: &Served, request: Load) -> Result<String, ApiError> {
    let Load { lora_name, lora_path } = request;
    adapters(served)?.load(&lora_name, &lora_path).map_err(refused)?;
    Ok(format!("Success: LoRA adapter '{lora_name}' added successfully."))
}

fn unloaded(served: &Served, request: Unload) -> Result<String, ApiError> {
    let name = request.lora_name;
    adapters(served)?.unload(&name).map_err(refused)?;
    Ok(format!("Success: LoRA adapter '{name}' removed successfully."))
}

fn refused(error: AdapterError) -> ApiError {
    let message = error.to_string();
    match error {
        AdapterError::Unknown(_) => ApiError::not_found(message),
        AdapterError::Full(_) => ApiError::busy(message),
        AdapterError::Name(_) | AdapterError::Taken(_) => ApiError::invalid("lora_name", message),
        AdapterError::Model(_) => ApiError::invalid("lora_path", message),
    }
}

//! Errors in OpenAI's shape: `{"error": {message, type, param, code}}`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::engine::SubmitError;

/// Seconds after which a refused client may try again, where nothing better is known.
const RETRY_AFTER: u64 = 1;

/// An error for a client.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    /// Seconds after which a refused client may try again.
    retry_after: u64,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        ApiError {
            status,
            kind,
            message: message.into(),
            param: None,
            code: None,
            retry_after: RETRY_AFTER,
        }
    }

    /// The request is wrong; `param` names the field.
    pub(super) fn invalid(param: impl Into<Option<&'static str>>, message: impl Into<String>) -> Self {
        let param = param.into().map(str::to_owned);
        ApiError {
            param,
            ..Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
        }
    }

    /// More tokens than the model takes.
    pub(super) fn context_length(param: &'static str, message: String) -> Self {
        ApiError {
            code: Some("context_length_exceeded"),
            ..Self::invalid(param, message)
        }
    }

    /// A model that is not served here.
    pub(super) fn unknown_model(name: &str, served: &[String]) -> Self {
        let message = format!(
            "The model `{name}` does not exist; this server has {}.",
            served.join(", ")
        );
        let error = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
        ApiError {
            param: Some("model".to_owned()),
            code: Some("model_not_found"),
            ..error
        }
    }

    /// The model cannot do what is asked for.
    pub(super) fn wrong_task(name: &str, does: &str, instead: &str) -> Self {
        let message = format!("The model `{name}` {does}: use {instead}.");
        Self::invalid("model", message)
    }

    /// A deployment, as Azure calls a model in the path, that is not served here.
    pub(super) fn unknown_deployment(name: &str, served: &[String]) -> Self {
        let message = format!(
            "The API deployment `{name}` does not exist; this server has {}.",
            served.join(", ")
        );
        ApiError {
            code: Some("DeploymentNotFound"),
            ..Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
        }
    }

    /// No key, or none that is known here.
    pub(super) fn unauthorized(missing: bool) -> Self {
        let message = match missing {
            true => "You didn't provide an API key. Send it as `Authorization: Bearer KEY` or as `api-key: KEY`.",
            false => "Incorrect API key provided. Ask whoever runs this server for one.",
        };
        ApiError {
            code: Some("invalid_api_key"),
            ..Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", message)
        }
    }

    /// No such path.
    pub(super) fn not_found(message: String) -> Self {
        ApiError {
            code: Some("not_found"),
            ..Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
        }
    }

    /// The path is one of objects, and there is none of that name.
    pub(super) fn not_found_object(param: &'static str, message: String) -> Self {
        ApiError {
            param: Some(param.to_owned()),
            ..Self::not_found(message)
        }
    }

    /// The path exists, the method does not.
    pub(super) fn method_not_allowed(message: String) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    /// The body is larger than the server reads, or broke off.
    pub(super) fn body(status: StatusCode, message: String) -> Self {
        Self::new(status, "invalid_request_error", message)
    }

    /// As many requests as the server takes are there already.
    pub(super) fn busy(message: impl Into<String>) -> Self {
        ApiError {
            code: Some("rate_limit_exceeded"),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
        }
    }

    /// Loading or draining.
    pub(super) fn unavailable(message: &str) -> Self {
        ApiError {
            code: Some("service_unavailable"),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", message)
        }
    }

    /// Our own fault.
    pub(super) fn internal(message: impl Into<String>) -> Self {
        ApiError {
            code: Some("internal_error"),
            ..Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
        }
    }

    /// The same error where fields have other names: those of `table`, each from and to.
    pub(super) fn renamed(mut self, table: &[(&str, &str)]) -> Self {
        let name = self.param.as_deref();
        if let Some((_, to)) = table.iter().find(|(from, _)| Some(*from) == name) {
            self.param = Some((*to).to_owned());
        }
        self
    }

    /// The body of the response, also sent inside a stream that breaks.
    pub(super) fn json(&self) -> Value {
        json!({ "error": { "message": self.message, "type": self.kind, "param": self.param, "code": self.code } })
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::Busy {
                retry_after_seconds, ..
            } => ApiError {
                retry_after: retry_after_seconds,
                ..Self::busy(error.to_string())
            },
            SubmitError::Stopped => Self::internal(error.to_string()),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.json())).into_response();
        let later = [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(&self.status);
        let unread = [
            StatusCode::PAYLOAD_TOO_LARGE,
            StatusCode::REQUEST_TIMEOUT,
            StatusCode::UNAUTHORIZED,
        ]
        .contains(&self.status);
        if self.status == StatusCode::UNAUTHORIZED {
            let headers = response.headers_mut();
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if later {
            let headers = response.headers_mut();
            headers.insert(header::RETRY_AFTER, HeaderValue::from(self.retry_after));
        }
        // What was not read of the body makes the connection useless, and a client that tries again may find another server.
        if later || unread {
            close(&mut response);
        }
        response
    }
}

/// Says that the connection ends after this response.
pub(super) fn close(response: &mut Response) {
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
}

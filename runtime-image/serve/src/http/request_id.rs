//! Every answer says which request it is to, in `x-request-id`: the client's own name for it, where it gives one, else a new
//! one. OpenAI's clients show it with their errors.

use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;

use super::prepare::random;

const NAME: HeaderName = HeaderName::from_static("x-request-id");
/// The longest name that is taken over, in bytes.
const MAX_BYTES: usize = 128;

/// Names a request.
pub(super) async fn name(request: Request, next: Next) -> Response {
    let id = request.headers().get(NAME).filter(|id| is_sane(id)).cloned();
    let id = id.unwrap_or_else(new);
    let mut response = next.run(request).await;
    response.headers_mut().insert(NAME, id);
    response
}

/// What can stand in a log without being taken for something else.
fn is_sane(id: &HeaderValue) -> bool {
    let bytes = id.as_bytes();
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(byte);
    (1..=MAX_BYTES).contains(&bytes.len()) && bytes.iter().all(plain)
}

fn new() -> HeaderValue {
    let id = format!("req_{:016x}{:016x}", random(), random());
    HeaderValue::from_str(&id).unwrap_or(HeaderValue::from_static("req"))
}

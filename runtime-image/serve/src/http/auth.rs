//! Who is answered: whoever presents one of the keys, if there are any.

use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::{Request, State as Extract};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::State;
use super::error::ApiError;
use super::prepare::number;
use crate::args::ApiKey;
use crate::error::ServeError;
use crate::reload::Reloaded;
use crate::schedule::ClientId;

/// What probes and collectors of metrics read; they have no key.
pub(super) const OPEN: [&str; 4] = ["/health", "/ready", "/metrics", "/ping"];
/// Where Azure's clients put the key.
const AZURE_KEY: &str = "api-key";
/// Where keys stand if no argument gives one.
const VARIABLES: [&str; 2] = ["VLLM_API_KEY", "STRATA_API_KEY"];

/// A key's hash: all that is kept of it.
type Hashed = [u8; 32];

/// The keys that are accepted. They are compared as hashes and in constant time, so that no answer's time tells of a key.
pub(crate) struct Keys {
    given: Vec<Hashed>,
    file: Option<Arc<Reloaded<Vec<Hashed>>>>,
}

impl Keys {
    /// The keys of the arguments or, without any, of the environment; and those of the file. None if anybody is answered.
    pub(crate) async fn new(
        arguments: &[ApiKey],
        environment: impl Fn(&str) -> Option<String>,
        file: Option<PathBuf>,
    ) -> Result<Option<Self>, ServeError> {
        let mut given: Vec<Hashed> = arguments.iter().map(|key| hashed(key.0.as_bytes())).collect();
        if given.is_empty() {
            let found = VARIABLES
                .iter()
                .filter_map(|name| environment(name)?.parse::<ApiKey>().ok());
            given.extend(found.map(|key| hashed(key.0.as_bytes())));
        }
        let file = match file {
            Some(path) => Some(Reloaded::start(vec![path], |files| lines(&files[0])).await?),
            None => None,
        };
        Ok((!given.is_empty() || file.is_some()).then_some(Keys { given, file }))
    }

    /// The key that is accepted, of those that are presented.
    fn accepted<'a>(&self, headers: &'a HeaderMap) -> Option<&'a [u8]> {
        let from_file = self.file.as_ref().map(|file| file.get());
        let known = || self.given.iter().chain(from_file.iter().flat_map(|keys| keys.iter()));
        let one = |presented: &[u8]| {
            let presented = hashed(presented);
            let found = known().fold(Choice::from(0), |found, key| found | key.ct_eq(&presented));
            bool::from(found)
        };
        presented(headers).find(|key| one(key))
    }
}

fn hashed(key: &[u8]) -> Hashed {
    Sha256::digest(key).into()
}

/// One key a line, so that an old one and a new one hold together while clients change.
fn lines(content: &[u8]) -> Result<Vec<Hashed>, String> {
    let keys: Vec<Hashed> = content
        .split(|byte| *byte == b'\n')
        .map(<[u8]>::trim_ascii)
        .filter(|key| !key.is_empty())
        .map(hashed)
        .collect();
    match keys.is_empty() {
        true => Err("it holds no key; write one a line".to_owned()),
        false => Ok(keys),
    }
}

/// The keys that a request presents, in OpenAI's header or in Azure's.
pub(super) fn presented(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked("Bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii())
    });
    bearer
        .into_iter()
        .chain(headers.get(AZURE_KEY).map(|value| value.as_bytes()))
}

/// Refuses who has no key, before anything of the body is read, and says who sends the rest: who presents an accepted key is a
/// tenant. Where nobody needs one, a key is only a name.
pub(super) async fn check(Extract(state): Extract<Arc<State>>, mut request: Request, next: Next) -> Response {
    let headers = request.headers();
    let mut sender = ClientId::default();
    match &state.keys {
        None => sender.user = presented(headers).next().map_or(0, number),
        Some(keys) => match keys.accepted(headers) {
            Some(key) => sender.tenant = number(key),
            None if OPEN.contains(&request.uri().path()) => (),
            None => return ApiError::unauthorized(presented(headers).next().is_none()).into_response(),
        },
    }
    request.extensions_mut().insert(sender);
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn keys_come_from_arguments_or_the_environment_and_without_any_there_is_no_check() {
        let key = |text: &str| text.parse::<ApiKey>().expect("a key");
        let environment = |name: &str| (name == "STRATA_API_KEY").then(|| "env".to_owned());
        let accepts = |keys: &Keys, text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(AZURE_KEY, text.parse().expect("a header"));
            keys.accepted(&headers).is_some()
        };
        assert!(Keys::new(&[], |_| None, None).await.expect("no file").is_none());
        assert!(
            Keys::new(&[], |_| Some(" ".to_owned()), None)
                .await
                .expect("no file")
                .is_none()
        );
        let found = Keys::new(&[], environment, None)
            .await
            .expect("no file")
            .expect("a key");
        assert!(accepts(&found, "env") && !accepts(&found, "en") && !accepts(&found, ""));
        let found = Keys::new(&[key("a"), key("b")], environment, None).await;
        let found = found.expect("no file").expect("keys");
        assert!(accepts(&found, "a") && accepts(&found, "b") && !accepts(&found, "env"));
        assert!(!format!("{:?}", key("secret")).contains("secret"));
    }
}

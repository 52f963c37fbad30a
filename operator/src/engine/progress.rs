//! What a running pod says about its progress, asked seldom, and briefly. No reconcile waits for the answer: it wakes one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use strata_contract::{Progress, STAGE_PORT};
use tokio::sync::Semaphore;

use super::ask::{self, BodyError};
use super::kind::Key;
use super::watch::Wake;
use crate::run::report::PROGRESS_PERIOD;

/// Longest time for an answer.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Largest answer in bytes.
const LIMIT_BYTES: usize = 64 * 1024;
/// Pods that are asked at a time.
const CONCURRENCY: usize = 32;
/// A timer that is a little early must not skip a whole period.
const SLACK: Duration = Duration::from_secs(1);

/// Asks pods, each at most once in [`PROGRESS_PERIOD`].
#[derive(Clone, Debug)]
pub struct Poller {
    http: reqwest::Client,
    answers: Arc<Mutex<HashMap<String, Answer>>>,
    places: Arc<Semaphore>,
    wake: Wake,
}

/// When a pod was asked last, and what it said last.
type Answer = (Instant, Option<Progress>);

impl Poller {
    /// Asks nobody yet.
    pub fn new(wake: Wake) -> Self {
        let http = ask::client().build();
        Self {
            http: http.expect("without certificates and proxies there is nothing to set up"),
            answers: Arc::default(),
            places: Arc::new(Semaphore::new(CONCURRENCY)),
            wake,
        }
    }

    /// What `pod` said last. If that was a period ago it is asked again, and what it says then wakes `key`.
    pub fn ask(&self, pod: &Pod, key: &Key) -> Option<Progress> {
        let uid = pod.uid()?;
        let address = pod.status.as_ref()?.pod_ip.clone()?;
        let now = Instant::now();
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let before = answers.get(&uid).and_then(|(_, answer)| answer.clone());
        let is_fresh = |(time, _): &Answer| now.duration_since(*time) + SLACK < PROGRESS_PERIOD;
        if answers.get(&uid).is_some_and(is_fresh) {
            return before;
        }
        // With so many that do not answer, this one has its turn a period later.
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            return before;
        };
        answers.retain(|_, (time, _)| now.duration_since(*time) < PROGRESS_PERIOD * 10);
        // Claimed before the question, so that nobody else asks meanwhile.
        answers.insert(uid.clone(), (now, before.clone()));
        drop(answers);
        let (poller, key, name) = (self.clone(), key.clone(), pod.name_any());
        tokio::spawn(async move {
            let answer = tokio::time::timeout(TIMEOUT, poller.fetch(&url(&address))).await;
            drop(place);
            match answer {
                Ok(Ok(progress)) => poller.answered(&uid, progress, key),
                Ok(Err(error)) => tracing::debug!(pod = name, %error, "no progress from the pod"),
                Err(_) => tracing::debug!(pod = name, "no progress from the pod in time"),
            }
        });
        before
    }

    fn answered(&self, uid: &str, progress: Progress, key: Key) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((_, known)) = answers.get_mut(uid) else { return };
        if known.as_ref() != Some(&progress) {
            *known = Some(progress);
            drop(answers);
            self.wake.wake(key);
        }
    }

    async fn fetch(&self, url: &str) -> Result<Progress, FetchError> {
        let response = self.http.get(url).send().await?.error_for_status()?;
        let body = ask::body(response, LIMIT_BYTES).await?;
        Ok(serde_json::from_slice(&body)?)
    }
}

fn url(address: &str) -> String {
    format!("http://{}:{STAGE_PORT}/progress", ask::host(address))
}

#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error(transparent)]
    Http(#[from] reqwest::Error),
    #[error(transparent)]
    Body(#[from] BodyError),
    #[error("the answer is no progress: {0}")]
    Json(#[from] serde_json::Error),
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::response::Redirect;
    use axum::routing::get;

    use super::*;

    #[tokio::test]
    async fn a_pod_tells_its_progress_but_sends_the_operator_nowhere_and_does_not_fill_it() {
        let progress = r#"{"activity": "training", "done": 1, "total": 2, "unit": "steps"}"#;
        let router = Router::new()
            .route("/progress", get(move || async move { progress }))
            .route("/away", get(|| async { Redirect::temporary("/progress") }))
            .route("/large", get(|| async { " ".repeat(LIMIT_BYTES + 1) }));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let server = tokio::spawn(async move { axum::serve(listener, router).await });
        let poller = Poller::new(Wake::default());
        let at = |path: &str| format!("http://{address}{path}");
        let said = poller.fetch(&at("/progress")).await.expect("progress");
        assert_eq!((said.done, said.total), (1, 2));
        poller.fetch(&at("/away")).await.expect_err("no redirect is followed");
        let error = poller.fetch(&at("/large")).await.expect_err("too large");
        assert!(matches!(error, FetchError::Body(BodyError::TooLarge(_))), "{error}");
        server.abort();
    }
}

//! What a running pod says about its progress, asked seldom, and briefly.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use strata_contract::{Progress, STAGE_PORT};

use crate::run::report::PROGRESS_PERIOD;

/// Longest time for an answer.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Largest answer in bytes.
const LIMIT_BYTES: usize = 64 * 1024;
/// A timer that is a little early must not skip a whole period.
const SLACK: Duration = Duration::from_secs(1);

/// Asks pods, each at most once in [`PROGRESS_PERIOD`].
#[derive(Debug, Default)]
pub struct Poller {
    http: reqwest::Client,
    answers: Mutex<HashMap<String, (Instant, Option<Progress>)>>,
}

impl Poller {
    /// What `pod` says now, or what it said less than a period ago.
    pub async fn ask(&self, pod: &Pod) -> Option<Progress> {
        let uid = pod.uid()?;
        let address = pod.status.as_ref()?.pod_ip.clone()?;
        let now = Instant::now();
        {
            let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
            answers.retain(|_, (time, _)| now.duration_since(*time) < PROGRESS_PERIOD * 10);
            if let Some((time, answer)) = answers.get(&uid)
                && now.duration_since(*time) + SLACK < PROGRESS_PERIOD
            {
                return answer.clone();
            }
            // Claimed before the question, so that nobody else asks meanwhile.
            let before = answers.get(&uid).and_then(|(_, answer)| answer.clone());
            answers.insert(uid.clone(), (now, before));
        }
        let answer = match tokio::time::timeout(TIMEOUT, self.fetch(&address)).await {
            Ok(Ok(progress)) => Some(progress),
            Ok(Err(error)) => {
                tracing::debug!(pod = pod.name_any(), %error, "no progress from the pod");
                None
            }
            Err(_) => {
                tracing::debug!(pod = pod.name_any(), "no progress from the pod in time");
                None
            }
        };
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = answers.entry(uid).or_insert((now, None));
        if answer.is_some() {
            entry.1 = answer;
        }
        entry.1.clone()
    }

    async fn fetch(&self, address: &str) -> Result<Progress, FetchError> {
        let host = if address.contains(':') {
            format!("[{address}]")
        } else {
            address.to_owned()
        };
        let url = format!("http://{host}:{STAGE_PORT}/progress");
        let mut response = self.http.get(url).send().await?.error_for_status()?;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            if body.len() + chunk.len() > LIMIT_BYTES {
                return Err(FetchError::TooLarge);
            }
            body.extend_from_slice(&chunk);
        }
        Ok(serde_json::from_slice(&body)?)
    }
}

#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error(transparent)]
    Http(#[from] reqwest::Error),
    #[error("the answer is larger than {LIMIT_BYTES} bytes")]
    TooLarge,
    #[error("the answer is no progress: {0}")]
    Json(#[from] serde_json::Error),
}

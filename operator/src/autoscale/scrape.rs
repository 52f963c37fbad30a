//! Asks the pods of a service for their metrics, again and again, and keeps what they said last.
//!
//! One task for each service that scales by itself, beside the reconciles: a pod that does not answer holds up neither them
//! nor the other pods. A task ends when nobody asks for its service any more.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures::future::join_all;
use k8s_openapi::jiff::Timestamp;
use tokio::sync::Semaphore;

use super::Load;
use super::metrics::{Reading, Unread};
use super::policy::Decision;
use crate::engine::ask::{self, BodyError};
use crate::engine::kind::Key;
use crate::engine::watch::Wake;

/// Time between two questions to a pod.
pub const PERIOD: Duration = Duration::from_secs(10);
/// How long what a pod said counts after it fell silent: one lost answer is nothing.
const PATIENCE: Duration = Duration::from_secs(25);
/// A service that was not asked for in that time has no task any more. Reconciles come at least that often: each round wakes
/// one.
const UNWATCHED: Duration = Duration::from_secs(120);
/// Longest time for a connection, and for a whole answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_secs(3);
/// Largest answer in bytes: a hundred times what servers of models have.
const LIMIT_BYTES: usize = 4 << 20;
/// Questions at a time, of all services.
const CONCURRENCY: usize = 64;
/// Where servers have their metrics. TensorRT-LLM answers at the first with something else.
const PATHS: [&str; 2] = ["/metrics", "/prometheus/metrics"];

/// A pod to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its name.
    pub pod: String,
    /// Its UID.
    pub uid: String,
    /// Scheme, address and port: `http://10.0.0.1:8000`.
    pub base: String,
}

/// Whom to ask, and of what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Questions {
    /// The model that the metrics must be of.
    pub model: String,
    /// The pods.
    pub targets: Vec<Target>,
}

/// What the pods of a service said last; the pods that were not asked yet are not in it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Round {
    /// Number of the round, from 1. 0: none has ended yet.
    pub number: u64,
    /// What each pod said, or why it says nothing; by name.
    pub pods: BTreeMap<String, Result<Load, Silence>>,
}

/// What is known of a service whose number of pods follows what they say.
#[derive(Clone, Debug)]
pub struct Scaling {
    /// What its pods said last.
    pub round: Round,
    /// What was decided last since the operator runs, and in which round.
    pub decided: Option<(u64, Decision)>,
    /// When this was read.
    pub now: Timestamp,
}

/// Asks pods. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Scraper(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    http: reqwest::Client,
    slots: Semaphore,
    wake: Wake,
    services: Mutex<HashMap<Key, Service>>,
    tasks: AtomicU64,
}

/// What is known of one service.
#[derive(Debug, Default)]
struct Service {
    model: String,
    targets: Vec<Target>,
    asked_for: Option<Instant>,
    /// Number of the task that asks; 0: none does.
    task: u64,
    round: Round,
    pods: HashMap<String, Pod>,
    decided: Option<(u64, Decision)>,
}

/// What is known of one pod.
#[derive(Clone, Debug, Default)]
struct Pod {
    path: Option<&'static str>,
    reading: Option<(Instant, Reading)>,
    load: Load,
}

/// Why a pod says nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Silence {
    /// It took too long.
    #[error("no answer within {} seconds", TIMEOUT.as_secs())]
    Timeout,
    /// It could not be asked, or broke off.
    #[error("no connection: {0}")]
    Connection(String),
    /// Path and status of its answer.
    #[error("{0} answers {1}")]
    Status(&'static str, u16),
    /// It says more than can be meant.
    #[error("its answer is larger than {} MiB", LIMIT_BYTES >> 20)]
    TooLarge,
    /// Its answer says nothing of the model.
    #[error("{0}")]
    Unread(Unread),
}

impl Silence {
    /// Whether it speaks, but of a model with another name.
    pub fn is_other_model(&self) -> bool {
        matches!(self, Self::Unread(Unread::OtherModels(_)))
    }
}

impl Scraper {
    /// Asks pods and wakes the reconcile of their service after each round.
    ///
    /// A pod's certificate is of the names that clients know, and it is asked by its address, so that no certificate would fit: what
    /// is sent is no secret, and what is read decides nothing but a number within the user's bounds.
    ///
    /// # Errors
    /// There is no TLS.
    pub fn new(wake: Wake) -> Result<Self, reqwest::Error> {
        let http = ask::client()
            .tls_danger_accept_invalid_certs(true)
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_max_idle_per_host(1)
            .build()?;
        Ok(Self(Arc::new(Inner {
            http,
            slots: Semaphore::new(CONCURRENCY),
            wake,
            services: Mutex::default(),
            tasks: AtomicU64::default(),
        })))
    }

    /// What is known of a service. From now on its pods are asked, for as long as this is called now and then; without
    /// questions, they are not any more.
    pub fn look(&self, key: &Key, questions: Option<Questions>) -> Option<Scaling> {
        let Some(Questions { model, targets }) = questions else {
            self.forget(key);
            return None;
        };
        let mut services = self.0.services();
        let service = services.entry(key.clone()).or_default();
        service.model = model;
        service.targets = targets;
        service.asked_for = Some(Instant::now());
        if service.task == 0 {
            service.task = self.0.tasks.fetch_add(1, Ordering::Relaxed) + 1;
            tokio::spawn(run(Arc::downgrade(&self.0), key.clone(), service.task));
        }
        Some(Scaling {
            round: service.round.clone(),
            decided: service.decided.clone(),
            now: Timestamp::now(),
        })
    }

    /// Keeps what was decided in a round, for the next decision.
    pub fn remember(&self, key: &Key, round: u64, decision: &Decision) {
        if let Some(service) = self.0.services().get_mut(key) {
            service.decided = Some((round, decision.clone()));
        }
    }

    /// The service is gone, or does not scale by itself any more.
    pub fn forget(&self, key: &Key) {
        self.0.services().remove(key);
    }
}

impl Inner {
    fn services(&self) -> MutexGuard<'_, HashMap<Key, Service>> {
        self.services.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pods to ask, with what is known of each; none if nobody asks for the service any more.
    fn due(&self, key: &Key, task: u64) -> Option<(String, Vec<(Target, Pod)>)> {
        let mut services = self.services();
        // One that was forgotten and is asked for again has another task.
        let service = services.get(key).filter(|service| service.task == task)?;
        if service
            .asked_for
            .is_none_or(|asked_for| asked_for.elapsed() > UNWATCHED)
        {
            services.remove(key);
            return None;
        }
        let known = |target: &Target| service.pods.get(&target.uid).cloned().unwrap_or_default();
        let due = service.targets.iter().map(|target| (target.clone(), known(target)));
        Some((service.model.clone(), due.collect()))
    }

    /// Keeps what the pods said. What they did not is kept for a while.
    fn done(&self, key: &Key, answers: Vec<(Target, Pod, Option<Silence>)>) {
        let mut services = self.services();
        let Some(service) = services.get_mut(key) else { return };
        service.round.number += 1;
        service.round.pods.clear();
        service.pods.clear();
        for (target, pod, silence) in answers {
            let is_fresh = pod.reading.as_ref().is_some_and(|(at, _)| at.elapsed() < PATIENCE);
            let said = match silence {
                Some(silence) if !is_fresh => Err(silence),
                _ => Ok(pod.load.clone()),
            };
            service.round.pods.insert(target.pod, said);
            service.pods.insert(target.uid, pod);
        }
    }

    /// Asks one pod. Where its metrics are is found once, and again when they are not there any more.
    async fn ask(&self, target: Target, mut pod: Pod, model: &str) -> (Target, Pod, Option<Silence>) {
        // The semaphore is never closed.
        let _slot = self.slots.acquire().await;
        let mut silence = None;
        let paths = match pod.path {
            Some(path) => vec![path],
            None => PATHS.to_vec(),
        };
        for path in paths {
            let url = format!("{}{path}", target.base);
            let answer = tokio::time::timeout(TIMEOUT, self.fetch(&url, path))
                .await
                .unwrap_or(Err(Silence::Timeout))
                .and_then(|text| Reading::parse(&text, model).map_err(Silence::Unread));
            match answer {
                Ok(reading) => {
                    let now = Instant::now();
                    let before = pod.reading.as_ref();
                    let before = before.map(|(at, reading)| (reading, now.duration_since(*at).as_secs_f64()));
                    pod.load = reading.load(before);
                    pod.reading = Some((now, reading));
                    pod.path = Some(path);
                    return (target, pod, None);
                }
                Err(error) => {
                    let is_elsewhere = matches!(error, Silence::Status(_, 404) | Silence::Unread(Unread::NoFigures));
                    // The first path says most: a server without the second is no news.
                    silence = silence.or(Some(error));
                    if !is_elsewhere {
                        break;
                    }
                }
            }
        }
        pod.path = None;
        (target, pod, silence)
    }

    async fn fetch(&self, url: &str, path: &'static str) -> Result<String, Silence> {
        let connection = |error: reqwest::Error| Silence::Connection(root_cause(&error));
        let response = self.http.get(url).send().await.map_err(connection)?;
        if !response.status().is_success() {
            return Err(Silence::Status(path, response.status().as_u16()));
        }
        let body = ask::body(response, LIMIT_BYTES).await.map_err(|error| match error {
            BodyError::Http(error) => connection(error),
            BodyError::TooLarge(_) => Silence::TooLarge,
        })?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }
}

/// Rounds of one service, until nobody asks for it.
async fn run(inner: Weak<Inner>, key: Key, task: u64) {
    loop {
        let started = Instant::now();
        let Some(inner) = inner.upgrade() else { return };
        let Some((model, due)) = inner.due(&key, task) else {
            return;
        };
        let answers = join_all(due.into_iter().map(|(target, pod)| inner.ask(target, pod, &model))).await;
        inner.done(&key, answers);
        inner.wake.wake(key.clone());
        drop(inner);
        tokio::time::sleep(PERIOD.saturating_sub(started.elapsed())).await;
    }
}

/// The last of an error's causes says what happened; those before it repeat the address.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::http::StatusCode;
    use axum::response::Redirect;
    use axum::routing::get;

    use super::*;
    use crate::engine::kind::ResourceKind;

    const FIGURES: &str = "vllm:num_requests_waiting{model_name=\"chat\"} 3\n";

    /// A server with these routes; its address.
    async fn serve(router: Router) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move { axum::serve(listener, router).await });
        format!("http://{address}")
    }

    fn target(pod: &str, base: &str) -> Target {
        Target {
            pod: pod.into(),
            uid: format!("uid-{pod}"),
            base: base.into(),
        }
    }

    async fn ask(base: &str) -> Result<Load, String> {
        let scraper = Scraper::new(Wake::default()).expect("a client");
        let (_, pod, silence) = scraper.0.ask(target("p", base), Pod::default(), "chat").await;
        silence.map_or(Ok(pod.load), |silence| Err(silence.to_string()))
    }

    #[tokio::test]
    async fn a_pod_is_read_wherever_its_metrics_are_but_sends_the_operator_nowhere_and_does_not_fill_it() {
        let metrics = || get(|| async { FIGURES });
        let other = FIGURES.replace("chat", "mistral");
        for (router, said) in [
            (Router::new().route("/metrics", metrics()), Ok(Some(3.0))),
            (
                Router::new()
                    .route("/metrics", get(|| async { "[]" }))
                    .route("/prometheus/metrics", metrics()),
                Ok(Some(3.0)),
            ),
            (
                Router::new()
                    .route("/metrics", get(|| async { Redirect::temporary("/elsewhere") }))
                    .route("/elsewhere", metrics()),
                Err("/metrics answers 307"),
            ),
            (
                Router::new().route("/metrics", get(|| async { " ".repeat(LIMIT_BYTES + 1) })),
                Err("larger than 4 MiB"),
            ),
            (
                Router::new().route("/metrics", get(|| async { StatusCode::UNAUTHORIZED })),
                Err("/metrics answers 401"),
            ),
            (
                Router::new().route("/metrics", get(|| async { other })),
                Err("of the model mistral"),
            ),
        ] {
            let answer = ask(&serve(router).await).await.map(|load| load.waiting);
            match (answer, said) {
                (Ok(waiting), Ok(wanted)) => assert_eq!(waiting, wanted),
                (Err(message), Err(words)) => assert!(message.contains(words), "{message}"),
                other => panic!("{other:?}"),
            }
        }
        let error = ask("http://127.0.0.1:1").await.expect_err("nobody listens there");
        assert!(error.starts_with("no connection: "), "{error}");
    }

    #[tokio::test]
    async fn a_silent_pod_does_not_blind_the_others() {
        let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let mute = format!("http://{}", mute.local_addr().expect("an address"));
        let good = serve(Router::new().route("/metrics", get(|| async { FIGURES }))).await;
        let scraper = Scraper::new(Wake::default()).expect("a client");
        let key = Key {
            kind: ResourceKind::InferenceService,
            namespace: "ns".into(),
            name: "chat".into(),
        };
        let questions = || {
            Some(Questions {
                model: "chat".into(),
                targets: vec![target("good", &good), target("mute", &mute)],
            })
        };
        let deadline = Instant::now() + TIMEOUT * 4;
        let round = loop {
            let round = scraper.look(&key, questions()).expect("it is asked for").round;
            if round.number > 0 {
                break round;
            }
            assert!(Instant::now() < deadline, "no round ended");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert_eq!(round.pods["good"].as_ref().map(|load| load.waiting), Ok(Some(3.0)));
        assert_eq!(round.pods["mute"], Err(Silence::Timeout));
        scraper.forget(&key);
        assert!(scraper.0.due(&key, 1).is_none(), "its task ends");
    }
}

//! An API server in memory, as much of one as the engine uses, with the controllers of Jobs and Deployments.
//!
//! It counts writes, and after a chosen one it does the write but fails the answer: to the operator, that is a crash.

use std::collections::{BTreeMap, HashSet};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::http::{Method, Request, Response};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::client::Body;
use serde_json::{Value, json};
use tower::util::BoxCloneService;

use crate::fixtures::{bad_report, good_report, merge};

/// Between two looks at whether the server is to answer.
const PAUSE: Duration = Duration::from_millis(5);

/// The server.
pub struct Server(Mutex<State>);

#[derive(Default)]
struct State {
    /// By `PLURAL/NAME`; there is one namespace.
    objects: BTreeMap<String, Value>,
    /// What a watch tells, in order: the object's plural, whether it is gone, and the object.
    log: Vec<(String, bool, Value)>,
    clock: u64,
    requests: usize,
    writes: usize,
    crash_after: Option<usize>,
    fail_first: HashSet<String>,
    /// By plural: with which code and words creations and patches are refused.
    refused: BTreeMap<String, (u16, String)>,
    /// Plurals whose watches are to end, since their events are lost.
    gone: HashSet<String>,
    is_down: bool,
}

impl Server {
    pub fn new() -> Self {
        Self(Mutex::default())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no test panicked with the lock")
    }

    /// Puts an object there, as a user would.
    pub fn add(&self, plural: &str, object: Value) {
        self.state().create(plural, object);
    }

    /// The first attempt of the resource with this name fails.
    pub fn fail_first(&self, resource: &str) {
        self.state().fail_first.insert(resource.into());
    }

    /// The answer to this write, counted from 1, is lost.
    pub fn crash_after(&self, write: usize) {
        self.state().crash_after = Some(write);
    }

    /// From now on creations and patches of these objects are refused; or not any more.
    pub fn refuse(&self, plural: &str, refusal: Option<(u16, &str)>) {
        let refused = &mut self.state().refused;
        match refusal {
            Some((code, words)) => refused.insert(plural.into(), (code, words.into())),
            None => refused.remove(plural),
        };
    }

    /// Takes an object away, as a user would.
    pub fn remove(&self, key: &str) {
        self.state().remove(key);
    }

    /// How much has happened.
    pub fn log_length(&self) -> usize {
        self.state().log.len()
    }

    /// What happened to objects of this plural between two points: whether each is gone, and the object.
    pub fn log(&self, plural: &str, range: std::ops::Range<usize>) -> Vec<(bool, Value)> {
        let state = self.state();
        let log = state.log.get(range).unwrap_or_default().iter();
        log.filter(|(of, ..)| of == plural)
            .map(|(_, gone, object)| (*gone, object.clone()))
            .collect()
    }

    /// All objects of this plural.
    pub fn all(&self, plural: &str) -> Vec<Value> {
        let state = self.state();
        let prefix = format!("{plural}/");
        let all = state.objects.iter().filter(|(key, _)| key.starts_with(&prefix));
        all.map(|(_, object)| object.clone()).collect()
    }

    /// Changes an object, as a user would.
    pub fn change(&self, key: &str, change: Value) {
        let mut state = self.state();
        let mut object = state.objects[key].clone();
        merge(&mut object, change);
        let generation = object["metadata"]["generation"].as_i64().unwrap_or(0);
        object["metadata"]["generation"] = json!(generation + 1);
        state.update(key, object);
    }

    /// The object with this key, as it is now.
    pub fn object(&self, key: &str) -> Value {
        self.state().objects.get(key).cloned().unwrap_or_default()
    }

    /// All Events.
    pub fn events(&self) -> Vec<Value> {
        let state = self.state();
        let events = state.objects.iter().filter(|(key, _)| key.starts_with("events/"));
        events.map(|(_, event)| event.clone()).collect()
    }

    /// Ends the watch of these objects with 410 Gone: what has happened since it began is not told.
    pub fn lose_events(&self, plural: &str) {
        self.state().gone.insert(plural.into());
    }

    /// From now on nothing is answered; or all is again.
    pub fn set_down(&self, is_down: bool) {
        self.state().is_down = is_down;
    }

    /// Requests so far, watches aside.
    pub fn requests(&self) -> usize {
        self.state().requests
    }

    /// Writes that were asked for, Events aside.
    pub fn writes(&self) -> usize {
        self.state().writes
    }

    /// All objects but Events, without what differs between two lives: times, UIDs, versions.
    pub fn picture(&self) -> BTreeMap<String, Value> {
        let mut objects = self.state().objects.clone();
        objects.retain(|key, _| !key.starts_with("events/"));
        objects.values_mut().for_each(still);
        objects
    }

    /// As a client's transport.
    pub fn service(self: &Arc<Self>) -> BoxCloneService<Request<Body>, Response<Body>, Infallible> {
        let server = self.clone();
        BoxCloneService::new(tower::service_fn(move |request: Request<Body>| {
            let server = server.clone();
            async move {
                let (parts, body) = request.into_parts();
                let body = axum::body::to_bytes(axum::body::Body::new(body), usize::MAX)
                    .await
                    .expect("a whole body");
                let body: Value = if body.is_empty() {
                    Value::Null
                } else {
                    serde_json::from_slice(&body).expect("JSON")
                };
                let apply = parts
                    .headers
                    .get("content-type")
                    .is_some_and(|kind| kind.as_bytes().starts_with(b"application/apply-patch"));
                server.until_up().await;
                if parts.uri.query().is_some_and(|query| query.contains("watch=")) {
                    return Ok(server.watch(parts.uri.path()).await);
                }
                let (code, answer) = server.state().answer(
                    &parts.method,
                    parts.uri.path(),
                    parts.uri.query().unwrap_or(""),
                    body,
                    apply,
                );
                let text = serde_json::to_vec(&answer).expect("JSON");
                Ok(Response::builder()
                    .status(code)
                    .body(Body::from(text))
                    .expect("a response"))
            }
        }))
    }

    async fn until_up(&self) {
        while self.state().is_down {
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// A watch tells nothing, until it ends.
    async fn watch(&self, path: &str) -> Response<Body> {
        let plural = path.rsplit('/').next().expect("a path");
        while !self.state().gone.remove(plural) {
            tokio::time::sleep(PAUSE).await;
        }
        let event = json!({"type": "ERROR", "object": status(410, "Expired").1});
        Response::new(Body::from(format!("{event}\n").into_bytes()))
    }

    /// One turn of the Job controller, the Deployment controller and the kubelet.
    pub fn controllers(&self) {
        let mut state = self.state();
        let keys: Vec<String> = state.objects.keys().cloned().collect();
        for key in keys {
            match key.split_once('/') {
                Some(("jobs", _)) => state.run_job(&key),
                Some(("deployments", name)) => state.run_deployment(&key, name),
                _ => {}
            }
        }
    }
}

/// Takes out what two lives may differ in.
fn still(value: &mut Value) {
    const MOVING: [&str; 7] = [
        "uid",
        "resourceVersion",
        "creationTimestamp",
        "lastTransitionTime",
        "time",
        "batch.kubernetes.io/controller-uid",
        "strata.dev/applied",
    ];
    match value {
        Value::Object(map) => {
            map.retain(|key, _| !MOVING.contains(&key.as_str()));
            map.values_mut().for_each(still);
        }
        Value::Array(items) => items.iter_mut().for_each(still),
        _ => {}
    }
}

fn status(code: u16, reason: &str) -> (u16, Value) {
    (
        code,
        json!({"apiVersion": "v1", "kind": "Status", "status": "Failure", "message": reason, "reason": reason, "code": code}),
    )
}

impl State {
    fn tick(&mut self) -> String {
        self.clock += 1;
        self.clock.to_string()
    }

    fn create(&mut self, plural: &str, mut object: Value) -> Value {
        let version = self.tick();
        let metadata = &mut object["metadata"];
        metadata["resourceVersion"] = json!(version);
        metadata["generation"] = json!(1);
        metadata["creationTimestamp"] = json!(Timestamp::now().to_string());
        if metadata["uid"].is_null() {
            metadata["uid"] = json!(format!("uid-{version}"));
        }
        let key = format!("{plural}/{}", metadata["name"].as_str().expect("a name"));
        self.log.push((plural.into(), false, object.clone()));
        self.objects.insert(key, object.clone());
        object
    }

    fn remove(&mut self, key: &str) {
        let version = self.tick();
        if let Some(mut object) = self.objects.remove(key) {
            object["metadata"]["resourceVersion"] = json!(version);
            let plural = key.split('/').next().expect("a plural");
            self.log.push((plural.into(), true, object));
        }
    }

    fn update(&mut self, key: &str, mut object: Value) -> Value {
        let version = self.tick();
        object["metadata"]["resourceVersion"] = json!(version);
        let plural = key.split('/').next().expect("a plural");
        self.log.push((plural.into(), false, object.clone()));
        self.objects.insert(key.into(), object.clone());
        object
    }

    fn answer(&mut self, method: &Method, path: &str, query: &str, body: Value, apply: bool) -> (u16, Value) {
        self.requests += 1;
        let rest = path.split_once("/namespaces/ns/").expect("a path of the namespace").1;
        let parts: Vec<&str> = rest.split('/').collect();
        let plural = parts[0];
        if method == Method::GET {
            return match parts.get(1) {
                Some(name) => match self.objects.get(&format!("{plural}/{name}")) {
                    Some(object) => (200, object.clone()),
                    None => status(404, "NotFound"),
                },
                None => (200, self.list(plural, query)),
            };
        }
        if let (Some((code, words)), true) = (self.refused.get(plural), *method != Method::DELETE) {
            return status(*code, words);
        }
        let answer = self.write(method, &parts, body, apply);
        if plural != "events" && answer.0 < 300 {
            self.writes += 1;
            if self.crash_after == Some(self.writes) {
                return status(500, "the answer is lost");
            }
        }
        answer
    }

    fn list(&self, plural: &str, query: &str) -> Value {
        let selector = query
            .split('&')
            .find_map(|part| part.strip_prefix("labelSelector="))
            .unwrap_or("");
        let selector = selector
            .replace("%2F", "/")
            .replace("%3D", "=")
            .replace("%2C", ",")
            .replace("%21", "!");
        let wanted: Vec<(&str, &str)> = selector.split(',').filter_map(|term| term.split_once('=')).collect();
        let matches = |object: &Value| {
            wanted.iter().all(|(key, value)| match key.strip_suffix('!') {
                Some(key) => object["metadata"]["labels"][key] != *value,
                None => object["metadata"]["labels"][*key] == *value,
            })
        };
        let prefix = format!("{plural}/");
        let items: Vec<&Value> = self
            .objects
            .iter()
            .filter(|(key, _)| key.starts_with(&prefix))
            .map(|(_, object)| object)
            .filter(|object| matches(object))
            .collect();
        json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": self.clock.to_string()}, "items": items})
    }

    fn write(&mut self, method: &Method, parts: &[&str], body: Value, apply: bool) -> (u16, Value) {
        let plural = parts[0];
        if method == Method::POST {
            let key = format!("{plural}/{}", body["metadata"]["name"].as_str().expect("a name"));
            return match self.objects.contains_key(&key) {
                true => status(409, "AlreadyExists"),
                false => (201, self.create(plural, body)),
            };
        }
        let key = format!("{plural}/{}", parts[1]);
        let Some(there) = self.objects.get(&key).cloned() else {
            return match apply {
                true => (201, self.create(plural, body)),
                false => status(404, "NotFound"),
            };
        };
        match *method {
            Method::PUT => {
                let is_status = parts.get(2) == Some(&"status");
                assert!(is_status || plural == "leases", "only a status or a Lease is replaced");
                if body["metadata"]["resourceVersion"] != there["metadata"]["resourceVersion"] {
                    return status(409, "Conflict");
                }
                let mut next = there;
                let part = if is_status { "status" } else { "spec" };
                next[part] = body[part].clone();
                (200, self.update(&key, next))
            }
            Method::PATCH => {
                let uid = &body["metadata"]["uid"];
                if !uid.is_null() && *uid != there["metadata"]["uid"] {
                    return status(409, "Conflict");
                }
                let mut next = there;
                let spec = next["spec"].clone();
                merge(&mut next, body);
                if next["spec"] != spec {
                    let generation = next["metadata"]["generation"].as_i64().unwrap_or(0);
                    next["metadata"]["generation"] = json!(generation + 1);
                }
                (200, self.update(&key, next))
            }
            Method::DELETE => {
                let uid = body["preconditions"]["uid"].as_str();
                if uid.is_some() && uid != there["metadata"]["uid"].as_str() {
                    return status(409, "Conflict");
                }
                self.remove(&key);
                let owned = &there["metadata"]["uid"];
                let is_owned =
                    |object: &Value| object["metadata"]["labels"]["batch.kubernetes.io/controller-uid"] == *owned;
                let pods: Vec<String> = self
                    .objects
                    .iter()
                    .filter(|(_, object)| is_owned(object))
                    .map(|(key, _)| key.clone())
                    .collect();
                pods.iter().for_each(|key| self.remove(key));
                (200, json!({"apiVersion": "v1", "kind": "Status", "status": "Success"}))
            }
            _ => status(405, "MethodNotAllowed"),
        }
    }

    fn run_job(&mut self, key: &str) {
        let mut job = self.objects[key].clone();
        if !job["status"].is_null() {
            return;
        }
        let labels = &job["spec"]["template"]["metadata"]["labels"];
        let first = labels["strata.dev/attempt"] == "1";
        let fails = first
            && labels["strata.dev/name"]
                .as_str()
                .is_some_and(|name| self.fail_first.contains(name));
        let (code, message) = match fails {
            true => (70, bad_report(strata_contract::FailureReason::StorageFull)),
            false => (0, good_report('a')),
        };
        let mut labels = labels.clone();
        labels["batch.kubernetes.io/controller-uid"] = job["metadata"]["uid"].clone();
        let state = json!({"terminated": {"exitCode": code, "message": message}});
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("{}-pod", job["metadata"]["name"].as_str().expect("a name")), "namespace": "ns", "labels": labels,
                "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}]},
            "spec": job["spec"]["template"]["spec"],
            "status": {"phase": if fails { "Failed" } else { "Succeeded" }, "containerStatuses": [{"name": "strata", "image": "", "imageID": "",
                "ready": false, "restartCount": 0, "state": state}]},
        });
        self.create("pods", pod);
        // It ended long ago, so that no test waits for the pause before the next attempt.
        let ended = Timestamp::now() - SignedDuration::from_hours(1);
        job["status"] = json!({"conditions": [{"type": if fails { "Failed" } else { "Complete" }, "status": "True",
            "lastTransitionTime": ended.to_string()}]});
        self.update(key, job);
    }

    fn run_deployment(&mut self, key: &str, name: &str) {
        let mut deployment = self.objects[key].clone();
        let Some(replicas) = deployment["spec"]["replicas"].as_i64() else {
            return;
        };
        let generation = deployment["metadata"]["generation"].clone();
        if deployment["status"]["observedGeneration"] == generation {
            return;
        }
        for index in 0..replicas {
            let mut metadata = deployment["spec"]["template"]["metadata"].clone();
            metadata["name"] = json!(format!("{name}-{index}"));
            metadata["namespace"] = json!("ns");
            let status = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]});
            let spec = deployment["spec"]["template"]["spec"].clone();
            self.create(
                "pods",
                json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": status}),
            );
        }
        deployment["status"] = json!({"observedGeneration": generation, "replicas": replicas, "updatedReplicas": replicas,
            "readyReplicas": replicas, "availableReplicas": replicas});
        self.update(key, deployment);
    }
}

//! What `kubectl describe` shows under Events.
//!
//! kube's own recorder keeps whole Events of six minutes and looks through all of them at each new one: with ten thousand
//! resources that is most of an operator's memory and work. This one remembers the names of a bounded number.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;

use super::status::Transition;

/// Events that can still become a series. One that is forgotten begins anew: that costs an object, nothing else.
const REMEMBERED: usize = 512;
/// Longest note in bytes, by the API's rule.
const NOTE_LIMIT_BYTES: usize = 1000;

/// Publishes Events.
pub struct Recorder {
    client: Client,
    controller: String,
    instance: String,
    recent: Mutex<Recent>,
}

/// Whom it is about, by UID, and the reason.
type About = (String, String);

#[derive(Debug, Default)]
struct Recent {
    names: HashMap<About, (String, i32)>,
    order: VecDeque<About>,
}

impl Recorder {
    /// One that writes as `instance` of `controller`.
    pub fn new(client: Client, controller: &str, instance: &str) -> Self {
        Self {
            client,
            controller: controller.into(),
            instance: instance.into(),
            recent: Mutex::default(),
        }
    }

    /// Says that `transition` happened to `regarding`; the same once more is one more of a series.
    ///
    /// # Errors
    /// The server's.
    pub async fn publish(&self, transition: &Transition, regarding: &ObjectReference) -> Result<(), kube::Error> {
        let now = Timestamp::now();
        let namespace = regarding.namespace.as_deref().unwrap_or("default");
        let events: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        let about = (regarding.uid.clone().unwrap_or_default(), transition.reason.clone());
        if let Some((name, count)) = self.again(&about) {
            let series = json!({"series": {"count": count, "lastObservedTime": MicroTime(now)}});
            match events
                .patch(&name, &PatchParams::default(), &Patch::Merge(series))
                .await
            {
                // The server forgets Events after an hour.
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                result => return result.map(drop),
            }
        }
        let event = self.event(transition, regarding, now);
        let created = events.create(&PostParams::default(), &event).await?;
        self.remember(about, created.metadata.name.unwrap_or_default());
        Ok(())
    }

    fn event(&self, transition: &Transition, regarding: &ObjectReference, now: Timestamp) -> Event {
        let kind = if transition.is_warning { "Warning" } else { "Normal" };
        let name = regarding.name.as_deref().unwrap_or(&self.controller);
        Event {
            metadata: ObjectMeta {
                namespace: regarding.namespace.clone(),
                name: Some(format!("{name}.{:x}", now.as_nanosecond())),
                ..ObjectMeta::default()
            },
            action: Some("Reconcile".into()),
            event_time: Some(MicroTime(now)),
            note: Some(cut(&transition.note).to_owned()),
            reason: Some(transition.reason.clone()),
            regarding: Some(regarding.clone()),
            reporting_controller: Some(self.controller.clone()),
            reporting_instance: Some(self.instance.clone()),
            type_: Some(kind.into()),
            ..Event::default()
        }
    }

    /// Name of the Event of before, and how often it is now; `None` if there was none.
    fn again(&self, about: &About) -> Option<(String, i32)> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let (name, count) = recent.names.get_mut(about)?;
        *count = count.saturating_add(1);
        Some((name.clone(), *count))
    }

    fn remember(&self, about: About, name: String) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.names.insert(about.clone(), (name, 1)).is_none() {
            recent.order.push_back(about);
        }
        if recent.order.len() > REMEMBERED
            && let Some(oldest) = recent.order.pop_front()
        {
            recent.names.remove(&oldest);
        }
    }
}

/// As much of a text as a note can hold.
fn cut(text: &str) -> &str {
    let end = text.floor_char_boundary(NOTE_LIMIT_BYTES);
    &text[..end]
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::engine::tests::server::Server;

    fn transition(reason: &str) -> Transition {
        Transition {
            is_warning: false,
            reason: reason.into(),
            note: "ä".repeat(NOTE_LIMIT_BYTES),
        }
    }

    #[tokio::test]
    async fn what_happens_again_is_one_event_and_what_is_remembered_is_bounded() {
        let server = Arc::new(Server::new());
        let client = kube::client::ClientBuilder::new(server.service(), "ns").build();
        let recorder = Recorder::new(client, "strata-operator", "one");
        let regarding = |uid: &str| ObjectReference {
            name: Some("chat".into()),
            namespace: Some("ns".into()),
            uid: Some(uid.into()),
            ..ObjectReference::default()
        };
        for _ in 0..3 {
            recorder
                .publish(&transition("Running"), &regarding("a"))
                .await
                .expect("it is taken");
        }
        let events = server.events();
        assert_eq!(events.len(), 1);
        assert_eq!(events[0]["series"]["count"], 3);
        assert_eq!(events[0]["note"].as_str().map(str::len), Some(NOTE_LIMIT_BYTES));

        for number in 0..REMEMBERED {
            recorder
                .publish(&transition("Running"), &regarding(&number.to_string()))
                .await
                .expect("it is taken");
        }
        assert_eq!(server.events().len(), REMEMBERED + 1);
        recorder
            .publish(&transition("Running"), &regarding("a"))
            .await
            .expect("it is taken");
        assert_eq!(server.events().len(), REMEMBERED + 2, "the oldest is forgotten");
        let recent = recorder.recent.lock().expect("not poisoned");
        assert_eq!((recent.names.len(), recent.order.len()), (REMEMBERED, REMEMBERED));
    }
}

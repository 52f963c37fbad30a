//! Counts objects as they appear, and remembers when the last one did.

use std::collections::HashSet;
use std::fmt::Debug;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures::StreamExt as _;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How many objects there have been, and when the last one came.
pub struct Counter<K> {
    seen: watch::Receiver<(usize, Instant)>,
    task: JoinHandle<()>,
    kind: PhantomData<K>,
}

impl<K> Counter<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    /// Counts the objects that `selector` selects, in all namespaces.
    pub fn start(client: &Client, selector: &str) -> Self {
        let (sender, seen) = watch::channel((0, Instant::now()));
        let config = watcher::Config::default().labels(selector);
        let events = watcher(Api::<PartialObjectMeta<K>>::all(client.clone()), config);
        let task = tokio::spawn(async move {
            let mut events = Box::pin(events);
            let mut all = HashSet::new();
            while let Some(event) = events.next().await {
                match event {
                    Ok(Event::Apply(object) | Event::InitApply(object)) => {
                        if all.insert(object.uid()) {
                            sender.send_replace((all.len(), Instant::now()));
                        }
                    }
                    Ok(_) => {}
                    Err(error) => crate::bed::command::say(format_args!("a watch broke: {error}")),
                }
            }
        });
        Self {
            seen,
            task,
            kind: PhantomData,
        }
    }

    /// Waits until no more have come for a while; how many there are.
    ///
    /// # Errors
    /// They do not cease to come.
    pub async fn settled(&self) -> Result<usize> {
        let mut seen = self.seen.clone();
        for _ in 0..60 {
            let more = tokio::time::timeout(Duration::from_secs(3), seen.changed()).await;
            if more.is_err() {
                return Ok(seen.borrow().0);
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        anyhow::bail!("there are ever more of them")
    }

    /// Waits until there have been `count`; when the last of them came.
    ///
    /// # Errors
    /// They do not come in time.
    pub async fn until(&self, count: usize, deadline: Duration) -> Result<Instant> {
        let mut seen = self.seen.clone();
        let all = tokio::time::timeout(deadline, seen.wait_for(|(seen, _)| *seen >= count)).await;
        let there = self.seen.borrow().0;
        ensure!(all.is_ok(), "{there} of {count} after {} s", deadline.as_secs());
        Ok(self.seen.borrow().1)
    }
}

impl<K> Drop for Counter<K> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

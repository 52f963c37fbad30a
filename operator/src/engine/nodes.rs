//! What nodes there are: a watch that keeps facts of them ([`crate::placement::Node`]), and wakes who waits for nodes.
//!
//! Placement is the one decision that is made on a cache: nodes are not ours, so no write of ours can be newer than it.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};

use futures::StreamExt;
use k8s_openapi::api::core::v1::Node as ApiNode;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt};
use tokio::sync::watch;

use super::kind::Key;
use super::watch::{WATCH_TIMEOUT_SECONDS, Wake};
use crate::placement::{Fleet, Node, Table};

/// The nodes as they are known now.
#[derive(Clone, Debug)]
pub struct Nodes {
    state: Arc<Mutex<State>>,
    /// Whether it is known what nodes there are, or that they may not be read.
    filled: watch::Sender<bool>,
}

impl Default for Nodes {
    fn default() -> Self {
        Self::new(Table::built_in())
    }
}

#[derive(Debug, Default)]
struct State {
    table: Arc<Table>,
    facts: BTreeMap<String, Arc<Node>>,
    /// What is being listed anew.
    listed: BTreeMap<String, Arc<Node>>,
    fleet: Arc<Fleet>,
    waiting: BTreeSet<Key>,
}

impl Nodes {
    /// None yet; judged by `table`.
    pub fn new(table: Arc<Table>) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                fleet: Arc::new(Fleet::new(table.clone(), None)),
                table,
                ..State::default()
            })),
            filled: watch::Sender::new(false),
        }
    }

    /// Waits until it is known what nodes there are, or that they may not be read: nothing is placed before.
    pub async fn filled(&self) {
        // It fails only if the sender is gone, which is here.
        let _ = self.filled.subscribe().wait_for(|filled| *filled).await;
    }

    /// Nodes are not read: only declared pools count.
    pub fn unknown(&self) {
        self.filled.send_replace(true);
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// All of them at this moment.
    pub fn now(&self) -> Arc<Fleet> {
        self.with(|state| state.fleet.clone())
    }

    /// Whether `key` is to be woken when nodes change.
    pub fn wait(&self, key: &Key, waits: bool) {
        self.with(|state| match waits {
            true => drop(state.waiting.insert(key.clone())),
            false => drop(state.waiting.remove(key)),
        });
    }

    /// Takes in what the watch says; who is to be woken.
    fn observe(&self, event: Event<ApiNode>) -> Vec<Key> {
        self.with(|state| {
            let is_new = match event {
                Event::Init => {
                    state.listed.clear();
                    false
                }
                Event::InitApply(node) => {
                    let facts = Arc::new(Node::read(&node, &state.table));
                    state.listed.insert(node.name_any(), facts);
                    false
                }
                Event::InitDone => {
                    let listed = std::mem::take(&mut state.listed);
                    let is_new = state.fleet.nodes.is_none() || listed != state.facts;
                    state.facts = listed;
                    is_new
                }
                Event::Apply(node) => {
                    let facts = Arc::new(Node::read(&node, &state.table));
                    let before = state.facts.insert(node.name_any(), facts.clone());
                    before != Some(facts)
                }
                Event::Delete(node) => state.facts.remove(&node.name_any()).is_some(),
            };
            if !is_new {
                return Vec::new();
            }
            let nodes = state.facts.values().cloned().collect();
            state.fleet = Arc::new(Fleet::new(state.table.clone(), Some(nodes)));
            state.waiting.iter().cloned().collect()
        })
    }

    /// Watches nodes for ever. Where the operator may not, they stay unknown and only declared pools count.
    pub async fn watch(self, client: Client, wake: Wake) {
        let config = watcher::Config::default().timeout(WATCH_TIMEOUT_SECONDS);
        let events = watcher(Api::<ApiNode>::all(client), config).default_backoff();
        let mut events = pin!(events);
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => {
                    let is_whole = matches!(event, Event::InitDone);
                    self.observe(event).into_iter().for_each(|key| wake.wake(key));
                    if is_whole {
                        self.filled.send_replace(true);
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "the watch of nodes broke; it starts again");
                    self.unknown();
                }
            }
        }
    }
}

//! What nodes there are and which devices they offer by claims: watches that keep facts of them ([`crate::placement::Node`]),
//! and wake who waits for nodes.
//!
//! Placement is the one decision that is made on a cache: nodes are not ours, so no write of ours can be newer than it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::ClusterResourceScope;
use k8s_openapi::api::core::v1::Node as ApiNode;
use k8s_openapi::api::resource::v1::ResourceSlice;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::kind::Key;
use super::watch::{WATCH_TIMEOUT_SECONDS, Wake};
use crate::placement::device::{self, Devices, Slice};
use crate::placement::{Fleet, Node, Table};

/// Pause before a cluster that serves no claims is asked again: it may be upgraded.
const ASK_AGAIN: Duration = Duration::from_secs(60);

/// The nodes as they are known now.
#[derive(Clone, Debug)]
pub struct Nodes {
    state: Arc<Mutex<State>>,
    /// Whether it is known what there is, or that it may not be read: of nodes, and of their devices.
    filled: watch::Sender<(bool, bool)>,
}

impl Default for Nodes {
    fn default() -> Self {
        Self::new(Table::built_in())
    }
}

#[derive(Debug, Default)]
struct State {
    table: Arc<Table>,
    nodes: Known<Arc<Node>>,
    slices: Known<Slice>,
    /// By name of the node.
    devices: BTreeMap<String, Devices>,
    serves_claims: bool,
    fleet: Arc<Fleet>,
    waiting: BTreeSet<Key>,
}

/// Facts of watched objects, by name.
#[derive(Debug)]
struct Known<T> {
    /// Absent until they were listed once.
    facts: Option<BTreeMap<String, T>>,
    /// What is being listed anew.
    listed: BTreeMap<String, T>,
}

impl<T> Default for Known<T> {
    fn default() -> Self {
        Self {
            facts: None,
            listed: BTreeMap::new(),
        }
    }
}

impl<T: PartialEq> Known<T> {
    /// Takes in what the watch says; whether that is news.
    fn observe<K: ResourceExt>(&mut self, event: Event<K>, read: impl FnOnce(&K) -> T) -> bool {
        let facts = self.facts.as_mut();
        match event {
            Event::Init => {
                self.listed.clear();
                false
            }
            Event::InitApply(object) => {
                self.listed.insert(object.name_any(), read(&object));
                false
            }
            Event::InitDone => {
                let listed = Some(std::mem::take(&mut self.listed));
                let is_new = self.facts != listed;
                self.facts = listed;
                is_new
            }
            Event::Apply(object) => facts.is_some_and(|facts| {
                let (name, new) = (object.name_any(), read(&object));
                let is_new = facts.get(&name) != Some(&new);
                facts.insert(name, new);
                is_new
            }),
            Event::Delete(object) => facts.is_some_and(|facts| facts.remove(&object.name_any()).is_some()),
        }
    }
}

impl State {
    fn observe_nodes(&mut self, event: Event<ApiNode>) -> Vec<Key> {
        let (table, devices) = (&self.table, &self.devices);
        let read = |node: &ApiNode| {
            let devices = devices.get(&node.name_any()).cloned().unwrap_or_default();
            let node = Node::read(node, table);
            Arc::new(Node { devices, ..node })
        };
        let is_new = self.nodes.observe(event, read);
        self.news(is_new)
    }

    fn observe_slices(&mut self, event: Event<ResourceSlice>) -> Vec<Key> {
        let table = &self.table;
        if !self.slices.observe(event, |slice| Slice::read(slice, table)) {
            return Vec::new();
        }
        self.devices = device::by_node(self.slices.facts.iter().flat_map(BTreeMap::values));
        let mut is_new = false;
        // Those that are being listed as well: they were read with the devices of before.
        let nodes = self.nodes.facts.iter_mut().flat_map(BTreeMap::values_mut);
        for node in nodes.chain(self.nodes.listed.values_mut()) {
            let devices = self.devices.get(&node.name).cloned().unwrap_or_default();
            if node.devices != devices {
                *node = Arc::new(Node {
                    devices,
                    ..node.as_ref().clone()
                });
                is_new = true;
            }
        }
        self.news(is_new)
    }

    /// Makes the fleet anew, if something is new; who is to be woken.
    fn news(&mut self, is_new: bool) -> Vec<Key> {
        if !is_new {
            return Vec::new();
        }
        let nodes = self.nodes.facts.as_ref();
        let nodes = nodes.map(|facts| facts.values().cloned().collect());
        self.fleet = Arc::new(Fleet {
            serves_claims: self.serves_claims,
            ..Fleet::new(self.table.clone(), nodes)
        });
        self.waiting.iter().cloned().collect()
    }
}

impl Nodes {
    /// None yet; judged by `table`.
    pub fn new(table: Arc<Table>) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                fleet: Arc::new(Fleet::new(table.clone(), None)),
                table,
                serves_claims: true,
                ..State::default()
            })),
            filled: watch::Sender::default(),
        }
    }

    /// Waits until it is known what nodes there are and what they offer, or that they may not be read: nothing is placed before.
    pub async fn filled(&self) {
        // It fails only if the sender is gone, which is here.
        let _ = self
            .filled
            .subscribe()
            .wait_for(|(nodes, devices)| *nodes && *devices)
            .await;
    }

    /// Nodes are not read: only declared pools count.
    pub fn unknown(&self) {
        self.filled.send_modify(|(nodes, _)| *nodes = true);
    }

    fn devices_known(&self) {
        self.filled.send_modify(|(_, devices)| *devices = true);
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

    /// Watches nodes for ever. Where the operator may not, they stay unknown and only declared pools count.
    pub async fn watch(self, client: Client, wake: Wake) {
        follow(
            client,
            &wake,
            |event| self.with(|state| state.observe_nodes(event)),
            || self.unknown(),
        )
        .await;
    }

    /// Watches for ever what nodes offer by claims, where the cluster serves that API (Kubernetes 1.34 or later) and the operator
    /// may. Where it may not, they offer none.
    pub async fn watch_devices(self, client: Client, wake: Wake, may_read: bool) {
        loop {
            let serves = serves_claims(&client).await;
            match &serves {
                Ok(serves) => self.serve_claims(*serves).into_iter().for_each(|key| wake.wake(key)),
                Err(error) => tracing::warn!(%error, "whether claims are served cannot be asked; it is tried again"),
            }
            match serves {
                Ok(true) => break,
                _ => self.devices_known(),
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
        match may_read {
            true => {
                let observe = |event| self.with(|state| state.observe_slices(event));
                follow(client, &wake, observe, || self.devices_known()).await;
            }
            false => self.devices_known(),
        }
    }

    fn serve_claims(&self, serves: bool) -> Vec<Key> {
        self.with(|state| {
            let is_new = std::mem::replace(&mut state.serves_claims, serves) != serves;
            state.news(is_new)
        })
    }
}

/// Whether the server has the API of claims, in the version that is used here.
async fn serves_claims(client: &Client) -> Result<bool, kube::Error> {
    match client.list_api_group_resources("resource.k8s.io/v1").await {
        Ok(list) => Ok(list.resources.iter().any(|one| one.name == "resourceclaimtemplates")),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(error) => Err(error),
    }
}

/// Watches objects of the cluster for ever. `known` is told when they have been listed, and when that fails.
async fn follow<K>(client: Client, wake: &Wake, observe: impl Fn(Event<K>) -> Vec<Key>, known: impl Fn())
where
    K: Resource<DynamicType = (), Scope = ClusterResourceScope> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let config = watcher::Config::default().timeout(WATCH_TIMEOUT_SECONDS);
    let mut events = pin!(watcher(Api::<K>::all(client), config).default_backoff());
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                let is_whole = matches!(event, Event::InitDone);
                observe(event).into_iter().for_each(|key| wake.wake(key));
                if is_whole {
                    known();
                }
            }
            Err(error) => {
                tracing::warn!(kind = %K::kind(&()), %error, "a watch broke; it starts again");
                known();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::kind::ResourceKind;
    use serde_json::{Value, json};

    fn node(name: &str) -> ApiNode {
        let labels = json!({"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"});
        serde_json::from_value(json!({"metadata": {"name": name, "labels": labels}})).expect("a node")
    }

    fn slice(name: &str, node: &str, count: usize) -> ResourceSlice {
        let device = |index| json!({"name": format!("gpu-{index}"), "attributes": {"type": {"string": "gpu"}}});
        let devices: Vec<Value> = (0..count).map(device).collect();
        let pool = json!({"name": node, "generation": 1, "resourceSliceCount": 1});
        let spec = json!({"driver": "gpu.nvidia.com", "nodeName": node, "pool": pool, "devices": devices});
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).expect("a slice")
    }

    /// Each order in which two watches may tell it leads to the same fleet, and only news wake who waits.
    #[test]
    fn nodes_and_their_devices_come_together_in_any_order_and_what_is_no_news_wakes_nobody() {
        let key = crate::fixtures::key(ResourceKind::PretrainJob, "p");
        let nodes = |name: &str| [Event::Init, Event::InitApply(node(name)), Event::InitDone];
        let slices = || [Event::Init, Event::InitApply(slice("s", "a", 8)), Event::InitDone];
        let offered = |all: &Nodes| -> Vec<u32> {
            let fleet = all.now();
            let counts = fleet.there().map(|node| node.devices.values().sum());
            counts.collect()
        };
        let tell_nodes = |all: &Nodes, event| all.with(|state| state.observe_nodes(event));
        let tell_slices = |all: &Nodes, event| all.with(|state| state.observe_slices(event));
        for slices_after in 0..4 {
            let all = Nodes::default();
            all.wait(&key, true);
            let mut woken = 0;
            for (index, event) in nodes("a").into_iter().enumerate() {
                if index == slices_after {
                    slices()
                        .into_iter()
                        .for_each(|event| woken += tell_slices(&all, event).len());
                }
                woken += tell_nodes(&all, event).len();
            }
            if slices_after == 3 {
                slices()
                    .into_iter()
                    .for_each(|event| woken += tell_slices(&all, event).len());
            }
            assert_eq!(offered(&all), [8], "{slices_after}");
            assert!(woken > 0);
            // The same again: the kubelet and the driver say each minute that they live.
            let mut again = tell_nodes(&all, Event::Apply(node("a")));
            again.extend(tell_slices(&all, Event::Apply(slice("s", "a", 8))));
            nodes("a")
                .into_iter()
                .for_each(|event| again.extend(tell_nodes(&all, event)));
            slices()
                .into_iter()
                .for_each(|event| again.extend(tell_slices(&all, event)));
            assert_eq!(again, []);
            assert_eq!(
                tell_slices(&all, Event::Apply(slice("s", "a", 7))),
                std::slice::from_ref(&key)
            );
            assert_eq!(offered(&all), [7]);
            assert_eq!(
                tell_slices(&all, Event::Delete(slice("s", "a", 7))),
                std::slice::from_ref(&key)
            );
            assert_eq!(offered(&all), [0]);
            assert_eq!(tell_nodes(&all, Event::Delete(node("a"))), std::slice::from_ref(&key));
            assert!(all.now().nodes.as_ref().is_some_and(Vec::is_empty));
        }
    }

    #[test]
    fn a_cluster_that_comes_to_serve_claims_wakes_who_waits() {
        let all = Nodes::default();
        let key = crate::fixtures::key(ResourceKind::PretrainJob, "p");
        all.wait(&key, true);
        assert!(all.now().serves_claims && all.serve_claims(true).is_empty());
        assert_eq!(all.serve_claims(false), std::slice::from_ref(&key));
        assert!(!all.now().serves_claims);
        assert_eq!(all.serve_claims(true), [key]);
    }
}

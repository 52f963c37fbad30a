//! All objects of one type, as a watch tells of them.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kube::{Resource, ResourceExt};

use super::packed::{Packed, Patterns};
use super::{Cached, Object};
use crate::engine::kind::{Key, ResourceKind};
use crate::workload::labels;

/// The objects of one type. Whoever reads gets the JSON, packed: what it means is read at the moment of a decision.
#[derive(Debug, Default)]
pub struct Store(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// By `NAMESPACE/NAME`.
    objects: HashMap<Box<str>, Entry>,
    patterns: Patterns,
    /// Names of the objects of a resource.
    owned: HashMap<Arc<Key>, Vec<Box<str>>>,
    /// Names of the objects of no resource.
    others: BTreeSet<Box<str>>,
    /// Everything up to this version has been seen.
    position: u64,
    /// The highest version in the list under way.
    listed: u64,
    lists_begun: u64,
    lists_done: u64,
}

#[derive(Debug)]
struct Entry {
    json: Arc<Packed>,
    uid: Box<str>,
    version: u64,
    is_deleting: bool,
    /// Which resource it is about.
    subject: Option<Arc<Key>>,
    /// The list in which, or since which, it was seen.
    list: u64,
}

/// A version as a number. Kubernetes promises since 1.35 that versions can be compared; before, they could be as well.
pub fn version<K: Resource>(object: &K) -> u64 {
    let version = object.meta().resource_version.as_deref();
    version.and_then(|version| version.parse().ok()).unwrap_or(0)
}

/// `NAMESPACE/NAME`.
pub fn path(namespace: &str, name: &str) -> Box<str> {
    format!("{namespace}/{name}").into()
}

/// The resource that an object is about: itself, or the one that its labels name.
pub fn subject<K: Cached>(object: &Object<K>) -> Option<Key> {
    let namespace = object.namespace()?;
    if let Some(kind) = K::SUBJECT {
        let name = object.name_any();
        return Some(Key { kind, namespace, name });
    }
    let labels = object.labels();
    Some(Key {
        kind: ResourceKind::from_name(labels.get(labels::KIND)?)?,
        namespace,
        name: labels.get(labels::NAME)?.clone(),
    })
}

impl Store {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A list begins: what is written before this moment will be in it.
    pub fn begin_list(&self) {
        let mut state = self.state();
        state.lists_begun += 1;
        state.listed = 0;
    }

    /// An object of the list under way. It may be shown at once, as it is not older than what was there. Says whether it
    /// tells something new.
    pub fn list<K: Cached>(&self, object: &Object<K>) -> bool {
        let mut state = self.state();
        state.listed = state.listed.max(version(object));
        state.put(object)
    }

    /// The list is whole. Returns which resources the objects were about that are gone.
    pub fn end_list(&self) -> Vec<Arc<Key>> {
        let mut state = self.state();
        state.lists_done = state.lists_begun;
        state.position = state.position.max(state.listed);
        let begun = state.lists_begun;
        let gone = state.objects.iter().filter(|(_, entry)| entry.list < begun);
        let gone: Vec<Box<str>> = gone.map(|(path, _)| path.clone()).collect();
        gone.iter().filter_map(|path| state.remove(path)).collect()
    }

    /// An object was made or changed.
    pub fn apply<K: Cached>(&self, object: &Object<K>) {
        let mut state = self.state();
        state.position = state.position.max(version(object));
        state.put(object);
    }

    /// An object is gone.
    pub fn delete<K: Cached>(&self, object: &Object<K>) {
        let mut state = self.state();
        state.position = state.position.max(version(object));
        state.remove(&path(&object.namespace().unwrap_or_default(), &object.name_any()));
    }

    /// Whether there has been a list.
    pub fn is_filled(&self) -> bool {
        self.state().lists_done > 0
    }

    /// Whether there is an object of this name.
    pub fn contains(&self, namespace: &str, name: &str) -> bool {
        self.state().objects.contains_key(&path(namespace, name))
    }

    /// The object of this name.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<Packed>> {
        let state = self.state();
        state
            .objects
            .get(&path(namespace, name))
            .map(|entry| entry.json.clone())
    }

    /// The objects whose labels name `owner`.
    pub fn owned(&self, owner: &Key) -> Vec<Arc<Packed>> {
        let state = self.state();
        let paths = state.owned.get(owner).into_iter().flatten();
        paths
            .filter_map(|path| Some(state.objects.get(path)?.json.clone()))
            .collect()
    }

    /// The objects of a namespace whose labels name no resource.
    pub fn others(&self, namespace: &str) -> Vec<Arc<Packed>> {
        let state = self.state();
        let begin = path(namespace, "");
        let paths = state
            .others
            .range(begin.clone()..)
            .take_while(|path| path.starts_with(&*begin));
        paths
            .filter_map(|path| Some(state.objects.get(path)?.json.clone()))
            .collect()
    }

    /// Lists that have begun so far: the next one will know what is written now.
    pub fn lists_begun(&self) -> u64 {
        self.state().lists_begun
    }

    /// Whether version `wanted` of an object has been seen, or what came after it; it was written when `lists_begun`
    /// lists had begun.
    pub fn has_seen(&self, wanted: u64, lists_begun: u64) -> bool {
        let state = self.state();
        state.position >= wanted || state.lists_done > lists_begun
    }

    /// Whether the object with this UID is no longer there, or is being removed.
    pub fn has_lost(&self, path: &str, uid: &str, lists_begun: u64) -> bool {
        let state = self.state();
        let there = state.objects.get(path).filter(|entry| *entry.uid == *uid);
        there.is_none_or(|entry| entry.is_deleting) || state.lists_done > lists_begun
    }
}

impl State {
    fn put<K: Cached>(&mut self, object: &Object<K>) -> bool {
        let path = path(&object.namespace().unwrap_or_default(), &object.name_any());
        let version = version(object);
        let list = self.lists_begun;
        if let Some(entry) = self.objects.get_mut(&path)
            && entry.version == version
            && version > 0
        {
            entry.list = list;
            return false;
        }
        self.remove(&path);
        let subject = subject(object).map(|subject| match self.owned.get_key_value(&subject) {
            Some((subject, _)) => subject.clone(),
            None => Arc::new(subject),
        });
        match (&subject, K::SUBJECT) {
            (_, Some(_)) => {}
            (Some(subject), None) => self.owned.entry(subject.clone()).or_default().push(path.clone()),
            (None, None) => drop(self.others.insert(path.clone())),
        }
        let kind = subject.as_ref().map(|subject| subject.kind);
        let entry = Entry {
            json: self.patterns.pack(kind, &object.json).into(),
            uid: object.uid().unwrap_or_default().into(),
            version,
            is_deleting: object.metadata.deletion_timestamp.is_some(),
            subject,
            list,
        };
        self.objects.insert(path, entry);
        true
    }

    /// Takes an object out; which resource it was about.
    fn remove(&mut self, path: &str) -> Option<Arc<Key>> {
        let Some(subject) = self.objects.remove(path)?.subject else {
            self.others.remove(path);
            return None;
        };
        if let Some(paths) = self.owned.get_mut(&subject) {
            paths.retain(|other| **other != *path);
            if paths.is_empty() {
                self.owned.remove(&subject);
            }
        }
        Some(subject)
    }
}

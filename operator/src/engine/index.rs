//! Who refers to whom: a resource that publishes wakes those that wait for it, without a scan of any store.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use super::kind::{Key, Ref, ResourceKind};

/// References of all resources, in both directions.
#[derive(Debug, Default)]
pub struct Index(Mutex<Maps>);

#[derive(Debug, Default)]
struct Maps {
    forward: BTreeMap<Key, Vec<Key>>,
    reverse: BTreeMap<Key, BTreeSet<Key>>,
}

impl Index {
    /// Replaces what `from` refers to. To be called before what it refers to is read: then no publication is missed.
    pub fn set(&self, from: &Key, refs: &[Ref]) {
        let mut maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        maps.remove(from);
        let target = |to: &Ref| Key {
            kind: to.kind,
            namespace: from.namespace.clone(),
            name: to.name.clone(),
        };
        let targets: Vec<Key> = refs.iter().map(target).collect();
        for target in &targets {
            maps.reverse.entry(target.clone()).or_default().insert(from.clone());
        }
        maps.forward.insert(from.clone(), targets);
    }

    /// Forgets what `from` refers to.
    pub fn remove(&self, from: &Key) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(from);
    }

    /// Forgets every resource of which `keep` says no.
    pub fn retain(&self, keep: impl Fn(&Key) -> bool) {
        let mut maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let gone: Vec<Key> = maps.forward.keys().filter(|key| !keep(key)).cloned().collect();
        gone.iter().for_each(|key| maps.remove(key));
    }

    /// Every resource that was reconciled and is still there.
    pub fn all(&self) -> Vec<Key> {
        let maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        maps.forward.keys().cloned().collect()
    }

    /// Who refers to anything of this kind, be it there or not.
    pub fn dependents_of_kind(&self, kind: ResourceKind) -> BTreeSet<Key> {
        let maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_kind = maps.reverse.iter().filter(|(to, _)| to.kind == kind);
        of_kind.flat_map(|(_, dependents)| dependents).cloned().collect()
    }

    /// Who refers to `to`.
    pub fn dependents(&self, to: &Key) -> Vec<Key> {
        let maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        maps.reverse.get(to).into_iter().flatten().cloned().collect()
    }
}

impl Maps {
    fn remove(&mut self, from: &Key) {
        for target in self.forward.remove(from).unwrap_or_default() {
            if let Some(dependents) = self.reverse.get_mut(&target) {
                dependents.remove(from);
                if dependents.is_empty() {
                    self.reverse.remove(&target);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependents_follow_a_change_of_references_and_nothing_is_left_behind() {
        let key = |kind, name: &str| Key {
            kind,
            namespace: "n".into(),
            name: name.into(),
        };
        let to = |kind, name: &str| Ref {
            kind,
            name: name.into(),
        };
        let job = key(ResourceKind::PretrainJob, "j");
        let index = Index::default();
        index.set(&job, &[to(ResourceKind::Dataset, "a"), to(ResourceKind::Dataset, "b")]);
        index.set(&job, &[to(ResourceKind::Dataset, "b")]);
        assert!(index.dependents(&key(ResourceKind::Dataset, "a")).is_empty());
        assert!(index.dependents_of_kind(ResourceKind::Dataset).contains(&job));
        assert!(index.dependents_of_kind(ResourceKind::PretrainJob).is_empty());
        assert_eq!(index.dependents(&key(ResourceKind::Dataset, "b")), index.all());
        assert_eq!(index.all(), [job]);
        index.retain(|_| false);
        let maps = index.0.into_inner().expect("not poisoned");
        assert!(maps.forward.is_empty() && maps.reverse.is_empty());
    }
}

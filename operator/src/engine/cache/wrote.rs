//! Our own last writes, until the caches show them: nothing is decided on what is older.
//!
//! Kubernetes' own Job controller does the same since 1.36. A write is seen when the watch of its type has passed the
//! version that the server answered with, or when a list that began after it is whole. A write whose answer was lost is not
//! known here; names, UIDs and versions in the next one keep it from doing harm.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::store::Store;
use crate::engine::kind::Key;

/// By resource: what was written for it, in which store it will show.
#[derive(Debug, Default)]
pub struct Wrote(Mutex<HashMap<Key, Vec<Expected>>>);

/// A write that a cache is to show.
#[derive(Debug)]
pub struct Expected {
    /// The store's place in [`super::Caches`].
    pub store: usize,
    /// What it is to show.
    pub what: Sight,
    /// Lists of that store that had begun.
    pub lists_begun: u64,
    /// When it was written.
    pub since: Instant,
}

/// What a store is to show.
#[derive(Debug)]
pub enum Sight {
    /// This version of an object, or a later one.
    Version(u64),
    /// That an object with this path and UID is gone, or going.
    Gone(Box<str>, Box<str>),
}

impl Expected {
    fn is_seen(&self, store: &Store) -> bool {
        match &self.what {
            Sight::Version(version) => store.has_seen(*version, self.lists_begun),
            Sight::Gone(path, uid) => store.has_lost(path, uid, self.lists_begun),
        }
    }
}

impl Wrote {
    /// Something was written for `key`.
    pub fn add(&self, key: &Key, expected: Expected) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(key.clone()).or_default().push(expected);
    }

    /// For how long the oldest write for `key` has not been seen; `None` if all have.
    pub fn unseen(&self, key: &Key, stores: &[Store]) -> Option<Duration> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let expected = all.get_mut(key)?;
        expected.retain(|expected| stores.get(expected.store).is_some_and(|store| !expected.is_seen(store)));
        let oldest = expected.iter().map(|expected| expected.since.elapsed()).max();
        if oldest.is_none() {
            all.remove(key);
        }
        oldest
    }

    /// Forgets a resource that is gone.
    pub fn forget(&self, key: &Key) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }

    /// Forgets every resource of which `keep` says no.
    pub fn retain(&self, keep: impl Fn(&Key) -> bool) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|key, _| keep(key));
    }
}

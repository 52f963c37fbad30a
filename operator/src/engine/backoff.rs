//! The pause before a resource is tried again: it doubles with each error in a row.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::kind::Key;

/// First pause after an error; it doubles with each further one of the same resource.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause after errors.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);

/// Errors in a row, by resource.
#[derive(Debug, Default)]
pub struct Failures(Mutex<HashMap<Key, u32>>);

impl Failures {
    /// All went well, or the resource is gone.
    pub fn clear(&self, key: &Key) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }

    /// Forgets every resource of which `keep` says no.
    pub fn retain(&self, keep: impl Fn(&Key) -> bool) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|key, _| keep(key));
    }

    /// One more error; the pause until the next try.
    pub fn pause(&self, key: &Key) -> Duration {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry(key.clone()).or_insert(0);
        *count = count.saturating_add(1);
        FIRST_PAUSE
            .saturating_mul(2_u32.saturating_pow(*count - 1))
            .min(LONGEST_PAUSE)
    }
}

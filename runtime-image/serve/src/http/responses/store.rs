//! Responses that can be fetched and gone on from, for a while: in this process' memory, the oldest give way.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long a response is kept, how many, and in how many bytes of JSON.
const KEPT: Duration = Duration::from_secs(3600);
const MAX_RESPONSES: usize = 4096;
const MAX_BYTES: usize = 64 << 20;

/// A response with the conversation up to and including it.
pub(super) struct Stored {
    pub(super) response: Value,
    pub(super) items: Vec<Value>,
    /// How many of them, from the first on, it answers.
    pub(super) inputs: usize,
}

struct Entry {
    id: String,
    stored: Stored,
    bytes: usize,
    since: Instant,
}

#[derive(Default)]
struct Entries {
    /// The oldest first.
    all: VecDeque<Entry>,
    bytes: usize,
}

/// The responses that are kept.
#[derive(Default)]
pub(crate) struct Store(Mutex<Entries>);

impl Store {
    /// Keeps a response; those that are too old or too many go.
    pub(super) fn insert(&self, stored: Stored) {
        self.insert_at(stored, Instant::now());
    }

    fn insert_at(&self, stored: Stored, now: Instant) {
        let Some(id) = stored.response["id"].as_str().map(str::to_owned) else {
            return;
        };
        let bytes =
            stored.response.to_string().len() + stored.items.iter().map(|item| item.to_string().len()).sum::<usize>();
        let mut entries = self.current(now);
        entries.bytes += bytes;
        entries.all.push_back(Entry {
            id,
            stored,
            bytes,
            since: now,
        });
        while entries.all.len() > MAX_RESPONSES || entries.bytes > MAX_BYTES {
            entries.drop_oldest();
        }
    }

    /// The response.
    pub(super) fn response(&self, id: &str) -> Option<Value> {
        self.find(id, Instant::now(), |stored| stored.response.clone())
    }

    /// The conversation that it ends.
    pub(super) fn items(&self, id: &str) -> Option<Vec<Value>> {
        self.find(id, Instant::now(), |stored| stored.items.clone())
    }

    /// What it answers.
    pub(super) fn inputs(&self, id: &str) -> Option<Vec<Value>> {
        let inputs = |stored: &Stored| stored.items.iter().take(stored.inputs).cloned().collect();
        self.find(id, Instant::now(), inputs)
    }

    fn find<T>(&self, id: &str, now: Instant, take: impl Fn(&Stored) -> T) -> Option<T> {
        let entries = self.current(now);
        let entry = entries.all.iter().find(|entry| entry.id == id)?;
        Some(take(&entry.stored))
    }

    /// Forgets a response. False if there was none.
    pub(super) fn remove(&self, id: &str) -> bool {
        let mut entries = self.current(Instant::now());
        let Some(at) = entries.all.iter().position(|entry| entry.id == id) else {
            return false;
        };
        if let Some(entry) = entries.all.remove(at) {
            entries.bytes -= entry.bytes;
        }
        true
    }

    /// Those that are not too old.
    fn current(&self, now: Instant) -> MutexGuard<'_, Entries> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while entries
            .all
            .front()
            .is_some_and(|entry| now.saturating_duration_since(entry.since) > KEPT)
        {
            entries.drop_oldest();
        }
        entries
    }
}

impl Entries {
    fn drop_oldest(&mut self) {
        if let Some(entry) = self.all.pop_front() {
            self.bytes -= entry.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_oldest_go_when_they_are_too_old_too_many_or_too_large() {
        let stored = |id: usize, text: String| Stored {
            response: json!({ "id": id.to_string() }),
            items: vec![json!(text)],
            inputs: 1,
        };
        let (store, now) = (Store::default(), Instant::now());
        for id in 0..MAX_RESPONSES + 10 {
            store.insert_at(stored(id, String::new()), now);
        }
        assert!(store.response("9").is_none() && store.response("10").is_some());
        assert!(store.remove("10") && !store.remove("10"));
        store.insert_at(stored(1_000_000, "x".repeat(MAX_BYTES - 100)), now);
        let left = |now: Instant| store.current(now).all.len();
        assert!((1..20).contains(&left(now)), "{}", left(now));
        assert!(store.items("1000000").is_some());
        assert_eq!(left(now + KEPT + Duration::from_secs(1)), 0);
        assert_eq!(store.current(now).bytes, 0);
    }
}

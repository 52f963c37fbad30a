//! Which resources of a kind are to be looked at, each once however often it was woken, and never twice at a time.
//!
//! It is bounded by the resources that there are. A resource that is woken while it is looked at is looked at again.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::kind::Key;

/// The resources of one kind that wait.
#[derive(Debug, Default)]
pub struct Queue {
    state: Mutex<State>,
    news: Notify,
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<Key>,
    standing: HashMap<Key, Standing>,
    timers: BTreeMap<(Instant, u64), Key>,
    /// Tells timers of one moment apart.
    timer: u64,
}

#[derive(Clone, Copy, Debug)]
enum Standing {
    Ready,
    Running { again: bool },
    Waiting((Instant, u64)),
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `key` is to be looked at now.
    pub fn wake(&self, key: Key) {
        let mut state = self.state();
        match state.standing.get_mut(&key) {
            Some(Standing::Ready) => return,
            Some(Standing::Running { again }) => {
                *again = true;
                return;
            }
            Some(Standing::Waiting(timer)) => {
                let timer = *timer;
                state.timers.remove(&timer);
            }
            None => {}
        }
        state.make_ready(key);
        drop(state);
        self.news.notify_one();
    }

    /// The next one to be looked at; [`Queue::done`] is to follow.
    pub async fn next(&self) -> Key {
        loop {
            let until = {
                let mut state = self.state();
                state.ring(Instant::now());
                if let Some(key) = state.ready.pop_front() {
                    state.standing.insert(key.clone(), Standing::Running { again: false });
                    if !state.ready.is_empty() {
                        self.news.notify_one();
                    }
                    return key;
                }
                state.timers.first_key_value().map(|((until, _), _)| *until)
            };
            match until {
                Some(until) => {
                    // Either way the state is read again.
                    let _ = tokio::time::timeout_at(until, self.news.notified()).await;
                }
                None => self.news.notified().await,
            }
        }
    }

    /// `key` has been looked at, and is to be again after `pause`; absent: when it is woken.
    pub fn done(&self, key: Key, pause: Option<Duration>) {
        let mut state = self.state();
        let again = matches!(state.standing.get(&key), Some(Standing::Running { again: true }));
        match (again, pause) {
            (true, _) => state.make_ready(key),
            (false, None) => drop(state.standing.remove(&key)),
            (false, Some(pause)) => {
                state.timer += 1;
                let timer = (Instant::now() + pause, state.timer);
                state.timers.insert(timer, key.clone());
                state.standing.insert(key, Standing::Waiting(timer));
            }
        }
        drop(state);
        // Also for a timer: whoever waits may wait for a later one.
        self.news.notify_one();
    }

    /// Resources that are to be looked at now, or are.
    pub fn busy(&self) -> usize {
        let mut state = self.state();
        state.ring(Instant::now());
        state.standing.len() - state.timers.len()
    }
}

impl State {
    fn make_ready(&mut self, key: Key) {
        self.standing.insert(key.clone(), Standing::Ready);
        self.ready.push_back(key);
    }

    /// Moves what is due.
    fn ring(&mut self, now: Instant) {
        while let Some(first) = self.timers.first_entry()
            && first.key().0 <= now
        {
            let key = first.remove();
            self.make_ready(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::kind::ResourceKind;
    use crate::fixtures::key;

    #[tokio::test]
    async fn a_resource_is_looked_at_once_however_often_it_is_woken_and_again_if_it_was_meanwhile() {
        let (a, b) = (key(ResourceKind::Dataset, "a"), key(ResourceKind::Dataset, "b"));
        let queue = Queue::default();
        for woken in [&a, &b, &a] {
            queue.wake(woken.clone());
        }
        assert_eq!((queue.next().await, queue.next().await), (a.clone(), b.clone()));
        queue.wake(a.clone());
        queue.wake(a.clone());
        assert!(queue.state().ready.is_empty(), "nothing is looked at twice at a time");
        queue.done(a.clone(), Some(Duration::from_secs(60)));
        assert_eq!(queue.next().await, a, "it was woken meanwhile");
        queue.done(a.clone(), Some(Duration::from_secs(60)));
        queue.done(b.clone(), Some(Duration::from_millis(5)));
        assert_eq!(queue.next().await, b, "its pause is shorter");
        queue.done(b.clone(), None);
        assert_eq!(queue.busy(), 0);
        queue.wake(a.clone());
        assert_eq!(queue.next().await, a, "who is woken does not wait for its pause");
        queue.done(a.clone(), None);
        let state = queue.state();
        assert!(
            state.standing.is_empty() && state.timers.is_empty() && state.ready.is_empty(),
            "nothing is kept of what does not wait"
        );
    }
}

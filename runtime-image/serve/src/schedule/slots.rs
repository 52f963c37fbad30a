//! The disk's slots: whose content lies in which, and which one gives way to another.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::blocks::Key;

#[derive(Debug, Default)]
struct Slot {
    /// Whose content it is, if it has one.
    key: Option<Arc<Key>>,
    /// Requests that wait for its content: until they have it, it stays.
    readers: u32,
    /// When it was filled or read last.
    used: u64,
}

/// Slots come into being when they are first needed: a large disk costs memory only as it fills.
#[derive(Debug)]
pub(super) struct Slots {
    most: usize,
    slots: Vec<Slot>,
    /// Without content, and without readers.
    empty: Vec<u32>,
    /// With content and without readers, by time of use: the oldest gives way first.
    idle: BTreeMap<u64, u32>,
    clock: u64,
}

impl Slots {
    pub(super) fn new(most: usize) -> Self {
        Slots {
            most,
            slots: Vec::new(),
            empty: Vec::new(),
            idle: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Whether there is a disk at all.
    pub(super) fn any(&self) -> bool {
        self.most > 0
    }

    /// Slots in use.
    pub(super) fn used(&self) -> usize {
        self.slots.len() - self.empty.len()
    }

    /// A slot for a content; with it, the content that gives way. `None` if all are being read, or there is no disk.
    pub(super) fn take(&mut self, key: Arc<Key>) -> Option<(u32, Option<Arc<Key>>)> {
        let (id, gone) = match self.empty.pop() {
            _ if self.most == 0 => return None,
            Some(id) => (id, None),
            None if self.slots.len() < self.most => {
                self.slots.push(Slot::default());
                (self.slots.len() as u32 - 1, None)
            }
            None => {
                let (_, id) = self.idle.pop_first()?;
                (id, self.slots[id as usize].key.take())
            }
        };
        self.slots[id as usize].key = Some(key);
        self.rest(id);
        Some((id, gone))
    }

    fn rest(&mut self, id: u32) {
        self.clock += 1;
        self.slots[id as usize].used = self.clock;
        self.idle.insert(self.clock, id);
    }

    /// What it holds is of use: it counts as filled now.
    pub(super) fn touch(&mut self, id: u32) {
        let slot = &self.slots[id as usize];
        if slot.readers == 0 && slot.key.is_some() {
            self.idle.remove(&slot.used);
            self.rest(id);
        }
    }

    /// Its content stays until it was let go as often.
    pub(super) fn hold(&mut self, id: u32) {
        let slot = &mut self.slots[id as usize];
        if slot.readers == 0 {
            self.idle.remove(&slot.used);
        }
        slot.readers += 1;
    }

    /// Lets several go. The last one counts as used first, so that the beginning of a prompt stays longest.
    pub(super) fn let_go(&mut self, ids: &[u32]) {
        for id in ids.iter().rev() {
            let slot = &mut self.slots[*id as usize];
            slot.readers -= 1;
            match (slot.readers, &slot.key) {
                (0, Some(_)) => self.rest(*id),
                (0, None) => self.empty.push(*id),
                _ => {}
            }
        }
    }

    pub(super) fn key(&self, id: u32) -> Option<&Arc<Key>> {
        self.slots[id as usize].key.as_ref()
    }

    /// Its content is lost: whose it was.
    pub(super) fn clear(&mut self, id: u32) -> Option<Arc<Key>> {
        let slot = &mut self.slots[id as usize];
        let key = slot.key.take()?;
        if slot.readers == 0 {
            self.idle.remove(&slot.used);
            self.empty.push(id);
        }
        Some(key)
    }

    /// There is no disk any more: whose contents it had.
    pub(super) fn close(&mut self) -> Vec<Arc<Key>> {
        self.most = 0;
        (0..self.slots.len() as u32).filter_map(|id| self.clear(id)).collect()
    }

    #[cfg(test)]
    pub(super) fn check(&self) {
        let count = |wanted: fn(&Slot) -> bool| self.slots.iter().filter(|slot| wanted(slot)).count();
        assert_eq!(self.idle.len(), count(|slot| slot.key.is_some() && slot.readers == 0));
        assert_eq!(self.empty.len(), count(|slot| slot.key.is_none() && slot.readers == 0));
        for (used, id) in &self.idle {
            assert_eq!(self.slots[*id as usize].used, *used);
        }
    }

    #[cfg(test)]
    pub(super) fn readers(&self) -> u32 {
        self.slots.iter().map(|slot| slot.readers).sum()
    }
}

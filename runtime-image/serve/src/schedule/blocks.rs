//! The cache's blocks: who holds which, and which free ones still have content worth finding again.
//!
//! A full block's content is named by a number; the index maps (name of the block before, this block's tokens) to a block.
//! The chain makes a hit mean "the same tokens from the very beginning, with the same salt", and because they are compared
//! and not hashed, no two prompts can be mistaken for each other. A name is never used twice, so entries behind an evicted block are
//! never found again and age out.
//!
//! With a disk, a content that loses its block goes to a slot there and keeps its name, so what stands behind it is still found.
//! One that is read back keeps its slot, too: it need not be written again.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::Spill;
use super::slots::Slots;

/// Contents that are copied to the disk in a step while they still have their blocks: few, as they cost time that a step takes
/// longer. Without them a long prompt, which takes its blocks all at once, would find more to copy than there is room for.
const AHEAD: usize = 2;
/// They are, while fewer than one in so many blocks is empty: before, nothing is about to be lost.
const SCARCE: usize = 4;

/// Names a content: what stands before it, and its tokens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    before: Before,
    tokens: Box<[u32]>,
}

/// What stands before a block.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Before {
    /// Nothing: a beginning, of those who have this salt.
    Start(Arc<[u8]>),
    /// The content with this name.
    Content(u64),
}

impl Key {
    fn new(salt: &Arc<[u8]>, before: u64, tokens: &[u32]) -> Self {
        let before = match before {
            0 => Before::Start(salt.clone()),
            name => Before::Content(name),
        };
        Key {
            before,
            tokens: tokens.into(),
        }
    }
}

/// Where a content is: in a block, in a slot of the disk, or in both.
#[derive(Debug)]
struct Place {
    name: u64,
    block: Option<u32>,
    slot: Option<u32>,
}

/// A part of a prompt that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// In this block, which is held now.
    Block(u32),
    /// In this slot, which is held now; the name of its content.
    Slot(u32, u64),
}

#[derive(Debug, Default)]
struct Block {
    holders: u32,
    content: Option<Arc<Key>>,
    /// When it was released, while nobody holds it and it has content.
    released: u64,
}

#[derive(Debug)]
pub(super) struct BlockPool {
    blocks: Vec<Block>,
    /// Nobody holds them, and they have no content.
    empty: Vec<u32>,
    /// Nobody holds them, but they have content: by time of release, the oldest is reused first.
    idle: BTreeMap<u64, u32>,
    index: HashMap<Arc<Key>, Place>,
    slots: Slots,
    /// Contents that have just lost their blocks, which nobody has written to yet; the last one stands first in its prompt.
    evicted: Vec<(u32, Arc<Key>, u64)>,
    /// Blocks whose content was never copied to the disk, by its name: the beginning of a prompt comes first.
    unsaved: BTreeMap<u64, u32>,
    clock: u64,
    next_name: u64,
}

impl BlockPool {
    /// A pool of blocks, over a disk with as many slots.
    pub(super) fn new(blocks: usize, slots: usize) -> Self {
        BlockPool {
            blocks: (0..blocks).map(|_| Block::default()).collect(),
            empty: (0..blocks as u32).rev().collect(),
            idle: BTreeMap::new(),
            index: HashMap::new(),
            slots: Slots::new(slots),
            evicted: Vec::new(),
            unsaved: BTreeMap::new(),
            clock: 0,
            next_name: 1, // 0 stands before every first block
        }
    }

    /// Blocks that [`BlockPool::allocate`] can give.
    pub(super) fn available(&self) -> usize {
        self.empty.len() + self.idle.len()
    }

    pub(super) fn allocate(&mut self) -> Option<u32> {
        let id = match self.empty.pop() {
            Some(id) => id,
            None => {
                let (_, id) = self.idle.pop_first()?;
                self.evict(id);
                id
            }
        };
        self.blocks[id as usize].holders = 1;
        Some(id)
    }

    fn evict(&mut self, id: u32) {
        let key = self.blocks[id as usize].content.take();
        let key = key.expect("an idle block has content");
        let place = self.index.get_mut(&key).expect("a content is indexed");
        place.block = None;
        let (name, slot) = (place.name, place.slot);
        if let Some(slot) = slot {
            self.slots.touch(slot); // the disk has it already
            return;
        }
        self.index.remove(&key);
        self.unsaved.remove(&name);
        if self.slots.any() {
            self.evicted.push((id, key, name));
        }
    }

    /// Which blocks are to be copied to which slots before anything is written to a block, at most `room` of them. Whatever else
    /// was evicted is lost.
    pub(super) fn spill(&mut self, room: usize) -> Vec<Spill> {
        let mut spills = Vec::new();
        // The last ones, as without the beginning of a prompt its end is of no use.
        let evicted = std::mem::take(&mut self.evicted);
        let lost = evicted.len().saturating_sub(room);
        for (block, key, name) in evicted.into_iter().skip(lost) {
            let Some(slot) = self.take_slot(&key) else { break };
            let place = Place {
                name,
                block: None,
                slot: Some(slot),
            };
            self.index.insert(key, place);
            spills.push(Spill {
                block,
                slot,
                content: name,
            });
        }
        let ahead = match self.empty.len() * SCARCE < self.blocks.len() {
            true => AHEAD.min(room - spills.len()),
            false => 0,
        };
        for _ in 0..ahead {
            let Some((content, block)) = self.unsaved.pop_first() else {
                break;
            };
            let key = self.blocks[block as usize].content.clone();
            let key = key.expect("what could be saved is a content");
            let Some(slot) = self.take_slot(&key) else { break };
            self.index.get_mut(&key).expect("a content is indexed").slot = Some(slot);
            spills.push(Spill { block, slot, content });
        }
        spills
    }

    /// A slot for a content, from which another one gives way.
    fn take_slot(&mut self, key: &Arc<Key>) -> Option<u32> {
        let (slot, gone) = self.slots.take(key.clone())?;
        gone.into_iter().for_each(|key| self.fell_off(&key));
        Some(slot)
    }

    /// The disk no longer has a content.
    fn fell_off(&mut self, key: &Arc<Key>) {
        let place = self.index.get_mut(key).expect("a content is indexed");
        place.slot = None;
        if place.block.is_none() {
            self.index.remove(key);
        }
    }

    /// Slots in use.
    pub(super) fn slots_used(&self) -> usize {
        self.slots.used()
    }

    /// There is no disk any more.
    pub(super) fn close_disk(&mut self) {
        self.evicted.clear();
        self.unsaved.clear();
        self.slots.close().iter().for_each(|key| self.fell_off(key));
    }

    /// Slots that were found are no longer needed.
    pub(super) fn let_go(&mut self, slots: &[u32]) {
        self.slots.let_go(slots);
    }

    /// The content of a slot, which is held, has been copied to a block.
    pub(super) fn loaded(&mut self, slot: u32, block: u32) {
        // Another reader may have found it damaged, and another request may have computed it meanwhile.
        let Some(key) = self.slots.key(slot) else { return };
        let place = self.index.get_mut(key).expect("a content is indexed");
        if place.block.is_none() {
            place.block = Some(block);
            self.blocks[block as usize].content = Some(key.clone());
        }
    }

    /// The content of a slot could not be read.
    pub(super) fn lost(&mut self, slot: u32) {
        if let Some(key) = self.slots.clear(slot) {
            self.fell_off(&key);
        }
    }

    /// Gives up a table. The last block goes first, so that the beginning of a prompt stays longest.
    pub(super) fn release_all(&mut self, table: &[u32]) {
        for id in table.iter().rev() {
            let block = &mut self.blocks[*id as usize];
            block.holders -= 1;
            if block.holders > 0 {
                continue;
            }
            if block.content.is_some() {
                self.clock += 1;
                block.released = self.clock;
                self.idle.insert(self.clock, *id);
            } else {
                self.empty.push(*id);
            }
        }
    }

    /// Another table has the same blocks.
    pub(super) fn hold_all(&mut self, table: &[u32]) {
        for id in table {
            self.blocks[*id as usize].holders += 1;
        }
    }

    /// Whether several tables have this block.
    pub(super) fn is_shared(&self, id: u32) -> bool {
        self.blocks[id as usize].holders > 1
    }

    /// Takes the longest chain of up to `most` contents that are the beginning of `tokens`; with it, the name of the last one.
    pub(super) fn take_prefix(
        &mut self,
        salt: &Arc<[u8]>,
        tokens: &[u32],
        size: usize,
        most: usize,
    ) -> (Vec<Found>, u64) {
        let (mut taken, mut name) = (Vec::new(), 0);
        for tokens in tokens.chunks_exact(size).take(most) {
            let Some(place) = self.index.get(&Key::new(salt, name, tokens)) else {
                break;
            };
            name = place.name;
            taken.push(match (place.block, place.slot) {
                (Some(id), _) => {
                    let block = &mut self.blocks[id as usize];
                    if block.holders == 0 {
                        self.idle.remove(&block.released);
                    }
                    block.holders += 1;
                    Found::Block(id)
                }
                (None, slot) => {
                    let slot = slot.expect("a content is in a block or in a slot");
                    self.slots.hold(slot);
                    Found::Slot(slot, name)
                }
            });
        }
        (taken, name)
    }

    /// Makes a full block findable as the continuation of the content named `before`, or as a beginning if that is 0; returns
    /// the name of its own content.
    /// If another block has the same content already, that one stays the one to find.
    pub(super) fn register(&mut self, id: u32, salt: &Arc<[u8]>, before: u64, tokens: &[u32]) -> u64 {
        match self.index.entry(Arc::new(Key::new(salt, before, tokens))) {
            Entry::Occupied(mut entry) => {
                if entry.get().block.is_none() {
                    self.blocks[id as usize].content = Some(entry.key().clone());
                    entry.get_mut().block = Some(id);
                }
                entry.get().name
            }
            Entry::Vacant(entry) => {
                let name = self.next_name;
                self.next_name += 1;
                self.blocks[id as usize].content = Some(entry.key().clone());
                entry.insert(Place {
                    name,
                    block: Some(id),
                    slot: None,
                });
                if self.slots.any() {
                    self.unsaved.insert(name, id);
                }
                name
            }
        }
    }

    #[cfg(test)]
    pub(super) fn holders(&self) -> Vec<u32> {
        self.blocks.iter().map(|block| block.holders).collect()
    }

    #[cfg(test)]
    pub(super) fn readers(&self) -> u32 {
        self.slots.readers()
    }

    #[cfg(test)]
    pub(super) fn check(&self) {
        assert_eq!(
            self.available(),
            self.blocks.iter().filter(|block| block.holders == 0).count(),
            "a block was lost or given twice"
        );
        let count = |wanted: fn(&Place) -> bool| self.index.values().filter(|place| wanted(place)).count();
        assert_eq!(
            count(|place| place.block.is_some()),
            self.blocks.iter().filter(|block| block.content.is_some()).count()
        );
        assert_eq!(count(|place| place.block.is_none() && place.slot.is_none()), 0);
        for (key, place) in &self.index {
            if let Some(id) = place.block {
                assert_eq!(self.blocks[id as usize].content.as_ref(), Some(key));
            }
            if let Some(slot) = place.slot {
                assert_eq!(self.slots.key(slot), Some(key));
            }
        }
        for (name, id) in &self.unsaved {
            let key = self.blocks[*id as usize].content.as_ref().unwrap();
            assert_eq!((self.index[key].name, self.index[key].slot), (*name, None));
        }
        self.slots.check();
    }
}

//! The cache's blocks: who holds which, and which free ones still have content worth finding again.
//!
//! A full block's content is named by a number; the index maps (name of the block before, this block's tokens) to a block.
//! The chain makes a hit mean "the same tokens from the very beginning, with the same salt", and because they are compared
//! and not hashed, no two prompts can be mistaken for each other. A name is never used twice, so entries behind an evicted block are
//! never found again and age out.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Names the content of a block: what stands before it, and its tokens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
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

#[derive(Debug)]
struct Content {
    key: Key,
    name: u64,
}

#[derive(Debug, Default)]
struct Block {
    holders: u32,
    content: Option<Content>,
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
    index: HashMap<Key, u32>,
    clock: u64,
    next_name: u64,
}

impl BlockPool {
    pub(super) fn new(count: usize) -> Self {
        BlockPool {
            blocks: (0..count).map(|_| Block::default()).collect(),
            empty: (0..count as u32).rev().collect(),
            idle: BTreeMap::new(),
            index: HashMap::new(),
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
                let content = self.blocks[id as usize]
                    .content
                    .take()
                    .expect("an idle block has content");
                self.index.remove(&content.key);
                id
            }
        };
        self.blocks[id as usize].holders = 1;
        Some(id)
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

    /// Takes the longest chain of up to `most` blocks whose content is the beginning of `tokens`; with it, the name of the
    /// last one's content.
    pub(super) fn take_prefix(
        &mut self,
        salt: &Arc<[u8]>,
        tokens: &[u32],
        size: usize,
        most: usize,
    ) -> (Vec<u32>, u64) {
        let (mut taken, mut name) = (Vec::new(), 0);
        for tokens in tokens.chunks_exact(size).take(most) {
            let Some(id) = self.index.get(&Key::new(salt, name, tokens)).copied() else {
                break;
            };
            let block = &mut self.blocks[id as usize];
            if block.holders == 0 {
                self.idle.remove(&block.released);
            }
            block.holders += 1;
            name = block.content.as_ref().expect("an indexed block has content").name;
            taken.push(id);
        }
        (taken, name)
    }

    /// Makes a full block findable as the continuation of the content named `before`, or as a beginning if that is 0; returns
    /// the name of its own content.
    /// If another block has the same content already, that one stays the one to find.
    pub(super) fn register(&mut self, id: u32, salt: &Arc<[u8]>, before: u64, tokens: &[u32]) -> u64 {
        let key = Key::new(salt, before, tokens);
        if let Some(other) = self.index.get(&key) {
            return self.blocks[*other as usize]
                .content
                .as_ref()
                .expect("an indexed block has content")
                .name;
        }
        let name = self.next_name;
        self.next_name += 1;
        self.index.insert(key.clone(), id);
        self.blocks[id as usize].content = Some(Content { key, name });
        name
    }

    #[cfg(test)]
    pub(super) fn holders(&self) -> Vec<u32> {
        self.blocks.iter().map(|block| block.holders).collect()
    }

    #[cfg(test)]
    pub(super) fn check(&self) {
        assert_eq!(
            self.available(),
            self.blocks.iter().filter(|block| block.holders == 0).count(),
            "a block was lost or given twice"
        );
        assert_eq!(
            self.index.len(),
            self.blocks.iter().filter(|block| block.content.is_some()).count()
        );
        for (key, id) in &self.index {
            assert_eq!(&self.blocks[*id as usize].content.as_ref().unwrap().key, key);
        }
    }
}

//! Which tokens the next forward pass computes: pure, without tensors, clocks or HTTP.
//!
//! ```text
//!            add                    schedule: blocks are free          remove (done, cancelled)
//!  client ─────────▶ waiting ───────────────────────────▶ running ─────────────────────────────▶ gone, blocks free
//!                       ▲                                   │ ▲
//!                       └───────────────────────────────────┘ └── fork: another choice of the same prompt
//!                         preempted: blocks taken, computed again later
//! ```
//! A request whose prompt begins with what lies on the disk has its blocks and its place while that is read, and is computed
//! once it is there. What could not be read sends it back to wait: then it finds less, and computes the rest.
//!
//! Every step has a budget of tokens. Requests that produce take one each, first; prompts share the rest in chunks; drafts
//! get what is left. Who runs is decided between clients ([`fair`]). When blocks run out, the last running request in the
//! order of priority and arrival gives its up and is computed again later: the engine's results do not depend on the batch,
//! so it continues with the same bits.

mod blocks;
mod fair;
mod plan;
mod slots;

use std::collections::HashMap;
use std::sync::Arc;

use blocks::BlockPool;
pub use fair::{ClientId, PRIORITIES};
use fair::{Clients, Order};

/// Names a request: one choice of it, where it has several.
pub type RequestId = u64;

/// What bounds the scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests that run at once.
    pub max_sequences: usize,
    /// Tokens that a step computes.
    pub max_batched_tokens: usize,
    /// Requests that wait; the engine takes no more.
    pub max_waiting: usize,
    /// Tokens in a block.
    pub block_tokens: usize,
    /// Blocks in the cache.
    pub blocks: usize,
    /// Keep the blocks of finished requests and reuse them for prompts that begin alike.
    pub prefix_caching: bool,
    /// Slots on the disk, each for what a block holds; none without prefix caching.
    pub spill_slots: usize,
}

/// A request that could not run even alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the whole cache holds {most} tokens")]
pub struct TooLong {
    /// Tokens that the whole cache holds.
    pub most: usize,
}

/// A request as the scheduler sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewRequest {
    /// The prompt's tokens; not empty.
    pub prompt: Vec<u32>,
    /// The most tokens that it will have, prompt included.
    pub max_total: usize,
    /// How many choices it will be forked into; they run at once, so at most [`Limits::max_sequences`].
    pub choices: usize,
    /// Requests find each other's prompts in the prefix cache if they have the same salt.
    pub salt: Arc<[u8]>,
    /// Who shares fairly with the others.
    pub client: ClientId,
    /// Lower is earlier; what lies outside of [`PRIORITIES`] counts as the nearest inside.
    pub priority: i64,
    /// The most tokens that are drafted ahead of a step.
    pub drafts: usize,
    /// Every token of the prompt is computed, whatever the prefix cache has.
    pub whole_prompt: bool,
}

impl NewRequest {
    /// One choice, no salt, nothing drafted, of no client in particular.
    pub fn new(prompt: Vec<u32>, max_total: usize) -> Self {
        NewRequest {
            prompt,
            max_total,
            choices: 1,
            salt: Arc::from([]),
            client: ClientId::default(),
            whole_prompt: false,
            priority: 0,
            drafts: 0,
        }
    }
}

/// A piece of work in a step: compute `count` tokens of `id` from `start` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// The request.
    pub id: RequestId,
    /// The first position to compute.
    pub start: usize,
    /// How many positions.
    pub count: usize,
    /// The last of them is the request's last known token: its logits give the next one.
    pub samples: bool,
    /// Up to that many drafted tokens may be computed behind it; they have blocks.
    pub drafts: usize,
}

/// What a block holds goes to a slot of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spill {
    /// From where.
    pub block: u32,
    /// To where.
    pub slot: u32,
    /// Names what it is; nothing else ever has the same name.
    pub content: u64,
}

/// What a slot of the disk holds goes to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// For which request.
    pub id: RequestId,
    /// And which of its attempts to run.
    pub attempt: u64,
    /// From where.
    pub slot: u32,
    /// What must be there.
    pub content: u64,
    /// To where.
    pub block: u32,
}

/// What a forward pass computes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Blocks that are copied out before anything is written to a block.
    pub spills: Vec<Spill>,
    /// Slots to be read behind that, in this order; each is reported with [`Scheduler::loaded`], whenever it has been.
    pub loads: Vec<Load>,
    /// Blocks whose content is copied before anything is computed, from and to, in this order.
    pub copies: Vec<(u32, u32)>,
    /// The tokens.
    pub work: Vec<Work>,
}

/// Running counts, for the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Times that a running request lost its blocks.
    pub preemptions: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Prompt tokens found there.
    pub prefix_hits: u64,
    /// Prompt tokens that were not, and were looked up on the disk.
    pub disk_queries: u64,
    /// Prompt tokens that came from there.
    pub disk_hits: u64,
}

/// A request that waits for blocks from the disk.
#[derive(Clone, Debug)]
struct Loading {
    attempt: u64,
    /// The slots that it holds.
    slots: Vec<u32>,
    /// How many were not read yet.
    left: usize,
    /// Blocks that are known then, and the name of the last one's content.
    known: usize,
    content: u64,
}

#[derive(Clone, Debug)]
struct Request {
    tokens: Vec<u32>,
    /// Tokens of the prompt.
    prompt: usize,
    max_total: usize,
    /// Places that it takes when it runs: its choices, until it is forked.
    width: usize,
    salt: Arc<[u8]>,
    client: ClientId,
    priority: i64,
    order: Order,
    drafts: usize,
    /// Every token of the prompt is computed, whatever the prefix cache has.
    whole_prompt: bool,
    /// Tokens whose keys and values are in the cache.
    computed: usize,
    /// Prompt tokens that its client was charged for: computing them again is not its fault.
    charged: usize,
    table: Vec<u32>,
    /// Full blocks that the prefix cache knows, and the name of the last one's content.
    known: usize,
    content: u64,
    /// Prompt tokens that came from the prefix cache; known once it was admitted for the first time. What a preempted
    /// request finds later is mostly its own, and would count as a hit what is only lost and found.
    cached: Option<usize>,
    /// What it waits for, if it waits for the disk.
    loading: Option<Loading>,
}

/// The scheduler.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    requests: HashMap<RequestId, Request>,
    clients: Clients,
    /// In order: the last one is the first to lose its blocks.
    running: Vec<Order>,
    /// Places taken by what runs.
    places: usize,
    counts: Counts,
    /// Times that a request began to wait for the disk.
    attempts: u64,
}

impl Scheduler {
    /// A scheduler over an empty cache.
    pub fn new(limits: Limits) -> Self {
        Scheduler {
            pool: BlockPool::new(limits.blocks, limits.spill_slots),
            limits,
            requests: HashMap::new(),
            clients: Clients::default(),
            running: Vec::new(),
            places: 0,
            counts: Counts::default(),
            attempts: 0,
        }
    }

    /// Takes a request.
    pub fn add(&mut self, id: RequestId, new: NewRequest) -> Result<(), TooLong> {
        let most = self.limits.blocks * self.limits.block_tokens;
        if new.max_total.max(new.prompt.len()) > most {
            return Err(TooLong { most });
        }
        let priority = new.priority.clamp(*PRIORITIES.start(), *PRIORITIES.end());
        let request = Request {
            prompt: new.prompt.len(),
            tokens: new.prompt,
            max_total: new.max_total,
            width: new.choices.clamp(1, self.limits.max_sequences.max(1)),
            salt: new.salt,
            client: new.client,
            priority,
            order: self.clients.arrive(new.client, priority, id),
            drafts: new.drafts,
            whole_prompt: new.whole_prompt,
            computed: 0,
            charged: 0,
            table: Vec::new(),
            known: 0,
            content: 0,
            cached: None,
            loading: None,
        };
        let before = self.requests.insert(id, request);
        assert!(before.is_none(), "request {id} is there already");
        Ok(())
    }

    /// Makes `child` another choice of `parent`, whose prompt has just been computed and which has no token besides it: it
    /// shares all of its blocks, and gets its own when one of the two writes.
    pub fn fork(&mut self, parent: RequestId, child: RequestId) {
        let Some(request) = self.requests.get_mut(&parent) else {
            return;
        };
        assert!(request.width > 1, "request {parent} has no choice left to fork");
        request.width -= 1;
        let mut request = request.clone();
        request.width = 1;
        request.order = request.order.of(child);
        self.pool.hold_all(&request.table);
        self.clients.forked(request.client);
        let at = self.running.partition_point(|other| *other < request.order);
        self.running.insert(at, request.order);
        let before = self.requests.insert(child, request);
        assert!(before.is_none(), "request {child} is there already");
    }

    /// Forgets a request, wherever it is; its blocks are free at once.
    pub fn remove(&mut self, id: RequestId) {
        let Some(request) = self.requests.remove(&id) else {
            return;
        };
        self.pool.release_all(&request.table);
        if let Some(loading) = &request.loading {
            self.pool.let_go(&loading.slots);
        }
        match self.running.binary_search(&request.order) {
            Ok(at) => {
                self.running.remove(at);
                self.places -= request.width;
                self.clients.stopped(request.client, request.width);
            }
            Err(_) => self.clients.withdraw(request.client, request.order),
        }
        self.clients.left(request.client);
    }

    /// Reports that `work` has been computed. Blocks that are now full become available as prefixes.
    pub fn computed(&mut self, work: &Work) {
        let Some(request) = self.requests.get_mut(&work.id) else {
            return;
        };
        request.computed = work.start + work.count;
        let charged = request.computed.min(request.prompt);
        if charged > request.charged {
            let new = charged - request.charged.max(work.start);
            request.charged = charged;
            self.clients.charge(request.client, new as u64);
        }
        self.register(work.id);
    }

    /// Appends the tokens that a step sampled for a request. All but the last had been drafted, and are computed.
    pub fn append(&mut self, id: RequestId, tokens: &[u32]) {
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        request.tokens.extend_from_slice(tokens);
        request.computed += tokens.len().saturating_sub(1);
        self.clients
            .charge(request.client, tokens.len() as u64 * fair::TOKEN_COST);
        self.register(id);
    }

    /// Whether anybody still waits for this.
    pub fn is_wanted(&self, load: &Load) -> bool {
        let loading = self.requests.get(&load.id).and_then(|request| request.loading.as_ref());
        loading.is_some_and(|loading| loading.attempt == load.attempt)
    }

    /// Reports that a slot was read, or could not be. True if its block must have the content before the next step is computed.
    pub fn loaded(&mut self, load: &Load, is_whole: bool) -> bool {
        if !self.is_wanted(load) {
            return false; // whoever waited for it has gone, or lost the block
        }
        if !is_whole {
            self.pool.lost(load.slot);
            self.send_back(load.id);
            return false;
        }
        self.pool.loaded(load.slot, load.block);
        let request = self.requests.get_mut(&load.id).expect("it waits");
        let is_last = request.loading.as_mut().is_some_and(|loading| {
            loading.left -= 1;
            loading.left == 0
        });
        if let Some(loading) = request.loading.take_if(|_| is_last) {
            self.pool.let_go(&loading.slots);
            self.begin(load.id, loading.known, loading.slots.len(), loading.content);
        }
        true
    }

    /// There is no disk any more: what was on it is forgotten, and whoever waited for it computes.
    pub fn close_disk(&mut self) {
        let waiting = self.running.iter().map(|order| order.id);
        let waiting: Vec<RequestId> = waiting.filter(|id| self.requests[id].loading.is_some()).collect();
        waiting.into_iter().for_each(|id| self.send_back(id));
        self.pool.close_disk();
    }

    /// Whether a request waits for the disk.
    pub fn is_loading(&self) -> bool {
        let mut running = self.running.iter();
        running.any(|order| self.requests[&order.id].loading.is_some())
    }

    /// Slots of the disk in use.
    pub fn slots_used(&self) -> usize {
        self.pool.slots_used()
    }

    /// Makes the full blocks of a request findable.
    fn register(&mut self, id: RequestId) {
        if !self.limits.prefix_caching {
            return;
        }
        let size = self.limits.block_tokens;
        let request = self.requests.get_mut(&id).expect("the request is known");
        while (request.known + 1) * size <= request.computed {
            let tokens = &request.tokens[request.known * size..(request.known + 1) * size];
            let block = request.table[request.known];
            request.content = self.pool.register(block, &request.salt, request.content, tokens);
            request.known += 1;
        }
    }

    /// A request's tokens, prompt first.
    pub fn tokens(&self, id: RequestId) -> &[u32] {
        self.requests.get(&id).map_or(&[], |request| &request.tokens)
    }

    /// A request's blocks.
    pub fn table(&self, id: RequestId) -> &[u32] {
        self.requests.get(&id).map_or(&[], |request| &request.table)
    }

    /// Prompt tokens of a request that came from the prefix cache.
    pub fn cached(&self, id: RequestId) -> usize {
        self.requests.get(&id).and_then(|request| request.cached).unwrap_or(0)
    }

    /// Requests that run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.requests.len() - self.running.len()
    }

    /// The share of blocks that requests hold, 0 to 1.
    pub fn usage(&self) -> f64 {
        1.0 - self.pool.available() as f64 / self.limits.blocks.max(1) as f64
    }

    /// Running counts since the start.
    pub fn counts(&self) -> Counts {
        self.counts
    }
}

#[cfg(test)]
mod tests;

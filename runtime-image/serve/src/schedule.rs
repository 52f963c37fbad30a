//! Which tokens the next forward pass computes: pure, without tensors, clocks or HTTP.
//!
//! ```text
//!            add                    schedule: blocks are free          remove (done, cancelled)
//!  client ─────────▶ waiting ───────────────────────────▶ running ─────────────────────────────▶ gone, blocks free
//!                       ▲                                   │
//!                       └───────────────────────────────────┘
//!                         preempted: blocks taken, computed again later
//! ```
//!
//! Every step has a budget of tokens. Requests that produce take one each, first; prompts share the rest in chunks, in the
//! order of arrival. When blocks run out, the newest running request gives its up and is computed again later: the engine's
//! results do not depend on the batch, so it continues with the same bits.

mod blocks;

use std::collections::{HashMap, VecDeque};

use blocks::BlockPool;

/// Names a request.
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
}

/// A request that could not run even alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the whole cache holds {most} tokens")]
pub struct TooLong {
    /// Tokens that the whole cache holds.
    pub most: usize,
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
}

#[derive(Debug)]
struct Request {
    tokens: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    computed: usize,
    table: Vec<u32>,
    /// Full blocks that the prefix cache knows, and the name of the last one's content.
    known: usize,
    content: u64,
    /// Prompt tokens that came from the prefix cache; known once it was admitted for the first time. What a preempted
    /// request finds later is mostly its own, and would count as a hit what is only lost and found.
    cached: Option<usize>,
}

/// The scheduler.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    requests: HashMap<RequestId, Request>,
    waiting: VecDeque<RequestId>,
    /// Oldest first.
    running: Vec<RequestId>,
    counts: Counts,
}

impl Scheduler {
    /// A scheduler over an empty cache.
    pub fn new(limits: Limits) -> Self {
        Scheduler {
            pool: BlockPool::new(limits.blocks),
            limits,
            requests: HashMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            counts: Counts::default(),
        }
    }

    /// Takes a request with its prompt (not empty) that will have at most `max_total` tokens, prompt included.
    pub fn add(&mut self, id: RequestId, prompt: Vec<u32>, max_total: usize) -> Result<(), TooLong> {
        let most = self.limits.blocks * self.limits.block_tokens;
        if max_total.max(prompt.len()) > most {
            return Err(TooLong { most });
        }
        let request = Request {
            tokens: prompt,
            computed: 0,
            table: Vec::new(),
            known: 0,
            content: 0,
            cached: None,
        };
        let before = self.requests.insert(id, request);
        assert!(before.is_none(), "request {id} is there already");
        self.waiting.push_back(id);
        Ok(())
    }

    /// Forgets a request, wherever it is; its blocks are free at once.
    pub fn remove(&mut self, id: RequestId) {
        let Some(request) = self.requests.remove(&id) else {
            return;
        };
        self.pool.release_all(&request.table);
        self.waiting.retain(|other| *other != id);
        self.running.retain(|other| *other != id);
    }

    /// The next step. Every piece of work must be computed and reported with [`Scheduler::computed`] before the next call.
    pub fn schedule(&mut self) -> Vec<Work> {
        let mut work = Vec::new();
        let mut budget = self.limits.max_batched_tokens;
        let before = self.counts.preemptions;
        for decode in [true, false] {
            let mut at = 0;
            while at < self.running.len() && budget > 0 {
                let id = self.running[at];
                let request = &self.requests[&id];
                let missing = request.tokens.len() - request.computed;
                if (missing == 1) != decode {
                    at += 1;
                    continue;
                }
                let count = missing.min(budget);
                let start = request.computed;
                if self.reserve(id, start + count, &mut work, &mut budget) {
                    work.push(Work {
                        id,
                        start,
                        count,
                        samples: count == missing,
                    });
                    budget -= count;
                    at += 1;
                }
                // Otherwise the request itself was preempted, and the next one stands in its place.
            }
        }
        if self.counts.preemptions == before {
            self.admit(&mut work, budget);
        }
        work
    }

    /// Makes room for `tokens` tokens of `id`, taking the blocks of the newest running requests if need be. False if the
    /// request itself was the newest and lost its own.
    fn reserve(&mut self, id: RequestId, tokens: usize, work: &mut Vec<Work>, budget: &mut usize) -> bool {
        let needed = tokens.div_ceil(self.limits.block_tokens);
        while self.requests[&id].table.len() < needed {
            match self.pool.allocate() {
                Some(block) => self.requests.get_mut(&id).expect("it is running").table.push(block),
                None => {
                    let victim = self.running.pop().expect("at least the request itself is running");
                    self.preempt(victim);
                    // What was planned for it in this step is planned again later.
                    work.retain(|piece| {
                        if piece.id == victim {
                            *budget += piece.count;
                        }
                        piece.id != victim
                    });
                    if victim == id {
                        return false;
                    }
                }
            }
        }
        true
    }

    fn preempt(&mut self, id: RequestId) {
        let request = self.requests.get_mut(&id).expect("a running request is known");
        self.pool.release_all(&request.table);
        request.table.clear();
        request.computed = 0;
        request.known = 0;
        request.content = 0;
        self.waiting.push_front(id);
        self.counts.preemptions += 1;
    }

    fn admit(&mut self, work: &mut Vec<Work>, mut budget: usize) {
        let size = self.limits.block_tokens;
        while budget > 0 && self.running.len() < self.limits.max_sequences {
            let Some(id) = self.waiting.front().copied() else {
                return;
            };
            let request = self.requests.get_mut(&id).expect("a waiting request is known");
            // One token at least must be computed: its logits are what the request waits for.
            let most_hits = if self.limits.prefix_caching {
                (request.tokens.len() - 1) / size
            } else {
                0
            };
            let (hits, content) = self.pool.take_prefix(&request.tokens, size, most_hits);
            let needed = (request.tokens.len() + 1).div_ceil(size).min(self.limits.blocks) - hits.len();
            if needed > self.pool.available() {
                self.pool.release_all(&hits);
                return;
            }
            self.waiting.pop_front();
            request.computed = hits.len() * size;
            if self.limits.prefix_caching && request.cached.is_none() {
                self.counts.prefix_queries += request.tokens.len() as u64;
                self.counts.prefix_hits += request.computed as u64;
            }
            request.cached.get_or_insert(request.computed);
            request.known = hits.len();
            request.content = content;
            request.table = hits;
            // All blocks of the prompt now: what is admitted later in this step must not count on them.
            while request.table.len() < request.tokens.len().div_ceil(size) {
                request.table.push(
                    self.pool
                        .allocate()
                        .expect("enough blocks are available, as was just asked"),
                );
            }
            let missing = request.tokens.len() - request.computed;
            let count = missing.min(budget);
            work.push(Work {
                id,
                start: request.computed,
                count,
                samples: count == missing,
            });
            budget -= count;
            self.running.push(id);
        }
    }

    /// Reports that `work` has been computed. Blocks that are now full become available as prefixes.
    pub fn computed(&mut self, work: &Work) {
        let Some(request) = self.requests.get_mut(&work.id) else {
            return;
        };
        request.computed = work.start + work.count;
        if !self.limits.prefix_caching {
            return;
        }
        let size = self.limits.block_tokens;
        while (request.known + 1) * size <= request.computed {
            let tokens = &request.tokens[request.known * size..(request.known + 1) * size];
            request.content = self
                .pool
                .register(request.table[request.known], request.content, tokens);
            request.known += 1;
        }
    }

    /// Appends the token that was sampled for a request.
    pub fn append(&mut self, id: RequestId, token: u32) {
        if let Some(request) = self.requests.get_mut(&id) {
            request.tokens.push(token);
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
        self.waiting.len()
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

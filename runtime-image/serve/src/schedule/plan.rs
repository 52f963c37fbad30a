//! One step: places between clients, then one token for each that produces, chunks of prompts, new requests, drafts.

use super::blocks::Found;
use super::{ClientId, Load, Loading, Order, RequestId, Scheduler, Step, Work};

/// A step that is being planned.
#[derive(Default)]
struct Plan {
    step: Step,
    /// Tokens that it may still compute.
    budget: usize,
}

impl Scheduler {
    /// The next step. Its spills, of which there are at most `room`, and then its copies must be made first; then every piece of
    /// work must be computed and reported with [`Scheduler::computed`] before the next call.
    pub fn schedule(&mut self, room: usize) -> Step {
        let mut plan = Plan {
            step: Step::default(),
            budget: self.limits.max_batched_tokens,
        };
        self.share_places();
        let before = self.counts.preemptions;
        for decode in [true, false] {
            let mut at = 0;
            while at < self.running.len() && plan.budget > 0 {
                let id = self.running[at].id;
                let request = &self.requests[&id];
                let missing = request.tokens.len() - request.computed;
                if request.loading.is_some() || (missing == 1) != decode {
                    at += 1;
                    continue;
                }
                let (start, count) = (request.computed, missing.min(plan.budget));
                if self.reserve(id, start, count, &mut plan) {
                    plan.add(id, start, count, missing);
                    at += 1;
                }
                // Otherwise the request itself was preempted, and the next one stands in its place.
            }
        }
        // Whoever lacks blocks lets nobody in.
        if self.counts.preemptions == before {
            self.admit(&mut plan);
        }
        self.allow_drafts(&mut plan);
        plan.step.spills = self.pool.spill(room);
        plan.step
    }

    /// Takes a place from a client that has run far ahead of one that waits in vain.
    fn share_places(&mut self) {
        let Some(next) = self.clients.next() else {
            return;
        };
        if self.fits(next.id) {
            return;
        }
        let (requests, running) = (&self.requests, &self.running);
        let last = |wanted: &dyn Fn(ClientId) -> bool| {
            let is_wanted = |order: &&Order| wanted(requests[&order.id].client);
            running
                .iter()
                .rev()
                .find(is_wanted)
                .map(|order| (*order, requests[&order.id].priority))
        };
        if let Some(victim) = self.clients.ahead_of(&next, self.requests[&next.id].client, last) {
            self.preempt(victim);
        }
    }

    /// Whether a waiting request could run now, were nothing of it in the prefix cache.
    fn fits(&self, id: RequestId) -> bool {
        let request = &self.requests[&id];
        self.places + request.width <= self.limits.max_sequences && self.needs(id) <= self.pool.available()
    }

    /// Blocks that a request needs to begin: for its tokens and the next one, and one more for each other choice.
    fn needs(&self, id: RequestId) -> usize {
        let request = &self.requests[&id];
        let blocks = (request.tokens.len() + 1).div_ceil(self.limits.block_tokens) + request.width - 1;
        blocks.min(self.limits.blocks)
    }

    /// Makes room to compute `count` tokens of `id` from `start` on, taking the blocks of those last in order if need be.
    /// False if the request itself was the last and lost its own.
    fn reserve(&mut self, id: RequestId, start: usize, count: usize, plan: &mut Plan) -> bool {
        let size = self.limits.block_tokens;
        loop {
            let request = self.requests.get_mut(&id).expect("it is running");
            // A block that is begun and that others read, too, is not written to.
            let begun = (!start.is_multiple_of(size)).then_some(start / size);
            let shared = begun.filter(|at| self.pool.is_shared(request.table[*at]));
            if shared.is_none() && request.table.len() * size >= start + count {
                return true;
            }
            if let Some(block) = self.pool.allocate() {
                match shared {
                    Some(at) => {
                        let from = std::mem::replace(&mut request.table[at], block);
                        self.pool.release_all(&[from]);
                        plan.step.copies.push((from, block));
                    }
                    None => request.table.push(block),
                }
                continue;
            }
            let victim = self.running.last().expect("at least the request itself is running").id;
            self.preempt(victim);
            plan.forget(victim);
            if victim == id {
                return false;
            }
        }
    }

    fn preempt(&mut self, id: RequestId) {
        self.send_back(id);
        self.counts.preemptions += 1;
    }

    /// A request waits again, without blocks.
    pub(super) fn send_back(&mut self, id: RequestId) {
        let request = self.requests.get_mut(&id).expect("a running request is known");
        self.pool.release_all(&request.table);
        if let Some(loading) = request.loading.take() {
            self.pool.let_go(&loading.slots);
        }
        request.table.clear();
        request.computed = 0;
        request.known = 0;
        request.content = 0;
        let at = self.running.binary_search(&request.order).expect("it is running");
        self.running.remove(at);
        self.places -= request.width;
        self.clients.stopped(request.client, request.width);
        self.clients.wait(request.client, request.priority, request.order);
    }

    fn admit(&mut self, plan: &mut Plan) {
        let size = self.limits.block_tokens;
        while plan.budget > 0 {
            let Some(order) = self.clients.next() else {
                return;
            };
            let id = order.id;
            let needs = self.needs(id);
            let request = self.requests.get_mut(&id).expect("a waiting request is known");
            if self.places + request.width > self.limits.max_sequences {
                return;
            }
            // One token at least must be computed: its logits are what the request waits for.
            let most_hits = if self.limits.prefix_caching && !request.whole_prompt {
                (request.tokens.len() - 1) / size
            } else {
                0
            };
            let (hits, content) = self.pool.take_prefix(&request.salt, &request.tokens, size, most_hits);
            let known = hits.len();
            let (mut in_memory, mut on_disk) = (Vec::new(), Vec::new());
            for hit in &hits {
                match hit {
                    Found::Block(block) => in_memory.push(*block),
                    Found::Slot(slot, _) => on_disk.push(*slot),
                }
            }
            if needs - in_memory.len() > self.pool.available() {
                self.pool.release_all(&in_memory);
                self.pool.let_go(&on_disk);
                return;
            }
            self.clients.withdraw(request.client, order);
            self.clients.started(request.client, request.width);
            self.places += request.width;
            let at = self.running.partition_point(|other| *other < order);
            self.running.insert(at, order);
            // All blocks of the prompt now: what is admitted later in this step must not count on them.
            for at in 0..request.tokens.len().div_ceil(size) {
                let hit = hits.get(at).copied();
                if let Some(Found::Block(block)) = hit {
                    request.table.push(block);
                    continue;
                }
                let block = self.pool.allocate();
                let block = block.expect("enough blocks are available, as was just asked");
                request.table.push(block);
                if let Some(Found::Slot(slot, content)) = hit {
                    plan.step.loads.push(Load {
                        id,
                        attempt: self.attempts,
                        slot,
                        content,
                        block,
                    });
                }
            }
            if on_disk.is_empty() {
                self.begin(id, known, 0, content);
                let request = &self.requests[&id];
                let missing = request.tokens.len() - request.computed;
                plan.add(id, request.computed, missing.min(plan.budget), missing);
                continue;
            }
            request.loading = Some(Loading {
                attempt: self.attempts,
                left: on_disk.len(),
                slots: on_disk,
                known,
                content,
            });
            self.attempts += 1;
        }
    }

    /// A request has the first `known` blocks of its prompt, `on_disk` of them read from the disk: the rest is to be computed.
    pub(super) fn begin(&mut self, id: RequestId, known: usize, on_disk: usize, content: u64) {
        let size = self.limits.block_tokens;
        let request = self.requests.get_mut(&id).expect("it runs");
        request.computed = known * size;
        request.known = known;
        request.content = content;
        if self.limits.prefix_caching && request.cached.is_none() {
            let (tokens, in_memory) = (request.tokens.len(), (known - on_disk) * size);
            self.counts.prefix_queries += tokens as u64;
            self.counts.prefix_hits += in_memory as u64;
            if self.limits.spill_slots > 0 {
                self.counts.disk_queries += (tokens - in_memory) as u64;
                self.counts.disk_hits += (on_disk * size) as u64;
            }
        }
        request.cached.get_or_insert(request.computed);
    }

    /// Lets those that produce try drafts with what is left: nobody loses a block or waits for a guess.
    fn allow_drafts(&mut self, plan: &mut Plan) {
        let size = self.limits.block_tokens;
        for work in &mut plan.step.work {
            let request = self.requests.get_mut(&work.id).expect("it was planned");
            // What is forked behind this step shares whole and begun blocks, not empty ones.
            if !work.samples || work.count > 1 || request.width > 1 {
                continue;
            }
            let len = request.tokens.len();
            // Behind the drafts comes one token more.
            let most = request.drafts.min(request.max_total.saturating_sub(len + 1));
            let room = (request.table.len() + self.pool.available()) * size - len;
            work.drafts = most.min(room).min(plan.budget);
            while request.table.len() * size < len + work.drafts {
                let block = self.pool.allocate();
                request
                    .table
                    .push(block.expect("enough blocks are available, as was just asked"));
            }
            plan.budget -= work.drafts;
        }
    }
}

impl Plan {
    fn add(&mut self, id: RequestId, start: usize, count: usize, missing: usize) {
        self.budget -= count;
        self.step.work.push(Work {
            id,
            start,
            count,
            samples: count == missing,
            drafts: 0,
        });
    }

    /// What was planned for a preempted request is planned again later.
    fn forget(&mut self, id: RequestId) {
        let budget = &mut self.budget;
        self.step.work.retain(|work| {
            if work.id == id {
                *budget += work.count;
            }
            work.id != id
        });
    }
}

//! One server: continuous batching with chunked prefill over a paged KV-cache, step by step.
//!
//! A step computes one token for each request that is decoded, and with what is left of its budget of tokens the prompts that
//! wait, in order. It takes `step + token·tokens + cached·cached tokens + attention·(prompt tokens × tokens before them)` seconds.
//! A step costs the model a constant time whatever the size of the batch, so that days pass in seconds.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use crate::observe::Counters;

/// What a server is and how long its steps take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Profile {
    /// Name, for reports.
    pub name: &'static str,
    /// Accelerators of a server.
    pub accelerators: u32,
    /// Seconds of a step: reading the weights.
    pub step: f64,
    /// Seconds for each token in a step.
    pub token: f64,
    /// Seconds for each cached token that a step reads.
    pub cached: f64,
    /// Seconds for each pair of a prompt's token and one before it.
    pub attention: f64,
    /// Tokens that the KV-cache holds.
    pub cache_tokens: u32,
    /// Tokens in a block of it.
    pub block_tokens: u32,
    /// Tokens that a step may compute.
    pub step_tokens: u32,
    /// Requests that are computed at once.
    pub sequences: u32,
    /// Whether a request is only begun when there is room for its whole answer, so that none is ever put back.
    pub reserves: bool,
}

/// A request as it came.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Request {
    /// When it came, in seconds.
    pub at: f64,
    /// Tokens of its prompt.
    pub prompt: u32,
    /// Tokens of its answer.
    pub output: u32,
}

/// The first token of a request, or a request that ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event {
    /// Its first token came so many seconds after it.
    FirstToken(Request, f64),
    /// It ended.
    Finished(Request),
}

/// A request on its way.
#[derive(Clone, Copy, Debug)]
struct Job {
    request: Request,
    /// Tokens to compute before the next token: the prompt, and after it was put back what was already answered.
    fill: u32,
    /// How many of them are computed.
    filled: u32,
    /// Tokens still to be answered.
    left: u32,
}

/// A request that is decoded.
#[derive(Clone, Copy, Debug)]
struct Decoding {
    job: Job,
    /// The step before its first one.
    since: u64,
    /// Cached tokens then.
    length: u64,
}

/// A server.
#[derive(Clone, Debug)]
pub struct Server {
    profile: Profile,
    waiting: VecDeque<Job>,
    filling: VecDeque<Job>,
    decoding: Vec<Option<Decoding>>,
    free_slots: Vec<usize>,
    /// Slots by the step in which they end; those that were put back stay in it and are known by their stamp.
    ends: BinaryHeap<Reverse<(u64, usize, u64)>>,
    /// Slots in the order in which they were begun, with their stamp.
    order: Vec<(usize, u64)>,
    stamps: Vec<u64>,
    next_stamp: u64,
    decoded: usize,
    cached_tokens: u64,
    used_blocks: u64,
    /// Decoded requests by the step, modulo the block, in which they need another block.
    grows: Vec<u64>,
    steps: u64,
    /// The step that is computed: when it ends, how long it takes, and how many tokens of prompts are in it.
    running: Option<(f64, f64)>,
    /// What it counted since the last scrape.
    pub counters: Counters,
    /// Requests that were put back for want of cache.
    pub preemptions: u64,
}

impl Server {
    /// One without work.
    pub fn new(profile: Profile) -> Self {
        Self {
            profile,
            waiting: VecDeque::new(),
            filling: VecDeque::new(),
            decoding: Vec::new(),
            free_slots: Vec::new(),
            ends: BinaryHeap::new(),
            order: Vec::new(),
            stamps: Vec::new(),
            next_stamp: 0,
            decoded: 0,
            cached_tokens: 0,
            used_blocks: 0,
            grows: vec![0; profile.block_tokens as usize],
            steps: 0,
            running: None,
            counters: Counters::default(),
            preemptions: 0,
        }
    }

    /// Takes a request.
    pub fn accept(&mut self, request: Request, now: f64) {
        let output = request.output.max(1);
        // One that is larger than the cache is cut, as a server refuses it; nothing may wait forever.
        let most = self.profile.cache_tokens.saturating_sub(output).max(1);
        let prompt = request.prompt.clamp(1, most);
        self.waiting.push_back(Job {
            request: Request {
                prompt,
                output,
                ..request
            },
            fill: prompt,
            filled: 0,
            left: output,
        });
        if self.running.is_none() {
            self.begin(now);
        }
    }

    /// Requests that are in it.
    pub fn inside(&self) -> usize {
        self.waiting.len() + self.computed()
    }

    /// Requests that are computed.
    pub fn computed(&self) -> usize {
        self.filling.len() + self.decoded
    }

    /// Requests that wait.
    pub fn queued(&self) -> usize {
        self.waiting.len()
    }

    /// Share of the cache that is held.
    pub fn cache_share(&self) -> f64 {
        self.used_blocks as f64 / self.blocks() as f64
    }

    /// When its step ends; `None` without work.
    pub fn next(&self) -> Option<f64> {
        self.running.map(|(end, _)| end)
    }

    fn blocks(&self) -> u64 {
        u64::from(self.profile.cache_tokens / self.profile.block_tokens).max(1)
    }

    fn blocks_of(&self, tokens: u64) -> u64 {
        tokens.div_ceil(u64::from(self.profile.block_tokens))
    }

    /// Blocks that a request holds from its beginning.
    fn blocks_of_job(&self, job: &Job) -> u64 {
        let answer = if self.profile.reserves { job.left } else { 0 };
        self.blocks_of(u64::from(job.fill) + u64::from(answer))
    }

    /// Chooses what the next step computes, and begins it.
    fn begin(&mut self, now: f64) {
        let block = u64::from(self.profile.block_tokens);
        if !self.profile.reserves {
            // The requests whose last block is full need another one for the token of this step.
            loop {
                let need = self.grows[((block - self.steps % block) % block) as usize];
                if self.used_blocks + need <= self.blocks() || self.decoded <= 1 {
                    self.used_blocks += need;
                    break;
                }
                self.put_back_newest();
            }
        }
        let mut tokens = self.decoded as u64;
        let mut pairs = 0.0;
        let mut budget = u64::from(self.profile.step_tokens).saturating_sub(tokens);
        let mut at = 0;
        while budget > 0 {
            if at == self.filling.len() {
                let Some(job) = self.waiting.front() else { break };
                let need = self.blocks_of_job(job);
                let full = self.computed() >= self.profile.sequences as usize;
                if full || (self.used_blocks + need > self.blocks() && self.computed() > 0) {
                    break;
                }
                self.used_blocks += need;
                let Some(job) = self.waiting.pop_front() else { break };
                self.filling.push_back(job);
            }
            let job = &mut self.filling[at];
            let chunk = budget.min(u64::from(job.fill - job.filled));
            let middle = f64::from(job.filled) + chunk as f64 / 2.0;
            pairs += chunk as f64 * middle;
            job.filled += chunk as u32;
            budget -= chunk;
            tokens += chunk;
            self.counters.prompt_tokens += chunk as f64;
            at += 1;
        }
        if tokens == 0 {
            self.running = None;
            return;
        }
        let profile = &self.profile;
        let seconds = profile.step
            + profile.token * tokens as f64
            + profile.cached * self.cached_tokens as f64
            + profile.attention * pairs;
        self.running = Some((now + seconds, seconds));
    }

    /// Ends the step that is computed, says what came of it, and begins the next one.
    pub fn advance(&mut self, mut event: impl FnMut(Event)) {
        let Some((now, seconds)) = self.running else { return };
        let decoded = self.decoded;
        if decoded > 0 {
            self.counters.tokens(seconds, decoded as f64);
            self.counters.generation_tokens += decoded as f64;
            self.cached_tokens += decoded as u64;
        }
        self.steps += 1;
        while let Some(Reverse((step, slot, stamp))) = self.ends.peek().copied() {
            if step > self.steps {
                break;
            }
            self.ends.pop();
            if self.stamps[slot] == stamp
                && let Some(done) = self.remove(slot)
            {
                self.counters.finished += 1.0;
                event(Event::Finished(done.job.request));
            }
        }
        while self.filling.front().is_some_and(|job| job.filled == job.fill) {
            let Some(mut job) = self.filling.pop_front() else { break };
            if job.left == job.request.output {
                self.counters.first_token(now - job.request.at);
                event(Event::FirstToken(job.request, now - job.request.at));
            }
            self.counters.generation_tokens += 1.0;
            job.left -= 1;
            if job.left == 0 {
                self.used_blocks -= self.held(u64::from(job.fill), &job, job.left + 1);
                self.counters.finished += 1.0;
                event(Event::Finished(job.request));
            } else {
                self.decode(job);
            }
        }
        self.begin(now);
    }

    /// Blocks that a job holds whose cache has `length` tokens.
    fn held(&self, length: u64, job: &Job, left_at_start: u32) -> u64 {
        if self.profile.reserves {
            self.blocks_of(u64::from(job.fill) + u64::from(left_at_start))
        } else {
            self.blocks_of(length)
        }
    }

    fn decode(&mut self, job: Job) {
        let length = u64::from(job.fill);
        let slot = self.free_slots.pop().unwrap_or_else(|| {
            self.decoding.push(None);
            self.stamps.push(0);
            self.decoding.len() - 1
        });
        self.next_stamp += 1;
        self.stamps[slot] = self.next_stamp;
        self.decoding[slot] = Some(Decoding {
            job,
            since: self.steps,
            length,
        });
        self.ends
            .push(Reverse((self.steps + u64::from(job.left), slot, self.next_stamp)));
        self.order.push((slot, self.next_stamp));
        self.decoded += 1;
        self.cached_tokens += length;
        let phase = self.phase(length);
        self.grows[phase] += 1;
    }

    /// In which steps, modulo the block, a request needs another block that has `length` tokens now.
    fn phase(&self, length: u64) -> usize {
        let block = u64::from(self.profile.block_tokens);
        ((length % block + block - self.steps % block) % block) as usize
    }

    fn remove(&mut self, slot: usize) -> Option<Decoding> {
        let done = self.decoding[slot].take()?;
        self.stamps[slot] = 0;
        self.free_slots.push(slot);
        self.decoded -= 1;
        let length = done.length + (self.steps - done.since);
        self.cached_tokens -= length;
        let phase = self.phase(length);
        self.grows[phase] -= 1;
        self.used_blocks -= self.held(length, &done.job, done.job.left + 1);
        if self.order.len() > 4 * self.decoded + 64 {
            let stamps = &self.stamps;
            self.order.retain(|(slot, stamp)| stamps[*slot] == *stamp);
        }
        Some(done)
    }

    /// Puts the request back that was begun last: it is computed anew, with what it already answered.
    fn put_back_newest(&mut self) {
        while let Some((slot, stamp)) = self.order.pop() {
            if self.stamps[slot] != stamp {
                continue;
            }
            if let Some(done) = self.remove(slot) {
                let answered = (self.steps - done.since) as u32;
                self.preemptions += 1;
                self.waiting.push_front(Job {
                    fill: done.job.fill + answered,
                    filled: 0,
                    left: done.job.left - answered,
                    ..done.job
                });
            }
            return;
        }
    }
}

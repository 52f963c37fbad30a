//! The engine's thread: takes requests, runs a step after the other, gives out what was sampled.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use strata_model::Vocabulary;
use tokio::sync::mpsc;

use super::active::{Active, Sampled};
use super::disk::{Disk, Gone};
use super::executor::{Batch, Executor, Row};
use super::forward::Forward;
use super::pace::Pace;
use super::speculate::Drafter;
use super::{Command, Event, FinishReason, Usage};
use crate::error::ServeError;
use crate::metrics::{Metrics, Timing};
use crate::schedule::{Limits, Load, NewRequest, RequestId, Scheduler, Spill};

/// How long the disk is waited for while nothing can be computed, until it is looked who came or went meanwhile.
const DISK_WAIT: Duration = Duration::from_millis(5);

/// The answers that are being generated.
pub(super) type Actives = HashMap<RequestId, Active>;

/// What a step samples for one answer.
struct Pending {
    id: RequestId,
    /// Where it is a further choice: of which request.
    parent: Option<RequestId>,
    /// Tokens guessed: the ones before the last that was sampled were right.
    drafts: Vec<u32>,
    tokens: Vec<Sampled>,
    /// The logits of the next row are still of use.
    open: bool,
    failed: bool,
}

impl Pending {
    fn new(id: RequestId, parent: Option<RequestId>, drafts: Vec<u32>) -> Self {
        Pending {
            id,
            parent,
            drafts,
            tokens: Vec::new(),
            open: true,
            failed: false,
        }
    }

    /// Samples from the logits of the next row, unless a draft before it was wrong or the answer has ended.
    fn sample(&mut self, request: &mut Active, logits: &[f32]) {
        if !self.open {
            return;
        }
        match request.sample(logits) {
            Ok(sampled) => {
                let right = self.drafts.get(self.tokens.len()) == Some(&sampled.token);
                let full = request.sampled() >= request.submission.max_tokens;
                self.open = right && !full && !sampled.ends && !sampled.complete;
                self.tokens.push(sampled);
            }
            Err(error) => {
                tracing::warn!(%error, "an answer cannot go on in its form");
                self.open = false;
                self.failed = true;
            }
        }
    }
}

/// What the engine's thread owns.
pub(super) struct Runner {
    commands: mpsc::Receiver<Command>,
    scheduler: Scheduler,
    executor: Box<dyn Forward>,
    speculation: Option<(Drafter, usize)>,
    /// Where blocks go that the cache has no more room for.
    pub(super) disk: Option<Disk>,
    vocabulary: Arc<Vocabulary>,
    active: Actives,
    next_id: RequestId,
    shared: Arc<Shared>,
    /// When an answer ended last, or the first request came after there were none.
    last_end: Instant,
    metrics: Arc<Metrics>,
}

/// What the engine's thread shares with its handles.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Answers that were asked for and have not ended.
    pub(super) in_flight: AtomicUsize,
    pub(super) abort: AtomicBool,
    pub(super) pace: Pace,
}

impl Runner {
    pub(super) fn new(
        commands: mpsc::Receiver<Command>,
        executor: Box<dyn Forward>,
        speculation: Option<(Drafter, usize)>,
        vocabulary: Arc<Vocabulary>,
        limits: Limits,
        shared: Arc<Shared>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Runner {
            commands,
            scheduler: Scheduler::new(limits),
            executor,
            speculation,
            disk: None,
            vocabulary,
            active: HashMap::new(),
            next_id: 0,
            shared,
            last_end: Instant::now(),
            metrics,
        }
    }

    /// Runs until the last handle is gone.
    pub(super) fn run(mut self) {
        loop {
            if self.active.is_empty() {
                match self.commands.blocking_recv() {
                    Some(command) => {
                        self.last_end = Instant::now();
                        self.take(command);
                    }
                    None => return,
                }
            }
            while let Ok(command) = self.commands.try_recv() {
                self.take(command);
            }
            let gone: Vec<RequestId> = self
                .active
                .iter()
                .filter(|(_, request)| request.events.is_closed())
                .map(|(id, _)| *id)
                .collect();
            gone.into_iter().for_each(|id| self.finish(id, FinishReason::Abort));
            if self.shared.abort.load(Ordering::SeqCst) {
                let all: Vec<RequestId> = self.active.keys().copied().collect();
                all.into_iter().for_each(|id| self.finish(id, FinishReason::Abort));
            }
            if let Err(error) = self.step() {
                tracing::error!(%error, "the engine ends: a restarted server begins with a clean device");
                return;
            }
            self.metrics.scheduler(&self.scheduler);
            self.metrics.disk(
                self.disk
                    .as_ref()
                    .map_or(0, |disk| disk.bytes(self.scheduler.slots_used())),
            );
            self.show_adapters();
        }
    }

    /// Which adapters run, and which only wait.
    fn show_adapters(&self) {
        let names = |runs: bool| -> BTreeSet<&str> {
            let requests = self.active.iter();
            let requests = requests.filter(|(id, _)| self.scheduler.table(**id).is_empty() != runs);
            requests
                .filter_map(|(_, request)| Some(request.submission.adapter.as_ref()?.name()))
                .collect()
        };
        self.metrics.adapters(|| (names(true), names(false)));
    }

    fn new_id(&mut self) -> RequestId {
        self.next_id += 1;
        self.next_id
    }

    fn take(&mut self, command: Command) {
        let Command {
            submission,
            events,
            arrived,
        } = command;
        let id = self.new_id();
        let submission = Arc::new(submission);
        let most = submission.prompt.len() + submission.max_tokens;
        let new = NewRequest {
            choices: submission.choices,
            salt: submission.salt.clone(),
            client: submission.client,
            priority: submission.priority,
            drafts: self.speculation.as_ref().map_or(0, |(_, drafts)| *drafts),
            whole_prompt: submission.prompt_log_probs.is_some(),
            ..NewRequest::new(submission.prompt.clone(), most)
        };
        self.metrics.request(submission.choices, submission.max_tokens);
        let refused = self.scheduler.add(id, new).err();
        let mut active = Active::new(&self.vocabulary, submission, events, Timing::new(arrived), 0);
        active.width = active.submission.choices;
        self.active.insert(id, active);
        if let Some(refusal) = refused {
            tracing::error!(%refusal, "a request passed the server's checks but not the scheduler's");
            self.finish(id, FinishReason::Abort);
        }
    }

    fn step(&mut self) -> Result<(), ServeError> {
        self.take_from_disk(Duration::ZERO);
        let room = self.disk.as_ref().map_or(0, Disk::room);
        let step = self.scheduler.schedule(room);
        self.give_to_disk(step.spills, step.loads);
        if step.work.is_empty() {
            if self.scheduler.is_loading() {
                self.take_from_disk(DISK_WAIT);
            }
            return Ok(());
        }
        for (from, to) in step.copies {
            self.executor.copy_block(from, to)?;
            if let Some((drafter, _)) = &mut self.speculation {
                drafter.copy_block(from, to)?;
            }
        }
        let mut drafts = match &mut self.speculation {
            Some((drafter, _)) => drafter.draft(&step.work, &self.scheduler, &self.active)?,
            None => vec![Vec::new(); step.work.len()],
        };
        let mut batch = Batch::default();
        let mut pending: Vec<Pending> = Vec::new();
        // Which of them a row's logits are for.
        let mut owners: HashMap<usize, Range<usize>> = HashMap::new();
        // The rows before tokens of prompts whose log-probabilities are wanted, with those tokens' positions.
        let mut of_prompts: HashMap<usize, (RequestId, usize)> = HashMap::new();
        let now = Instant::now();
        for (work, drafts) in step.work.iter().zip(&mut drafts) {
            let request = self.active.get_mut(&work.id);
            request
                .expect("only active requests are scheduled")
                .timing
                .scheduled(now);
            let tokens = &self.scheduler.tokens(work.id)[work.start..work.start + work.count];
            let first = batch.rows.len() + tokens.len() - 1;
            let tokens = tokens.iter().chain(drafts.iter());
            let table = batch.tables.len();
            batch.tables.push(self.scheduler.table(work.id).to_vec());
            batch.adapters.push(self.active[&work.id].submission.adapter.clone());
            let unseen = self.active[&work.id].unseen_prompt();
            let before = |i: &usize| unseen.contains(&(work.start + i + 1));
            let row = batch.rows.len();
            of_prompts.extend(
                (0..work.count)
                    .filter(before)
                    .map(|i| (row + i, (work.id, work.start + i + 1))),
            );
            batch.rows.extend(tokens.enumerate().map(|(i, token)| Row {
                token: *token,
                position: (work.start + i) as u32,
                table,
                logits: work.samples && i + 1 >= work.count || before(&i),
            }));
            if work.samples {
                let at = pending.len();
                pending.extend(self.choices(work.id).into_iter().map(|id| {
                    let parent = (id != work.id).then_some(work.id);
                    Pending::new(id, parent, std::mem::take(drafts))
                }));
                owners.extend((first..batch.rows.len()).map(|row| (row, at..pending.len())));
            }
        }
        let active = &mut self.active;
        self.executor.forward(&batch, &mut |row, logits| {
            if let Some((id, position)) = of_prompts.get(&row) {
                let request = active.get_mut(id).expect("only active requests are computed");
                request.see_prompt(*position, logits);
            }
            let Some(owners) = owners.get(&row) else { return };
            for pending in &mut pending[owners.clone()] {
                let request = active.get_mut(&pending.id).expect("only active requests are sampled");
                pending.sample(request, logits);
            }
        })?;
        self.metrics.step(batch.rows.len());
        step.work.iter().for_each(|work| self.scheduler.computed(work));
        for pending in &pending {
            if let Some(parent) = pending.parent {
                self.scheduler.fork(parent, pending.id);
            }
        }
        for pending in pending {
            let tokens: Vec<u32> = pending.tokens.iter().map(|sampled| sampled.token).collect();
            if !pending.drafts.is_empty() {
                let right = tokens
                    .iter()
                    .zip(&pending.drafts)
                    .filter(|(token, draft)| token == draft);
                self.metrics.speculated(pending.drafts.len(), right.count());
            }
            self.scheduler.append(pending.id, &tokens);
            let goes_on = pending.tokens.into_iter().all(|sampled| self.give(pending.id, sampled));
            if goes_on && pending.failed {
                self.finish(pending.id, FinishReason::Abort);
            }
        }
        Ok(())
    }

    /// Copies what the disk has read into the blocks that wait for it.
    fn take_from_disk(&mut self, wait: Duration) {
        let Some(disk) = &mut self.disk else { return };
        let (scheduler, executor, speculation) = (&mut self.scheduler, &mut self.executor, &mut self.speculation);
        let taken = disk.take(wait, |load, bytes| {
            if scheduler.loaded(&load, bytes.is_some())
                && let Some(mut bytes) = bytes
            {
                for cache in caches(executor, speculation) {
                    let (own, rest) = bytes.split_at(cache.block_bytes());
                    cache.load_block(load.block, own);
                    bytes = rest;
                }
            }
        });
        if taken == Err(Gone) {
            self.lose_disk();
        }
    }

    /// Copies blocks out, before anything is written to them, and asks for others.
    fn give_to_disk(&mut self, spills: Vec<Spill>, loads: Vec<Load>) {
        let Some(disk) = &mut self.disk else { return };
        let (executor, speculation) = (&mut self.executor, &mut self.speculation);
        let written = spills.into_iter().try_for_each(|spill| {
            disk.write(spill, |mut bytes| {
                for cache in caches(executor, speculation) {
                    let (own, rest) = bytes.split_at_mut(cache.block_bytes());
                    cache.save_block(spill.block, own);
                    bytes = rest;
                }
            })
        });
        let given = written.and_then(|()| disk.read(loads, |load| self.scheduler.is_wanted(load)));
        if given == Err(Gone) {
            self.lose_disk();
        }
    }

    /// What was on the disk is computed from now on.
    fn lose_disk(&mut self) {
        self.disk = None;
        self.scheduler.close_disk();
    }

    /// The choices that a request stands for, now that its prompt is computed: each becomes a request of its own.
    fn choices(&mut self, id: RequestId) -> Vec<RequestId> {
        let first = self.active.get_mut(&id).expect("only active requests are scheduled");
        let width = std::mem::replace(&mut first.width, 1);
        let (submission, events, timing) = (first.submission.clone(), first.events.clone(), first.timing);
        let longest = first.longest.clone();
        let mut ids = vec![id];
        for choice in 1..width {
            let id = self.new_id();
            let mut active = Active::new(&self.vocabulary, submission.clone(), events.clone(), timing, choice);
            active.longest = longest.clone();
            self.active.insert(id, active);
            ids.push(id);
        }
        ids
    }

    /// Gives out a token. False if it was the last one.
    fn give(&mut self, id: RequestId, sampled: Sampled) -> bool {
        let Sampled {
            token,
            log_probs,
            ends,
            complete,
        } = sampled;
        let request = self.active.get_mut(&id).expect("only active requests are sampled");
        request.count += 1;
        if let Some(log_probs) = request.take_prompt() {
            let (choice, first) = (request.choice, request.submission.prompt[0]);
            // The channel has room for it; it is closed if the reader has gone, which the next event finds.
            let _ = request.events.try_send(Event::Prompt {
                choice,
                first,
                log_probs,
            });
        }
        // The choices share one prompt.
        let (prompt, cached) = match request.choice {
            0 => (request.submission.prompt.len(), self.scheduler.cached(id)),
            _ => (0, 0),
        };
        self.metrics.token(&mut request.timing, prompt, cached);
        let submission = &request.submission;
        if ends && !submission.show_stop {
            self.finish(id, FinishReason::Stop);
            return false;
        }
        let may_stop = request.count > submission.min_tokens;
        let piece = match request.answer.push(&self.vocabulary, token, may_stop) {
            Ok(piece) => piece,
            Err(error) => {
                tracing::error!(%error, "a generated token could not be turned into text");
                self.finish(id, FinishReason::Abort);
                return false;
            }
        };
        let full = request.count >= submission.max_tokens;
        let stopped = ends || complete || piece.stopped;
        let event = Event::Token {
            choice: request.choice,
            text: piece.text,
            log_probs,
        };
        // The channel has room for every token; it is closed if the reader has gone.
        if request.events.try_send(event).is_err() {
            self.finish(id, FinishReason::Abort);
            return false;
        }
        match (stopped, full) {
            (true, _) => self.finish(id, FinishReason::Stop),
            (false, true) => self.finish(id, FinishReason::Length),
            (false, false) => return true,
        }
        false
    }

    fn finish(&mut self, id: RequestId, reason: FinishReason) {
        let Some(request) = self.active.get_mut(&id) else {
            return;
        };
        let rest = request
            .answer
            .finish(&self.vocabulary)
            .map_or_else(|_| String::new(), |piece| piece.text);
        let usage = Usage {
            prompt_tokens: request.submission.prompt.len(),
            completion_tokens: request.count,
            cached_tokens: self.scheduler.cached(id),
        };
        for choice in request.choice..request.choice + request.width {
            self.metrics.finished(reason, &usage, &request.timing);
            // A reader that has gone does not want it.
            let _ = request.events.try_send(Event::Finished {
                choice,
                text: rest.clone(),
                reason,
                usage,
            });
        }
        let longest = request
            .longest
            .fetch_max(request.count, Ordering::SeqCst)
            .max(request.count);
        if Arc::strong_count(&request.longest) == 1 {
            self.metrics.answered(longest); // no other choice of the request is left
        }
        self.forget(id);
    }

    fn forget(&mut self, id: RequestId) {
        self.scheduler.remove(id);
        if let Some((drafter, _)) = &mut self.speculation {
            drafter.forget(id);
        }
        if let Some(request) = self.active.remove(&id) {
            let now = Instant::now();
            self.shared.pace.ended((now - self.last_end) / request.width as u32);
            self.last_end = now;
            self.shared.in_flight.fetch_sub(request.width, Ordering::SeqCst);
        }
    }
}

/// The caches whose blocks belong together: the model's, and that of the one that drafts for it.
fn caches<'a>(
    executor: &'a mut Box<dyn Forward>,
    speculation: &'a mut Option<(Drafter, usize)>,
) -> impl Iterator<Item = &'a mut Executor> {
    let drafts = speculation.as_mut().and_then(|(drafter, _)| drafter.on_cpu());
    executor.on_cpu().into_iter().chain(drafts)
}

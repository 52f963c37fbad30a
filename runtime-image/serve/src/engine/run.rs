//! The engine's thread: takes requests, runs a step after the other, gives out what was sampled.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use strata_model::Vocabulary;
use tokio::sync::mpsc;

use super::active::{Active, Sampled};
use super::executor::{Batch, Executor, Row};
use super::{Command, Event, FinishReason, Usage};
use crate::metrics::Metrics;
use crate::schedule::{Limits, NewRequest, RequestId, Scheduler};

/// What a step samples for one answer.
struct Pending {
    id: RequestId,
    /// Where it is a further choice: of which request.
    parent: Option<RequestId>,
    tokens: Vec<Sampled>,
    failed: bool,
}

/// What the engine's thread owns.
pub(super) struct Runner {
    commands: mpsc::Receiver<Command>,
    scheduler: Scheduler,
    executor: Executor,
    vocabulary: Arc<Vocabulary>,
    active: HashMap<RequestId, Active>,
    next_id: RequestId,
    in_flight: Arc<AtomicUsize>,
    abort: Arc<AtomicBool>,
    metrics: Arc<Metrics>,
}

impl Runner {
    pub(super) fn new(
        commands: mpsc::Receiver<Command>,
        executor: Executor,
        vocabulary: Arc<Vocabulary>,
        limits: Limits,
        in_flight: Arc<AtomicUsize>,
        abort: Arc<AtomicBool>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Runner {
            commands,
            scheduler: Scheduler::new(limits),
            executor,
            vocabulary,
            active: HashMap::new(),
            next_id: 0,
            in_flight,
            abort,
            metrics,
        }
    }

    /// Runs until the last handle is gone.
    pub(super) fn run(mut self) {
        loop {
            if self.active.is_empty() {
                match self.commands.blocking_recv() {
                    Some(command) => self.take(command),
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
            gone.into_iter().for_each(|id| self.forget(id));
            if self.abort.load(Ordering::SeqCst) {
                let all: Vec<RequestId> = self.active.keys().copied().collect();
                all.into_iter().for_each(|id| self.finish(id, FinishReason::Abort));
            }
            self.step();
            self.metrics.scheduler(&self.scheduler);
        }
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
            ..NewRequest::new(submission.prompt.clone(), most)
        };
        let refused = self.scheduler.add(id, new).err();
        let mut active = Active::new(&self.vocabulary, submission, events, arrived, 0);
        active.width = active.submission.choices;
        self.active.insert(id, active);
        if let Some(refusal) = refused {
            tracing::error!(%refusal, "a request passed the server's checks but not the scheduler's");
            self.finish(id, FinishReason::Abort);
        }
    }

    fn step(&mut self) {
        let step = self.scheduler.schedule();
        if step.work.is_empty() {
            return;
        }
        for (from, to) in step.copies {
            self.executor.copy_block(from, to);
        }
        let mut batch = Batch::default();
        let mut pending: Vec<Pending> = Vec::new();
        // Which of them a row's logits are for.
        let mut owners: HashMap<usize, Range<usize>> = HashMap::new();
        for work in &step.work {
            let tokens = &self.scheduler.tokens(work.id)[work.start..work.start + work.count];
            let table = batch.tables.len();
            batch.tables.push(self.scheduler.table(work.id).to_vec());
            batch.rows.extend(tokens.iter().enumerate().map(|(i, token)| Row {
                token: *token,
                position: (work.start + i) as u32,
                table,
                logits: work.samples && i + 1 == work.count,
            }));
            if work.samples {
                let first = pending.len();
                pending.extend(self.choices(work.id).into_iter().map(|id| Pending {
                    id,
                    parent: (id != work.id).then_some(work.id),
                    tokens: Vec::new(),
                    failed: false,
                }));
                owners.insert(batch.rows.len() - 1, first..pending.len());
            }
        }
        let active = &mut self.active;
        self.executor.forward(&batch, |row, logits| {
            for pending in &mut pending[owners[&row].clone()] {
                let request = active.get_mut(&pending.id).expect("only active requests are sampled");
                match request.sample(logits) {
                    Ok(sampled) => pending.tokens.push(sampled),
                    Err(error) => {
                        tracing::warn!(%error, "an answer cannot go on in its form");
                        pending.failed = true;
                    }
                }
            }
        });
        self.metrics.step(batch.rows.len());
        step.work.iter().for_each(|work| self.scheduler.computed(work));
        for pending in &pending {
            if let Some(parent) = pending.parent {
                self.scheduler.fork(parent, pending.id);
            }
        }
        for pending in pending {
            let tokens: Vec<u32> = pending.tokens.iter().map(|sampled| sampled.token).collect();
            self.scheduler.append(pending.id, &tokens);
            let goes_on = pending.tokens.into_iter().all(|sampled| self.give(pending.id, sampled));
            if goes_on && pending.failed {
                self.finish(pending.id, FinishReason::Abort);
            }
        }
    }

    /// The choices that a request stands for, now that its prompt is computed: each becomes a request of its own.
    fn choices(&mut self, id: RequestId) -> Vec<RequestId> {
        let first = self.active.get_mut(&id).expect("only active requests are scheduled");
        let width = std::mem::replace(&mut first.width, 1);
        let (submission, events, arrived) = (first.submission.clone(), first.events.clone(), first.arrived);
        let mut ids = vec![id];
        for choice in 1..width {
            let id = self.new_id();
            let active = Active::new(&self.vocabulary, submission.clone(), events.clone(), arrived, choice);
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
        let now = Instant::now();
        match request.last_token.replace(now) {
            None => {
                // The choices share one prompt.
                let prompt = if request.choice == 0 {
                    request.submission.prompt.len()
                } else {
                    0
                };
                self.metrics.first_token(prompt, now - request.arrived);
            }
            Some(before) => self.metrics.next_token(now - before),
        }
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
            self.forget(id);
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
            self.metrics.finished(reason, &usage, request.arrived.elapsed());
            // A reader that has gone does not want it.
            let _ = request.events.try_send(Event::Finished {
                choice,
                text: rest.clone(),
                reason,
                usage,
            });
        }
        self.forget(id);
    }

    fn forget(&mut self, id: RequestId) {
        self.scheduler.remove(id);
        if let Some(request) = self.active.remove(&id) {
            self.in_flight.fetch_sub(request.width, Ordering::SeqCst);
        }
    }
}

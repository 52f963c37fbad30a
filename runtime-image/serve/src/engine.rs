//! The engine: one thread that owns scheduler and executor, and handles that submit requests to it.
//!
//! A request's events go through a channel of its own with room for its whole answer, so a slow reader holds up nobody; a
//! reader that goes away closes the channel, which is how a request is cancelled.

mod constraint;
pub mod executor;
mod sample;
mod score;
mod text;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use strata_model::Vocabulary;
use tokio::sync::{mpsc, oneshot};

use constraint::Mask;
pub use constraint::{Constraint, Form, FormError, Forms};
use sample::History;
pub use sample::{Sampling, TokenProb};
pub use score::{ScoreError, Scorer};

use crate::metrics::Metrics;
use crate::schedule::{Limits, RequestId, Scheduler};
use executor::{Batch, Executor, Row};
use text::Answer;

/// A request as the engine sees it.
#[derive(Clone, Debug)]
pub struct Submission {
    /// The prompt's tokens; not empty, all inside the vocabulary.
    pub prompt: Vec<u32>,
    /// The most tokens to generate; at least 1.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Texts that end the answer; not part of it.
    pub stop: Vec<String>,
    /// Tokens that end the answer; not part of its text.
    pub stop_tokens: Vec<u32>,
    /// What ends the answer is part of its text after all.
    pub show_stop: bool,
    /// Special tokens are part of the text.
    pub show_special: bool,
    /// Before that many tokens, nothing ends the answer but its form.
    pub min_tokens: usize,
    /// What keeps the answer in its form, if it has one.
    pub constraint: Option<Constraint>,
    /// Report each token's log-probability and that many alternatives.
    pub log_probs: Option<usize>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// The most tokens were generated.
    Length,
    /// The server shut down before the end.
    Abort,
}

impl FinishReason {
    /// The word in responses and metrics.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Abort => "abort",
        }
    }
}

/// Token counts of a finished request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated, an end token included.
    pub completion_tokens: usize,
    /// Prompt tokens that came from the prefix cache.
    pub cached_tokens: usize,
}

/// What happens to a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A token was generated.
    Token {
        /// The text it completed, possibly empty.
        text: String,
        /// The token and its alternatives, if asked for.
        log_probs: Option<(TokenProb, Vec<TokenProb>)>,
    },
    /// The answer is complete. Always the last event.
    Finished {
        /// Text that was held back until now.
        text: String,
        /// Why.
        reason: FinishReason,
        /// Counts.
        usage: Usage,
    },
}

/// Why a request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As many requests as the engine takes are in flight.
    #[error("the server has {0} requests in flight, as many as it takes; try again later")]
    Busy(usize),
    /// The engine has stopped.
    #[error("the engine has stopped")]
    Stopped,
}

/// Submits requests to the engine; cheap to clone.
#[derive(Clone, Debug)]
pub struct Engine {
    commands: mpsc::Sender<Command>,
    in_flight: Arc<AtomicUsize>,
    abort: Arc<AtomicBool>,
    most_in_flight: usize,
}

struct Command {
    submission: Submission,
    events: mpsc::Sender<Event>,
    arrived: Instant,
}

impl Engine {
    /// Starts the engine's thread. The receiver resolves when the thread ends: after the last handle is gone, or by a panic.
    pub fn start(
        executor: Executor,
        vocabulary: Arc<Vocabulary>,
        limits: Limits,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<(Engine, oneshot::Receiver<()>)> {
        let most_in_flight = limits.max_sequences + limits.max_waiting;
        let (commands, receiver) = mpsc::channel(most_in_flight);
        let (in_flight, abort) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (ended, ended_receiver) = oneshot::channel();
        let runner = Runner {
            commands: receiver,
            scheduler: Scheduler::new(limits),
            executor,
            vocabulary,
            active: HashMap::new(),
            next_id: 0,
            in_flight: in_flight.clone(),
            abort: abort.clone(),
            metrics,
        };
        std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
            let _ended = ended; // dropped when the thread ends, however it ends
            runner.run();
        })?;
        Ok((
            Engine {
                commands,
                in_flight,
                abort,
                most_in_flight,
            },
            ended_receiver,
        ))
    }

    /// Takes a request; its events arrive in the receiver. Dropping the receiver cancels the request.
    pub fn submit(&self, submission: Submission) -> Result<mpsc::Receiver<Event>, SubmitError> {
        let most = self.most_in_flight;
        let taken = self
            .in_flight
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| {
                (count < most).then_some(count + 1)
            });
        if taken.is_err() {
            return Err(SubmitError::Busy(most));
        }
        let (events, receiver) = mpsc::channel(submission.max_tokens + 1);
        let command = Command {
            submission,
            events,
            arrived: Instant::now(),
        };
        self.commands.try_send(command).map_err(|_| {
            self.in_flight.fetch_sub(1, Ordering::SeqCst);
            SubmitError::Stopped
        })?;
        Ok(receiver)
    }

    /// Whether a request would be taken now.
    pub fn has_room(&self) -> Result<(), SubmitError> {
        match self.in_flight() < self.most_in_flight {
            true => Ok(()),
            false => Err(SubmitError::Busy(self.most_in_flight)),
        }
    }

    /// Requests that were taken and have not ended.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// Ends every request now, each with [`FinishReason::Abort`] and what it has so far; also those that come later.
    pub fn abort_all(&self) {
        self.abort.store(true, Ordering::SeqCst);
    }
}

struct Active {
    submission: Submission,
    events: mpsc::Sender<Event>,
    answer: Answer,
    history: History,
    arrived: Instant,
    last_token: Option<Instant>,
}

struct Runner {
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

struct Sampled {
    id: RequestId,
    token: u32,
    log_probs: Option<(TokenProb, Vec<TokenProb>)>,
}

impl Runner {
    fn run(mut self) {
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

    fn take(&mut self, command: Command) {
        let Command {
            submission,
            events,
            arrived,
        } = command;
        let id = self.next_id;
        self.next_id += 1;
        let most = submission.prompt.len() + submission.max_tokens;
        let refused = self.scheduler.add(id, submission.prompt.clone(), most).err();
        let answer = Answer::new(submission.stop.clone(), submission.show_stop, submission.show_special);
        let history = History::new(&submission.prompt, &submission.sampling);
        self.active.insert(
            id,
            Active {
                submission,
                events,
                answer,
                history,
                arrived,
                last_token: None,
            },
        );
        if let Some(refusal) = refused {
            tracing::error!(%refusal, "a request passed the server's checks but not the scheduler's");
            self.finish(id, FinishReason::Abort);
        }
    }

    fn step(&mut self) {
        let work = self.scheduler.schedule();
        if work.is_empty() {
            return;
        }
        let mut batch = Batch::default();
        let mut owners = HashMap::new();
        for piece in &work {
            let tokens = &self.scheduler.tokens(piece.id)[piece.start..piece.start + piece.count];
            let table = batch.tables.len();
            batch.tables.push(self.scheduler.table(piece.id).to_vec());
            for (i, token) in tokens.iter().enumerate() {
                let logits = piece.samples && i + 1 == piece.count;
                if logits {
                    owners.insert(batch.rows.len(), piece.id);
                }
                batch.rows.push(Row {
                    token: *token,
                    position: (piece.start + i) as u32,
                    table,
                    logits,
                });
            }
        }
        let mut sampled = Vec::with_capacity(owners.len());
        let mut failed = Vec::new();
        let active = &mut self.active;
        self.executor.forward(&batch, |row, logits| {
            let id = owners[&row];
            let request = active.get_mut(&id).expect("what is computed is active");
            let (submission, history) = (&mut request.submission, &request.history);
            let early = history.count() < submission.min_tokens;
            let mut banned: &[u32] = if early { &submission.stop_tokens } else { &[] };
            let mask = match submission.constraint.as_mut().map(Constraint::mask).transpose() {
                Ok(mask) => mask.map(|mask| mask.without(std::mem::take(&mut banned))),
                Err(error) => {
                    tracing::warn!(%error, "the next token of a form could not be found");
                    return failed.push(id);
                }
            };
            let allowed = mask.as_ref().map(Mask::bits);
            let adjusted = sample::adjusted(logits, &submission.sampling, history, allowed, banned);
            let token = sample::sample(&adjusted, &submission.sampling, history.count() as u64);
            let log_probs = submission
                .log_probs
                .map(|count| sample::log_probs(logits, token, count));
            sampled.push(Sampled { id, token, log_probs });
        });
        self.metrics.step(batch.rows.len());
        for piece in &work {
            self.scheduler.computed(piece);
        }
        for sampled in sampled {
            self.advance(sampled);
        }
        for id in failed {
            self.finish(id, FinishReason::Abort);
        }
    }

    fn advance(&mut self, sampled: Sampled) {
        let Sampled { id, token, log_probs } = sampled;
        let request = self.active.get_mut(&id).expect("only active requests are sampled");
        self.scheduler.append(id, token);
        request.history.push(token);
        let now = Instant::now();
        match request.last_token.replace(now) {
            None => self
                .metrics
                .first_token(request.submission.prompt.len(), now - request.arrived),
            Some(before) => self.metrics.next_token(now - before),
        }
        let submission = &mut request.submission;
        let complete = match submission
            .constraint
            .as_mut()
            .map(|constraint| constraint.accept(token))
        {
            None => false,
            Some(Ok(complete)) => complete,
            Some(Err(error)) => {
                tracing::warn!(%error, "a token of a form could not be taken");
                return self.finish(id, FinishReason::Abort);
            }
        };
        let ends = submission.stop_tokens.contains(&token);
        if ends && !submission.show_stop {
            return self.finish(id, FinishReason::Stop);
        }
        let count = request.history.count();
        let may_stop = count > submission.min_tokens;
        let piece = match request.answer.push(&self.vocabulary, token, may_stop) {
            Ok(piece) => piece,
            Err(error) => {
                tracing::error!(%error, "a generated token could not be turned into text");
                return self.finish(id, FinishReason::Abort);
            }
        };
        let full = count >= submission.max_tokens;
        let stopped = ends || complete || piece.stopped;
        // The channel has room for every token; it is closed if the reader has gone.
        if request
            .events
            .try_send(Event::Token {
                text: piece.text,
                log_probs,
            })
            .is_err()
        {
            return self.forget(id);
        }
        if stopped || full {
            let reason = if stopped {
                FinishReason::Stop
            } else {
                FinishReason::Length
            };
            self.finish(id, reason);
        }
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
            completion_tokens: request.history.count(),
            cached_tokens: self.scheduler.cached(id),
        };
        self.metrics.finished(reason, &usage, request.arrived.elapsed());
        // A reader that has gone does not want it.
        let _ = request.events.try_send(Event::Finished {
            text: rest,
            reason,
            usage,
        });
        self.forget(id);
    }

    fn forget(&mut self, id: RequestId) {
        self.scheduler.remove(id);
        if self.active.remove(&id).is_some() {
            self.in_flight.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

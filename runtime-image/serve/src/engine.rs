//! The engine: one thread that owns scheduler and executor, and handles that submit requests to it.
//!
//! A request's events go through a channel of its own with room for its whole answer, so a slow reader holds up nobody; a
//! reader that goes away closes the channel, which is how a request is cancelled.

mod active;
mod adapter;
pub mod candle;
mod constraint;
mod disk;
pub mod encoder;
pub mod executor;
mod forward;
mod pace;
mod rules;
mod run;
mod sample;
mod score;
mod speculate;
mod text;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use strata_model::Vocabulary;
use tokio::sync::{mpsc, oneshot};

pub use adapter::Adapter;
pub(crate) use constraint::lark_regex;
pub use constraint::{Constraint, Form, FormError, Forms};
pub(crate) use disk::Disk;
pub use forward::Forward;
pub use sample::{Sampling, TokenProb};
pub use score::{ScoreError, Scorer};
pub(crate) use speculate::Drafter;
pub use speculate::Speculation;

use crate::metrics::Metrics;
use crate::schedule::{ClientId, Limits};
use run::{Runner, Shared};

/// The most choices of one request, whatever the limits.
const MAX_CHOICES: usize = 16;

/// A request as the engine sees it.
#[derive(Clone, Debug)]
pub struct Submission {
    /// The prompt's tokens; not empty, all inside the vocabulary.
    pub prompt: Vec<u32>,
    /// The most tokens to generate; at least 1.
    pub max_tokens: usize,
    /// How many answers to give, from one computation of the prompt; 1 to [`Engine::most_choices`]. Choice 0 draws with the
    /// seed as it is, so it is the answer that it would be alone; each other choice has a seed made of it and its number.
    pub choices: usize,
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
    /// Only requests with the same salt find each other's prompts in the prefix cache; see [`salt`].
    pub salt: Arc<[u8]>,
    /// Who shares fairly with the others.
    pub client: ClientId,
    /// Lower is earlier: each level is worth a number of tokens, see [`crate::schedule`].
    pub priority: i64,
    /// The LoRA adapter that it is computed with.
    pub adapter: Option<Arc<Adapter>>,
    /// Report each token's log-probability and that many alternatives.
    pub log_probs: Option<usize>,
    /// The same of the prompt's tokens, before any token of the answer. Nothing of the prompt then comes from the prefix cache.
    pub prompt_log_probs: Option<usize>,
}

/// The salt of several parts, as a tenant's and an adapter's: two are equal only if all parts are. Without any part it is the
/// salt of everybody.
pub fn salt(parts: &[&[u8]]) -> Arc<[u8]> {
    if parts.iter().all(|part| part.is_empty()) {
        return Arc::from([]);
    }
    let with_length = |part: &&[u8]| [&part.len().to_le_bytes()[..], part].concat();
    parts.iter().flat_map(with_length).collect()
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

/// Token counts of a finished choice.
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
    /// The prompt was computed; only where its log-probabilities were asked for.
    Prompt {
        /// The first answer; the others have the same prompt.
        choice: usize,
        /// The first token: nothing says how likely it is.
        first: u32,
        /// The others, each with its alternatives.
        log_probs: Vec<(TokenProb, Vec<TokenProb>)>,
    },
    /// A token was generated.
    Token {
        /// For which answer.
        choice: usize,
        /// The text it completed, possibly empty.
        text: String,
        /// The token and its alternatives, if asked for.
        log_probs: Option<(TokenProb, Vec<TokenProb>)>,
    },
    /// An answer is complete. Always its last event.
    Finished {
        /// Which answer.
        choice: usize,
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
    #[error(
        "the server has no place for more than the {most} answers that it takes; try again in {retry_after_seconds} s"
    )]
    Busy {
        /// How many it takes.
        most: usize,
        /// When there will probably be room.
        retry_after_seconds: u64,
    },
    /// The engine has stopped.
    #[error("the engine has stopped")]
    Stopped,
}

/// Submits requests to the engine; cheap to clone.
#[derive(Clone, Debug)]
pub struct Engine {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    limits: Limits,
}

struct Command {
    submission: Submission,
    events: mpsc::Sender<Event>,
    arrived: Instant,
}

impl Engine {
    /// Starts the engine's thread. With `speculation` up to that many tokens are guessed ahead of each step; blocks that the cache
    /// has no more room for go to `disk`. The receiver resolves when the thread ends: after the last handle is gone, or by a panic.
    pub(crate) fn start(
        executor: Box<dyn Forward>,
        speculation: Option<(Drafter, usize)>,
        disk: Option<Disk>,
        vocabulary: Arc<Vocabulary>,
        limits: Limits,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<(Engine, oneshot::Receiver<()>)> {
        let (commands, receiver) = mpsc::channel(limits.max_sequences + limits.max_waiting);
        let shared = Arc::new(Shared::default());
        let (ended, ended_receiver) = oneshot::channel();
        let mut runner = Runner::new(
            receiver,
            executor,
            speculation,
            vocabulary,
            limits,
            shared.clone(),
            metrics,
        );
        runner.disk = disk;
        std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
            let _ended = ended; // dropped when the thread ends, however it ends
            runner.run();
        })?;
        Ok((
            Engine {
                commands,
                shared,
                limits,
            },
            ended_receiver,
        ))
    }

    /// Takes a request; its events arrive in the receiver. Dropping the receiver cancels the request.
    pub fn submit(&self, submission: Submission) -> Result<mpsc::Receiver<Event>, SubmitError> {
        let (most, choices) = (self.most_in_flight(), submission.choices);
        let taken = self
            .shared
            .in_flight
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| {
                (count + choices <= most).then_some(count + choices)
            });
        if taken.is_err() {
            return Err(self.busy());
        }
        let of_prompt = usize::from(submission.prompt_log_probs.is_some());
        let (events, receiver) = mpsc::channel(of_prompt + choices * (submission.max_tokens + 1));
        let command = Command {
            submission,
            events,
            arrived: Instant::now(),
        };
        self.commands.try_send(command).map_err(|_| {
            self.shared.in_flight.fetch_sub(choices, Ordering::SeqCst);
            SubmitError::Stopped
        })?;
        Ok(receiver)
    }

    /// Whether a request would be taken now.
    pub fn has_room(&self) -> Result<(), SubmitError> {
        match self.in_flight() < self.most_in_flight() {
            true => Ok(()),
            false => Err(self.busy()),
        }
    }

    /// The most choices that one request may have.
    pub fn most_choices(&self) -> usize {
        self.limits.max_sequences.min(MAX_CHOICES)
    }

    fn busy(&self) -> SubmitError {
        SubmitError::Busy {
            most: self.most_in_flight(),
            retry_after_seconds: self.shared.pace.retry_after_seconds(self.in_flight()),
        }
    }

    fn most_in_flight(&self) -> usize {
        self.limits.max_sequences + self.limits.max_waiting
    }

    /// Answers that were asked for and have not ended.
    pub fn in_flight(&self) -> usize {
        self.shared.in_flight.load(Ordering::SeqCst)
    }

    /// Ends every request now, each with [`FinishReason::Abort`] and what it has so far; also those that come later.
    pub fn abort_all(&self) {
        self.shared.abort.store(true, Ordering::SeqCst);
    }
}

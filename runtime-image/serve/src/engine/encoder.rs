//! Encoders: texts' tokens in, a vector for each out. One thread owns the weights; requests wait in a bounded queue, and texts
//! of several requests are computed together.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use strata_kernels::arena::Arena;
use strata_kernels::cpu::{Isa, isa};
use strata_kernels::infer::{FloatRows, Format, Input, Matrix, Q8Rows, matmul};
use strata_kernels::ops::encoder::{Texts, attend_both_ways, gelu, layer_norm};
use strata_kernels::pool;
use strata_model::ModelError;
use strata_model::bert::{Bert, BertConfig, Pooling};
use tokio::sync::{mpsc, oneshot};

use super::pace::Pace;
use super::{FinishReason, SubmitError, Usage};
use crate::metrics::{Metrics, Timing};

/// `x · wᵀ + bias`.
struct Linear {
    weight: Matrix,
    bias: Vec<f32>,
}

/// Gain and bias of a layer normalization.
struct Norm {
    gain: Vec<f32>,
    bias: Vec<f32>,
}

struct Layer {
    queries: Linear,
    keys: Linear,
    values: Linear,
    mixed: Linear,
    mixed_norm: Norm,
    inner: Linear,
    outer: Linear,
    outer_norm: Norm,
}

/// An encoder's weights and what it takes to run them.
pub struct Encoder {
    config: BertConfig,
    isa: Isa,
    words: Vec<f32>,
    positions: Vec<f32>,
    /// The vector of the one segment that texts here have.
    segment: Vec<f32>,
    norm: Norm,
    layers: Vec<Layer>,
    rows: FloatRows,
    /// Never filled: no matrix here is quantized.
    none: Q8Rows,
}

impl Encoder {
    /// Loads the weights into the kernels' layout, as F32.
    pub fn new(model: &Bert) -> Result<Self, ModelError> {
        let arena = Arena::default();
        let config = model.config.clone();
        let tensor = |name: &str| model.weights.f32(&format!("{}{name}", model.prefix));
        let norm = |name: &str| {
            Ok::<_, ModelError>(Norm {
                gain: tensor(&format!("{name}.weight"))?,
                bias: tensor(&format!("{name}.bias"))?,
            })
        };
        let linear = |name: &str| {
            let bias = tensor(&format!("{name}.bias"))?;
            let values = tensor(&format!("{name}.weight"))?;
            let (rows, columns) = (bias.len(), values.len() / bias.len());
            let stored: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            Ok::<_, ModelError>(Linear {
                weight: Matrix::pack(pool::global(), &arena, Format::F32, rows, columns, &stored),
                bias,
            })
        };
        let layers = (0..config.layers)
            .map(|layer| {
                let name = |part: &str| format!("encoder.layer.{layer}.{part}");
                Ok(Layer {
                    queries: linear(&name("attention.self.query"))?,
                    keys: linear(&name("attention.self.key"))?,
                    values: linear(&name("attention.self.value"))?,
                    mixed: linear(&name("attention.output.dense"))?,
                    mixed_norm: norm(&name("attention.output.LayerNorm"))?,
                    inner: linear(&name("intermediate.dense"))?,
                    outer: linear(&name("output.dense"))?,
                    outer_norm: norm(&name("output.LayerNorm"))?,
                })
            })
            .collect::<Result<Vec<_>, ModelError>>()?;
        let mut segment = tensor("embeddings.token_type_embeddings.weight")?;
        segment.truncate(config.hidden_size);
        Ok(Encoder {
            isa: isa(),
            words: tensor("embeddings.word_embeddings.weight")?,
            positions: tensor("embeddings.position_embeddings.weight")?,
            segment,
            norm: norm("embeddings.LayerNorm")?,
            layers,
            rows: FloatRows::default(),
            none: Q8Rows::default(),
            config,
        })
    }

    /// The vector of each text. Each has 1 to `max_positions` tokens of the vocabulary.
    pub fn encode(&mut self, texts: &[&[u32]]) -> Vec<Vec<f32>> {
        let (hidden, eps) = (self.config.hidden_size, self.config.norm_eps);
        let head = hidden / self.config.heads;
        let bounds = Texts::new(texts.iter().map(|text| text.len()));
        let rows = bounds.rows();
        let mut x = Vec::with_capacity(rows * hidden);
        for text in texts {
            for (position, token) in text.iter().enumerate() {
                let word = &self.words[*token as usize * hidden..][..hidden];
                let place = &self.positions[position * hidden..][..hidden];
                let sums = word.iter().zip(place).zip(&self.segment);
                x.extend(sums.map(|((word, place), segment)| word + segment + place));
            }
        }
        layer_norm(&mut x, &self.norm.gain, &self.norm.bias, eps);
        let mut linear = Linears {
            isa: self.isa,
            rows: &mut self.rows,
            none: &self.none,
        };
        let mut mixed = vec![0.0; rows * hidden];
        for layer in &self.layers {
            let [queries, keys, values] = linear.apply(&x, [&layer.queries, &layer.keys, &layer.values]);
            attend_both_ways(&mut mixed, &queries, &keys, &values, &bounds, head);
            let [out] = linear.apply(&mixed, [&layer.mixed]);
            add(&mut x, &out);
            layer_norm(&mut x, &layer.mixed_norm.gain, &layer.mixed_norm.bias, eps);
            let [mut inner] = linear.apply(&x, [&layer.inner]);
            gelu(&mut inner);
            let [out] = linear.apply(&inner, [&layer.outer]);
            add(&mut x, &out);
            layer_norm(&mut x, &layer.outer_norm.gain, &layer.outer_norm.bias, eps);
        }
        let mut vectors = Vec::with_capacity(texts.len());
        let mut rest = x.as_slice();
        for text in texts {
            let (own, others) = rest.split_at(text.len() * hidden);
            rest = others;
            vectors.push(self.pooled(own));
        }
        vectors
    }

    fn pooled(&self, rows: &[f32]) -> Vec<f32> {
        let hidden = self.config.hidden_size;
        let mut vector = rows[..hidden].to_vec();
        if self.config.pooling == Pooling::Mean {
            rows.chunks_exact(hidden).skip(1).for_each(|row| add(&mut vector, row));
            let count = (rows.len() / hidden) as f32;
            vector.iter_mut().for_each(|x| *x /= count);
        }
        if self.config.normalize {
            normalize(&mut vector);
        }
        vector
    }
}

/// Gives the vector the length 1.
pub(crate) fn normalize(vector: &mut [f32]) {
    let squares: f64 = vector.iter().map(|x| f64::from(*x).powi(2)).sum();
    let length = squares.sqrt().max(1e-12) as f32;
    vector.iter_mut().for_each(|x| *x /= length);
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

struct Linears<'a> {
    isa: Isa,
    rows: &'a mut FloatRows,
    none: &'a Q8Rows,
}

impl Linears<'_> {
    /// What each of several layers makes of the same input.
    fn apply<const N: usize>(&mut self, x: &[f32], layers: [&Linear; N]) -> [Vec<f32>; N] {
        let columns = layers[0].weight.columns();
        self.rows.fill(pool::global(), columns, x);
        let rows = x.len() / columns;
        let mut outs = layers.map(|layer| vec![0.0; rows * layer.bias.len()]);
        let mut products: Vec<(&Matrix, &mut [f32])> = layers
            .iter()
            .zip(&mut outs)
            .map(|(layer, out)| (&layer.weight, out.as_mut_slice()))
            .collect();
        let input = Input {
            floats: self.rows,
            quantized: self.none,
        };
        matmul(pool::global(), self.isa, input, &mut products);
        for (layer, out) in layers.iter().zip(&mut outs) {
            out.chunks_exact_mut(layer.bias.len())
                .for_each(|row| add(row, &layer.bias));
        }
        outs
    }
}

/// Texts of one request, and where their vectors go.
struct Job {
    texts: Vec<Vec<u32>>,
    vectors: Vec<Vec<f32>>,
    reply: oneshot::Sender<Vec<Vec<f32>>>,
    timing: Timing,
}

/// Submits texts to an encoder's thread; cheap to clone.
#[derive(Clone)]
pub(crate) struct Embedder {
    jobs: mpsc::Sender<Job>,
    in_flight: Arc<AtomicUsize>,
    pace: Arc<Pace>,
    most_in_flight: usize,
}

impl Embedder {
    /// Starts the thread. At most `most_in_flight` requests are taken, and about `batch_tokens` tokens computed at once. The
    /// receiver resolves when the thread ends.
    pub(crate) fn start(
        encoder: Encoder,
        most_in_flight: usize,
        batch_tokens: usize,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<(Self, oneshot::Receiver<()>)> {
        let (jobs, receiver) = mpsc::channel(most_in_flight);
        let (in_flight, pace) = (Arc::new(AtomicUsize::new(0)), Arc::new(Pace::default()));
        let (ended, ended_receiver) = oneshot::channel();
        let runner = Runner {
            jobs: receiver,
            encoder,
            batch_tokens,
            in_flight: in_flight.clone(),
            pace: pace.clone(),
            last_end: Instant::now(),
            metrics,
        };
        std::thread::Builder::new().name("encoder".to_owned()).spawn(move || {
            let _ended = ended; // dropped when the thread ends, however it ends
            runner.run();
        })?;
        let embedder = Embedder {
            jobs,
            in_flight,
            pace,
            most_in_flight,
        };
        Ok((embedder, ended_receiver))
    }

    /// Takes texts; their vectors arrive in the receiver, in order. Dropping it cancels the request.
    pub(crate) fn submit(&self, texts: Vec<Vec<u32>>) -> Result<oneshot::Receiver<Vec<Vec<f32>>>, SubmitError> {
        let most = self.most_in_flight;
        let more = |count| (count < most).then_some(count + 1);
        if self
            .in_flight
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, more)
            .is_err()
        {
            return Err(self.busy());
        }
        let (reply, receiver) = oneshot::channel();
        let job = Job {
            vectors: Vec::with_capacity(texts.len()),
            texts,
            reply,
            timing: Timing::new(Instant::now()),
        };
        self.jobs.try_send(job).map_err(|_| {
            self.in_flight.fetch_sub(1, Ordering::SeqCst);
            SubmitError::Stopped
        })?;
        Ok(receiver)
    }

    /// Whether a request would be taken now.
    pub(crate) fn has_room(&self) -> Result<(), SubmitError> {
        match self.in_flight() < self.most_in_flight {
            true => Ok(()),
            false => Err(self.busy()),
        }
    }

    fn busy(&self) -> SubmitError {
        SubmitError::Busy {
            most: self.most_in_flight,
            retry_after_seconds: self.pace.retry_after_seconds(self.in_flight()),
        }
    }

    /// Requests that were taken and have not ended.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }
}

struct Runner {
    jobs: mpsc::Receiver<Job>,
    encoder: Encoder,
    batch_tokens: usize,
    in_flight: Arc<AtomicUsize>,
    pace: Arc<Pace>,
    last_end: Instant,
    metrics: Arc<Metrics>,
}

impl Runner {
    fn run(mut self) {
        let mut jobs: VecDeque<Job> = VecDeque::new();
        loop {
            if jobs.is_empty() {
                match self.jobs.blocking_recv() {
                    Some(job) => {
                        self.last_end = Instant::now();
                        jobs.push_back(job);
                    }
                    None => return,
                }
            }
            while let Ok(job) = self.jobs.try_recv() {
                jobs.push_back(job);
            }
            self.step(&mut jobs);
            while let Some(at) = jobs
                .iter()
                .position(|job| job.texts.len() == job.vectors.len() || job.reply.is_closed())
            {
                if let Some(job) = jobs.remove(at) {
                    self.end(job);
                }
            }
            if jobs.is_empty() {
                self.metrics.queue(0, 0);
            }
        }
    }

    /// Computes the next texts, those that came first at first.
    fn step(&mut self, jobs: &mut VecDeque<Job>) {
        let (mut texts, mut owners, mut tokens) = (Vec::new(), Vec::new(), 0);
        let all = jobs.len();
        for (at, job) in jobs.iter_mut().enumerate() {
            job.timing.scheduled(Instant::now());
            for text in &job.texts[job.vectors.len()..] {
                if !texts.is_empty() && tokens + text.len() > self.batch_tokens {
                    break;
                }
                tokens += text.len();
                texts.push(text.as_slice());
                owners.push(at);
            }
            if tokens >= self.batch_tokens {
                break;
            }
        }
        let running = owners.last().map_or(0, |last| last + 1);
        self.metrics.queue(running, all - running);
        let vectors = self.encoder.encode(&texts);
        self.metrics.step(tokens);
        for (at, vector) in owners.into_iter().zip(vectors) {
            jobs[at].vectors.push(vector);
        }
    }

    fn end(&mut self, job: Job) {
        let usage = Usage {
            prompt_tokens: job.texts.iter().map(Vec::len).sum(),
            ..Usage::default()
        };
        let done = job.vectors.len() == job.texts.len();
        let reason = if done { FinishReason::Stop } else { FinishReason::Abort };
        self.metrics.embedded(reason, &usage, &job.timing);
        let now = Instant::now();
        self.pace.ended(now - self.last_end);
        self.last_end = now;
        // Counted before the client hears of it, so that it finds room again.
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
        if done {
            // A client that has gone does not want it.
            let _ = job.reply.send(job.vectors);
        }
    }
}

#[cfg(test)]
mod tests;

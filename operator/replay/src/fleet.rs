//! The fleet: a router in front of servers that start, serve, drain and go, as a Deployment's pods do.

use std::collections::VecDeque;

use strata_operator::autoscale::{Fleet, Replica};

use crate::engine::{Event, Profile, Request, Server};
use crate::scaler::Scaler;
use crate::trace::Trace;

/// The operator's pace in seconds, which is also that of Kubernetes' HPA.
pub const PACE_SECONDS: f64 = 15.0;
/// Length of the windows in which the objective is judged, in seconds.
pub const WINDOW_SECONDS: f64 = 60.0;

/// Time within which taking back a change is a flap, in seconds.
const FLAP_SECONDS: f64 = 300.0;

/// Who gets a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Router {
    /// The server with the fewest requests inside.
    #[default]
    LeastLoad,
    /// One after the other.
    RoundRobin,
}

/// How a fleet is.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Its servers.
    pub profile: Profile,
    /// Time from a pod's making to its first answer, in seconds.
    pub cold_start_seconds: f64,
    /// The router.
    pub router: Router,
    /// Pods that are ready at the beginning.
    pub start: u32,
    /// Objective for the 95th percentile of the time to the first token, in seconds.
    pub objective_seconds: f64,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Requests that came.
    pub requests: usize,
    /// Share of the minutes with requests in which the 95th percentile of the time to the first token, of the requests that came
    /// in it, kept the objective.
    pub attainment: f64,
    /// Share of the requests whose first token came within the objective.
    pub requests_within: f64,
    /// 95th percentile of the time to the first token of all requests, in seconds.
    pub first_token_p95: f64,
    /// Accelerator-hours until the end of the trace, of starting and draining pods too.
    pub accelerator_hours: f64,
    /// Changes of the number.
    pub changes: Vec<Change>,
    /// Requests that were put back for want of cache.
    pub preemptions: u64,
    /// A point for each window.
    pub windows: Vec<Window>,
}

/// A change of the number of replicas.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// When, in seconds.
    pub at: f64,
    /// Replicas before.
    pub before: u32,
    /// Replicas after.
    pub after: u32,
    /// Why.
    pub why: String,
}

/// One window of the outcome.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Window {
    /// When it begins, in seconds.
    pub at: f64,
    /// Requests that came in it.
    pub requests: usize,
    /// 95th percentile of their time to the first token, in seconds; `None` without requests.
    pub first_token_p95: Option<f64>,
    /// Wanted replicas at its end.
    pub wanted: u32,
    /// Ready replicas at its end.
    pub ready: u32,
}

impl Outcome {
    /// Changes that took back the one before within 5 minutes, the window that Kubernetes' HPA waits against just that.
    pub fn flaps(&self) -> usize {
        let direction = |change: &Change| change.after > change.before;
        let pairs = self.changes.windows(2);
        pairs
            .filter(|pair| pair[1].at - pair[0].at < FLAP_SECONDS && direction(&pair[0]) != direction(&pair[1]))
            .count()
    }
}

enum State {
    Starting { ready_at: f64 },
    Ready,
    Draining,
}

struct Pod {
    name: String,
    made_at: f64,
    scraped_at: Option<f64>,
    state: State,
    server: Server,
}

struct Sim<'a> {
    setup: &'a Setup,
    pods: Vec<Pod>,
    made: usize,
    turn: usize,
    /// Requests that came while nothing was ready.
    orphans: VecDeque<Request>,
    /// When the trace ends.
    end: f64,
    pod_seconds: f64,
    preemptions: u64,
    first_tokens: Vec<Vec<f32>>,
}

/// Drives a fleet through a trace.
pub fn run(setup: &Setup, trace: &Trace, scaler: &mut dyn Scaler) -> Outcome {
    let windows = (trace.seconds / WINDOW_SECONDS).ceil() as usize + 1;
    let mut sim = Sim {
        setup,
        pods: Vec::new(),
        made: 0,
        turn: 0,
        orphans: VecDeque::new(),
        end: trace.seconds,
        pod_seconds: 0.0,
        preemptions: 0,
        first_tokens: vec![Vec::new(); windows],
    };
    for _ in 0..setup.start {
        sim.make(0.0, 0.0);
    }
    let mut outcome = Outcome {
        requests: trace.requests.len(),
        ..Outcome::default()
    };
    let mut wanted = setup.start;
    let mut coming = trace.requests.iter().peekable();
    let mut tick = PACE_SECONDS;
    loop {
        let at = coming.peek().map_or(f64::INFINITY, |request| request.at);
        let (pod, step) = sim.next_step();
        let now = at.min(step).min(tick);
        if now == step {
            sim.advance(pod);
        } else if now == at {
            if let Some(request) = coming.next() {
                sim.route(*request, now);
            }
        } else {
            sim.settle(now);
            if tick <= trace.seconds {
                let answer = scaler.replicas(&sim.scrape(now), wanted, now);
                if answer.replicas != wanted {
                    outcome.changes.push(Change {
                        at: now,
                        before: wanted,
                        after: answer.replicas,
                        why: answer.why,
                    });
                    wanted = answer.replicas;
                    sim.scale(wanted, now);
                }
                if now % WINDOW_SECONDS == 0.0 {
                    outcome.windows.push(Window {
                        at: now - WINDOW_SECONDS,
                        wanted,
                        ready: sim.ready() as u32,
                        ..Window::default()
                    });
                }
            } else if sim.pods.iter().all(|pod| pod.server.inside() == 0) || tick > trace.seconds + 7200.0 {
                break;
            }
            tick += PACE_SECONDS;
        }
    }
    sim.finish(outcome, trace)
}

impl Sim<'_> {
    fn make(&mut self, now: f64, cold_start_seconds: f64) {
        let state = match cold_start_seconds > 0.0 {
            true => State::Starting {
                ready_at: now + cold_start_seconds,
            },
            false => State::Ready,
        };
        self.pods.push(Pod {
            name: format!("pod-{:05}", self.made),
            made_at: now,
            scraped_at: None,
            state,
            server: Server::new(self.setup.profile),
        });
        self.made += 1;
    }

    fn ready(&self) -> usize {
        self.pods.iter().filter(|pod| matches!(pod.state, State::Ready)).count()
    }

    fn next_step(&self) -> (usize, f64) {
        let ends = self.pods.iter().map(|pod| pod.server.next().unwrap_or(f64::INFINITY));
        ends.enumerate()
            .min_by(|(_, a), (_, b)| a.total_cmp(b))
            .unwrap_or((0, f64::INFINITY))
    }

    fn advance(&mut self, pod: usize) {
        let first_tokens = &mut self.first_tokens;
        self.pods[pod].server.advance(|event| {
            if let Event::FirstToken(request, seconds) = event
                && let Some(window) = first_tokens.get_mut((request.at / WINDOW_SECONDS) as usize)
            {
                window.push(seconds as f32);
            }
        });
    }

    fn route(&mut self, request: Request, now: f64) {
        let ready = || {
            self.pods
                .iter()
                .enumerate()
                .filter(|(_, pod)| matches!(pod.state, State::Ready))
        };
        let chosen = match self.setup.router {
            Router::LeastLoad => ready().min_by_key(|(_, pod)| pod.server.inside()),
            Router::RoundRobin => ready().nth(self.turn % ready().count().max(1)),
        };
        let chosen = chosen.map(|(index, _)| index);
        self.turn += 1;
        match chosen {
            Some(index) => self.pods[index].server.accept(request, now),
            None => self.orphans.push_back(request),
        }
    }

    /// Pods that are ready by now become so, and drained ones go.
    fn settle(&mut self, now: f64) {
        for pod in &mut self.pods {
            if matches!(pod.state, State::Starting { ready_at } if ready_at <= now) {
                pod.state = State::Ready;
            }
        }
        for index in (0..self.pods.len()).rev() {
            if matches!(self.pods[index].state, State::Draining) && self.pods[index].server.inside() == 0 {
                self.remove(index, now);
            }
        }
        if self.ready() > 0 {
            for request in std::mem::take(&mut self.orphans) {
                self.route(request, now);
            }
        }
    }

    fn remove(&mut self, index: usize, now: f64) {
        let pod = self.pods.remove(index);
        self.pod_seconds += (now.min(self.end) - pod.made_at).max(0.0);
        self.preemptions += pod.server.preemptions;
    }

    fn scrape(&mut self, now: f64) -> Fleet {
        let look = |pod: &mut Pod| {
            let replica = match pod.state {
                State::Draining => return None,
                State::Starting { .. } => Replica::Starting,
                State::Ready => {
                    let window = pod.scraped_at.map_or(0.0, |at| now - at);
                    pod.scraped_at = Some(now);
                    let server = &mut pod.server;
                    let (running, waiting, share) = (server.computed(), server.queued(), server.cache_share());
                    Replica::Answering(server.counters.scrape(window, running, waiting, share))
                }
            };
            Some((pod.name.clone(), replica))
        };
        self.pods.iter_mut().filter_map(look).collect()
    }

    /// Makes pods, or lets the newest go, those that start first, as a ReplicaSet does.
    fn scale(&mut self, wanted: u32, now: f64) {
        let living = |sim: &Self| {
            let lives = |pod: &&Pod| !matches!(pod.state, State::Draining);
            sim.pods.iter().filter(lives).count()
        };
        while living(self) < wanted as usize {
            self.make(now, self.setup.cold_start_seconds);
        }
        while living(self) > wanted as usize {
            let starting = self
                .pods
                .iter()
                .rposition(|pod| matches!(pod.state, State::Starting { .. }));
            if let Some(index) = starting {
                self.remove(index, now);
                continue;
            }
            let Some(index) = self.pods.iter().rposition(|pod| matches!(pod.state, State::Ready)) else {
                return;
            };
            self.pods[index].state = State::Draining;
        }
    }

    fn finish(mut self, mut outcome: Outcome, trace: &Trace) -> Outcome {
        let objective = self.setup.objective_seconds;
        while let Some(pod) = self.pods.pop() {
            self.pod_seconds += (trace.seconds - pod.made_at).max(0.0);
            self.preemptions += pod.server.preemptions;
        }
        let mut came = vec![0; self.first_tokens.len()];
        for request in &trace.requests {
            came[(request.at / WINDOW_SECONDS) as usize] += 1;
        }
        let mut kept = 0;
        let mut judged = 0;
        for (index, times) in self
            .first_tokens
            .iter_mut()
            .enumerate()
            .filter(|(index, _)| came[*index] > 0)
        {
            // One whose first token never came is beyond every objective.
            times.resize(came[index], f32::INFINITY);
            let p95 = percentile(times, 0.95);
            judged += 1;
            kept += usize::from(p95 <= objective);
            if let Some(window) = outcome.windows.get_mut(index) {
                window.requests = came[index];
                window.first_token_p95 = Some(p95);
            }
        }
        let mut all: Vec<f32> = self.first_tokens.into_iter().flatten().collect();
        let within = all.iter().filter(|seconds| f64::from(**seconds) <= objective).count();
        outcome.attainment = kept as f64 / judged.max(1) as f64;
        outcome.requests_within = within as f64 / all.len().max(1) as f64;
        outcome.first_token_p95 = percentile(&mut all, 0.95);
        outcome.accelerator_hours = self.pod_seconds / 3600.0 * f64::from(self.setup.profile.accelerators);
        outcome.preemptions = self.preemptions;
        outcome
    }
}

/// The least value that a share of the values does not exceed.
fn percentile(values: &mut [f32], share: f64) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    let rank = ((values.len() as f64 * share).ceil() as usize).clamp(1, values.len()) - 1;
    let (_, value, _) = values.select_nth_unstable_by(rank, f32::total_cmp);
    f64::from(*value)
}

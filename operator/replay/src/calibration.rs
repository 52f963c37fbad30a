//! Servers whose figures were measured, and how far the model of them is from what was measured.

use crate::engine::{Event, Profile, Request, Server};

/// A published measurement: so many clients that each ask again as soon as they are answered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// Tokens of each prompt.
    pub prompt: u32,
    /// Tokens of each answer.
    pub output: u32,
    /// Clients.
    pub clients: u32,
    /// Mean time to the first token in milliseconds.
    pub first_token: f64,
    /// Mean time between tokens in milliseconds.
    pub between_tokens: f64,
    /// Tokens of answers a second.
    pub throughput: f64,
}

const fn row(prompt: u32, output: u32, clients: u32, first_token: f64, between_tokens: f64, throughput: f64) -> Row {
    Row {
        prompt,
        output,
        clients,
        first_token,
        between_tokens,
        throughput,
    }
}

/// Llama-3.3-70B-Instruct in FP8 on 2 H100 80G with NVIDIA NIM 1.8.0, as NVIDIA publishes it: docs.nvidia.com/nim/benchmarking/llm/1.0.0/performance.
pub const NIM_70B: [Row; 22] = [
    row(200, 200, 1, 31.22, 18.8, 53.0),
    row(200, 200, 5, 88.7, 18.83, 260.67),
    row(200, 200, 25, 138.98, 20.61, 1178.68),
    row(200, 200, 50, 156.28, 23.33, 2081.24),
    row(200, 200, 100, 176.8, 29.87, 3263.31),
    row(200, 200, 250, 264.22, 48.16, 5067.05),
    row(1000, 1000, 1, 82.46, 18.67, 53.37),
    row(1000, 1000, 25, 250.49, 22.45, 1102.23),
    row(1000, 1000, 50, 278.62, 25.87, 1912.93),
    row(1000, 1000, 100, 334.23, 34.21, 2895.49),
    row(1000, 1000, 200, 558.23, 50.66, 3901.74),
    row(500, 2000, 1, 47.77, 18.91, 52.85),
    row(500, 2000, 50, 181.64, 23.97, 2078.43),
    row(500, 2000, 100, 229.77, 29.98, 3322.87),
    row(500, 2000, 150, 296.74, 37.85, 3948.26),
    row(5000, 500, 1, 406.77, 18.58, 51.67),
    row(5000, 500, 5, 546.7, 21.83, 218.48),
    row(5000, 500, 25, 688.69, 38.75, 623.4),
    row(5000, 500, 50, 834.51, 59.73, 814.37),
    row(5000, 500, 100, 7996.25, 92.91, 917.26),
    row(20000, 2000, 1, 1833.01, 19.58, 48.8),
    row(20000, 2000, 25, 18781.26, 48.26, 415.33),
];

/// The model of it, by [`fit`]. Its cache follows from the rows in which it is full: 920 tokens a second at 92.9 ms are 85.5 requests of 5,500.
pub const H100_70B: Profile = Profile {
    name: "Llama-3.3-70B FP8 on 2 H100",
    accelerators: 2,
    step: 0.0183,
    token: 6.1e-5,
    cached: 2.5e-8,
    attention: 3.0e-9,
    cache_tokens: 470_000,
    block_tokens: 64,
    step_tokens: 8192,
    sequences: 256,
    reserves: true,
};

/// SmolLM2-135M in Q4_1 with our own engine on 2 threads of a Xeon with AMX, 128 tokens in and 64 out over HTTP: docs/performance/bench.json of
/// 2026-11-25 (`make bench-serve`), `concurrency`.
pub const STRATA_ROWS: [Row; 5] = [
    row(128, 64, 1, 76.9, 2.73, 256.7),
    row(128, 64, 2, 102.4, 4.85, 311.9),
    row(128, 64, 4, 221.1, 4.91, 480.7),
    row(128, 64, 8, 305.2, 10.4, 523.6),
    row(128, 64, 16, 541.5, 25.1, 476.4),
];

/// The model of it, from other figures of the same file: 2,149 prompt tokens a second are 0.465 ms for each, 421 decoded ones a second are 1.91 ms
/// for a step beside that, and 310 at a depth of 512 are 1.66 µs for each cached token. The cache is the default of 256Mi.
pub const STRATA_CPU: Profile = Profile {
    name: "SmolLM2-135M Q4_1 on 2 processors",
    accelerators: 1,
    step: 0.001_91,
    token: 4.65e-4,
    cached: 1.66e-6,
    attention: 0.0,
    cache_tokens: 11_650,
    block_tokens: 16,
    step_tokens: 512,
    sequences: 32,
    reserves: false,
};

/// What the model says of a row.
pub fn modelled(profile: &Profile, row: &Row) -> Row {
    let mut server = Server::new(*profile);
    let request = |at: f64| Request {
        at,
        prompt: row.prompt,
        output: row.output,
    };
    // Clients that begin together would stay together, as all requests are alike: they begin one after the other, over the time
    // of a request as it was measured.
    let apart = (row.first_token + f64::from(row.output) * row.between_tokens) / 1e3 / f64::from(row.clients);
    let mut starts = (0..row.clients).map(|client| f64::from(client) * apart).peekable();
    // The first three rounds settle, six count.
    let (settle, count) = (3 * row.clients as usize, 6 * row.clients as usize);
    let (mut ended, mut began_at, mut first, mut seen) = (0, 0.0, 0.0, 0);
    let (mut tokens, mut token_seconds) = (0.0, 0.0);
    while ended < settle + count {
        let start = starts.peek().copied().unwrap_or(f64::INFINITY);
        let now = server.next().unwrap_or(f64::INFINITY);
        if start <= now && start.is_finite() {
            starts.next();
            server.accept(request(start), start);
            continue;
        }
        if now.is_infinite() {
            break;
        }
        let mut again = 0;
        server.advance(|event| match event {
            Event::FirstToken(_, seconds) if ended >= settle => {
                first += seconds;
                seen += 1;
            }
            Event::FirstToken(..) => {}
            Event::Finished(_) => {
                ended += 1;
                again += 1;
                if ended == settle {
                    began_at = now;
                }
            }
        });
        let histogram = server.counters.scrape(1.0, 0, 0, 0.0).inter_token_latency;
        if let Some(histogram) = histogram.filter(|_| ended >= settle) {
            tokens += histogram.count();
            token_seconds += histogram.sum_seconds.unwrap_or(0.0);
        }
        for _ in 0..again {
            server.accept(request(now), now);
        }
        if ended >= settle + count {
            return Row {
                first_token: 1e3 * first / f64::from(seen.max(1)),
                between_tokens: 1e3 * token_seconds / tokens.max(1.0),
                throughput: f64::from(row.output) * (ended - settle) as f64 / (now - began_at),
                ..*row
            };
        }
    }
    *row
}

/// The sum of the squared logarithms of how far the model is off: in the time between tokens, and with one client in that to the first token
/// too. With more, clients of a benchmark come in waves, of which the mean time to the first token tells more than of the server.
pub fn error(profile: &Profile, rows: &[Row]) -> f64 {
    let off = |is: f64, was: f64| (is / was).ln().powi(2);
    let of = |row: &Row| {
        let model = modelled(profile, row);
        let idle = if row.clients == 1 {
            off(model.first_token, row.first_token)
        } else {
            0.0
        };
        off(model.between_tokens, row.between_tokens) + idle
    };
    rows.iter().map(of).sum()
}

/// The parameters that come closest to the rows, from those of a profile: one after the other is moved while that helps.
pub fn fit(mut profile: Profile, rows: &[Row]) -> Profile {
    let parts: [fn(&mut Profile) -> &mut f64; 4] = [
        |profile| &mut profile.step,
        |profile| &mut profile.token,
        |profile| &mut profile.cached,
        |profile| &mut profile.attention,
    ];
    let mut best = error(&profile, rows);
    for stride in [1.2, 1.05, 1.01] {
        let mut moved = true;
        while moved {
            moved = false;
            for part in parts {
                for factor in [stride, 1.0 / stride] {
                    let mut tried = profile;
                    *part(&mut tried) *= factor;
                    let error = error(&tried, rows);
                    if error < best - 1e-9 {
                        (profile, best, moved) = (tried, error, true);
                    }
                }
            }
        }
    }
    profile
}

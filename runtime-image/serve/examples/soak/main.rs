//! 64 clients that behave badly and swap adapters, for some minutes, against a server of a small random model on the loopback:
//! `soak STRATA_RUNTIME [MINUTES]`. Ends by itself; the last line is one JSON object, and the exit status says whether every
//! accepted request was answered, no block was lost and the memory stayed flat.

#![allow(
    clippy::unwrap_used,
    reason = "the writer of adapters is shared with the tests, where an unwrap is an assertion"
)]

mod client;
#[path = "../../tests/peft/mod.rs"]
mod peft;
mod server;

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use client::{Client, Tally};
use serde_json::json;
use server::Server;

const CLIENTS: u64 = 64;
const DEFAULT_MINUTES: f64 = 10.0;
const SAMPLE: Duration = Duration::from_millis(250);
/// How long the server gets to become idle, and to end.
const END: Duration = Duration::from_secs(60);
/// What an allocator may keep more at the end than after a while; a leak of a block or a request a second is far more.
const GROWTH: f64 = 1.10;
const GROWTH_BYTES: f64 = 16e6;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The middle one of the samples taken between two shares of the whole time.
fn middle(samples: &[f64], from: f64, to: f64) -> f64 {
    let at = |share: f64| (samples.len() as f64 * share) as usize;
    let mut part = samples[at(from)..at(to)].to_vec();
    part.sort_by(f64::total_cmp);
    part.get(part.len() / 2).copied().unwrap_or(f64::NAN)
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let program = arguments.next().ok_or("give the path of strata-runtime")?;
    let minutes = arguments.next().map_or(Ok(DEFAULT_MINUTES), |text| text.parse())?;
    if !(minutes > 0.0 && minutes <= 24.0 * 60.0) {
        return Err("the minutes must be more than 0, a day at most".into());
    }
    // Also for plain HTTP, since reqwest has TLS in this workspace.
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
    let mut server = Server::start(program.as_ref()).await?;
    let tally = Arc::new(Tally::default());
    let end = Instant::now() + Duration::from_secs_f64(minutes * 60.0);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|seed| tokio::spawn(Client::new(server.url(), server.adapters(), seed, tally.clone()).run(end)))
        .collect();
    let mut memory = Vec::new();
    while Instant::now() < end {
        tokio::time::sleep(SAMPLE).await;
        memory.push(server.resident_bytes()?);
        if let Some(status) = server.ended()? {
            return Err(format!("the server ended with {status} in the middle").into());
        }
    }
    for client in clients {
        client.await?;
    }
    let idle = server.until_idle(END).await?;
    let exit = server.stop(END).await?;
    let (early, late) = (middle(&memory, 0.2, 0.4), middle(&memory, 0.8, 1.0));
    let failures = tally.failures();
    let flat = late <= early * GROWTH + GROWTH_BYTES;
    let good = failures.is_empty() && idle.lost_blocks_share == 0.0 && flat && exit.success();
    let report = json!({
        "good": good, "minutes": minutes, "clients": CLIENTS, "counts": tally.counts(), "generated_tokens": idle.generated_tokens,
        "preemptions": idle.preemptions, "blocks_in_use_at_the_end": idle.lost_blocks_share,
        "resident_megabytes_early": (early / 1e6).round(), "resident_megabytes_late": (late / 1e6).round(),
        "exit_status": exit.code(), "failures": failures,
    });
    writeln!(std::io::stdout(), "{report}")?;
    if good {
        Ok(())
    } else {
        Err("the server did not keep what is expected of it: see the line above".into())
    }
}

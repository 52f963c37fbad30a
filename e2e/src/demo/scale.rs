//! The last act: a load that one pod cannot hold brings a second one, and its end takes it away.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use kube::{Api, Client};
use strata_api::InferenceService;

use super::{NAMESPACE, shell_line};
use crate::chats::{Chats, Way};

/// The endpoint of the samples.
const SERVICE: &str = "assistant";
/// Chats at once: together they hold more of the cache than the sample aims at.
const CLIENTS: usize = 16;
/// Tokens of their answers; and of the one that goes on while a pod goes.
const TOKENS: u32 = 200;
const LONG_TOKENS: u32 = 400;
/// Longest time for each of the two changes.
const DEADLINE: Duration = Duration::from_secs(6 * 60);
/// Time between two looks at the service.
const LOOK: Duration = Duration::from_secs(2);

/// Plays it.
///
/// # Errors
/// A chat failed, or the number of pods did not follow.
pub(super) async fn play(client: &Client, way: &Way) -> Result<()> {
    let services: Api<InferenceService> = Api::namespaced(client.clone(), NAMESPACE);
    shell_line(&format!("{CLIENTS} clients chat, each chat on a connection of its own"));
    let many = Chats::start(way, SERVICE, CLIENTS, TOKENS);
    until(&services, 2, &many).await?;
    let answers = many.finish().await?;
    shell_line(&format!("{answers} answers, none failed; one client goes on"));
    let one = Chats::start(way, SERVICE, 1, LONG_TOKENS);
    until(&services, 1, &one).await?;
    let answers = one.finish().await?;
    shell_line(&format!(
        "{answers} more answers, none was cut off. Why (status.scalingHistory):"
    ));
    let status = services
        .get(SERVICE)
        .await?
        .status
        .context("the service has a status")?;
    for event in status.scaling_history.iter().rev() {
        shell_line(&format!(
            "  {}  {} -> {}  {}: {}",
            event.time.0, event.from, event.to, event.reason, event.message
        ));
    }
    Ok(())
}

/// Waits until that many pods answer and no other is left; shows each change on the way.
async fn until(services: &Api<InferenceService>, pods: i32, chats: &Chats) -> Result<()> {
    let started = Instant::now();
    let mut shown = String::new();
    loop {
        let status = services.get(SERVICE).await?.status.unwrap_or_default();
        let scale = status.autoscale.unwrap_or_default();
        let (there, answering) = (status.replicas.unwrap_or(0), status.ready_replicas.unwrap_or(0));
        let cache = scale
            .observed
            .get("kvCacheUtilizationPercent")
            .map_or("?", String::as_str);
        let line = format!(
            "{answering} of {there} pods answer, {} wanted ({}); KV-cache {cache} %",
            scale.desired_replicas, scale.reason
        );
        if line != shown {
            let seconds = started.elapsed().as_secs();
            shell_line(&format!("{seconds:>4} s  {line}; {} answers", chats.answers()));
            shown = line;
        }
        if (there, answering) == (pods, pods) {
            return Ok(());
        }
        if started.elapsed() > DEADLINE {
            bail!(
                "after {} min there are not {pods} pods: {}",
                DEADLINE.as_secs() / 60,
                scale.message
            );
        }
        tokio::time::sleep(LOOK).await;
    }
}

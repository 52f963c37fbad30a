//! The link between the host and a bed, and the routes by which the host reaches the node, pods and Services.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::bed::command;
use crate::bed::slot::Slot;

/// A client for addresses of a bed and of this machine, which no proxy of the user's environment reaches.
///
/// # Errors
/// The machine has no source of randomness, or the like.
pub fn http() -> Result<reqwest::Client> {
    http_builder().build().context("cannot make an HTTP client")
}

/// As [`http`], to be set up further.
pub fn http_builder() -> reqwest::ClientBuilder {
    // Also for plain HTTP, since reqwest has TLS in this workspace. Somebody else in this process may have been first.
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy()
}

/// Joins the host to the network namespace of process `init`. The link goes with the namespace, and the routes with it.
///
/// # Errors
/// `ip` refuses; the message is its own.
pub fn connect(slot: Slot, init: i32) -> Result<()> {
    let (link, host, node) = (
        slot.name(),
        slot.host_address().to_string(),
        slot.node_address().to_string(),
    );
    let ip = |words: &str| command::output(Command::new("ip").args(words.split_whitespace())).map(drop);
    let inside = |words: &str| {
        let init = init.to_string();
        command::output(
            Command::new("nsenter")
                .args(["-t", &init, "-n", "ip"])
                .args(words.split_whitespace()),
        )
        .map(drop)
    };
    ip(&format!("link add {link} type veth peer name uplink netns {init}"))?;
    ip(&format!("address add {host}/30 dev {link}"))?;
    ip(&format!("link set {link} up"))?;
    inside("link set uplink up")?;
    inside(&format!("address add {node}/30 dev uplink"))?;
    // A local process asks for a route before iptables rewrites a Service's address. There is no other way out.
    inside(&format!("route add {} via {host}", slot.service_range()))?;
    ip(&format!("route replace {} via {node}", slot.pod_range()))?;
    ip(&format!("route replace {} via {node}", slot.service_range()))
}

/// Removes a link that outlived its bed; there is none where the bed ended whole.
pub fn disconnect(slot: Slot) {
    let _ = Command::new("ip").args(["link", "delete", &slot.name()]).output();
}

//! `strata status`: the resources of a namespace as a tree: what waits for what, and what holds it up.

use std::time::Duration;

use anyhow::Result;

use crate::cluster::Cluster;
use crate::output::{self, Format};
use crate::resource::{self, Named};
use crate::tree;

/// Time between two looks of `--watch`.
const LOOK: Duration = Duration::from_secs(2);

/// What to show.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only this resource and what it stands on.
    #[arg(value_name = "KIND/NAME")]
    resource: Option<Named>,
    /// How it is written.
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
    /// Shows it again whenever it changes, until interrupted.
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    cluster: Cluster,
}

/// Prints the tree.
pub async fn run(arguments: Arguments) -> Result<()> {
    let connection = arguments.cluster.connect().await?;
    let root = arguments.resource.as_ref().map(|named| &named.0);
    let mut before = None;
    loop {
        let all = resource::snapshot(&connection).await?;
        if let Some(root) = root {
            resource::find(&all, root, &connection.namespace)?;
        }
        let rows = tree::rows(&all, root);
        if rows.is_empty() && !arguments.watch {
            output::say(&format!(
                "nothing of Strata is in namespace {}: `kubectl get strata --all-namespaces` lists everything",
                connection.namespace
            ));
        }
        if before.as_ref() != Some(&rows) {
            if arguments.watch && output::columns().is_some() {
                // The whole screen anew: rows come and go.
                output::print("\x1b[H\x1b[2J")?;
            }
            output::write(arguments.output, &rows, |rows| match rows.is_empty() {
                true => String::new(),
                false => tree::text(rows, output::columns()),
            })?;
        }
        if !arguments.watch {
            return Ok(());
        }
        before = Some(rows);
        tokio::time::sleep(LOOK).await;
    }
}

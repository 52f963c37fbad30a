//! Strata on a bed, installed as its users do on AKS: with the chart.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::Result;

use crate::bed::go::Program;
use crate::bed::{Bed, command};
use crate::image::catalog;
use crate::namespace::tool;

/// Namespace of the release.
pub const NAMESPACE: &str = "strata-system";
/// User that the operator's pods write as.
pub const USER: &str = "system:serviceaccount:strata-system:strata-operator";

/// The chart.
#[must_use]
pub fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/strata")
}

/// `config/samples`.
#[must_use]
pub fn samples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/samples")
}

/// `helm` on `bed`.
///
/// # Errors
/// It was not compiled yet.
pub fn helm(bed: &Bed) -> Result<Command> {
    let mut helm = Command::new(tool(Program::Helm)?);
    helm.env("KUBECONFIG", bed.kubeconfig()).env("NO_PROXY", "*");
    Ok(helm)
}

/// Installs the operator once for all tests of a process; see [`operator`].
///
/// # Errors
/// As [`operator`], to each test that asks.
pub fn once(bed: &Bed) -> Result<()> {
    static DONE: OnceLock<Result<(), String>> = OnceLock::new();
    DONE.get_or_init(|| operator(bed, &[]).map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(anyhow::Error::msg)
}

/// Installs the operator, or upgrades it to what was built last, and waits until it is ready.
///
/// # Errors
/// What could not be built or installed.
pub fn operator(bed: &Bed, settings: &[&str]) -> Result<()> {
    bed.import(&catalog::STRATA)?;
    // The tag stays `dev`: only the digest tells a new program from the old one.
    let digest = catalog::Name::Operator.build()?.digest;
    let mut helm = helm(bed)?;
    helm.args(["upgrade", "--install", "strata"]).arg(chart());
    helm.args([
        "--namespace",
        NAMESPACE,
        "--create-namespace",
        "--wait",
        "--timeout",
        "3m",
    ]);
    helm.args(["--set-string", &format!("podAnnotations.image={digest}")]);
    for setting in settings {
        helm.args(["--set", setting]);
    }
    command::output(&mut helm).map(drop)
}

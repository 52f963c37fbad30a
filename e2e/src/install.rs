//! Strata on a bed, installed as its users do on AKS: with the chart.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::Result;

use crate::bed::Bed;
use crate::bed::command::{self, say};
use crate::bed::go::Program;
use crate::image::catalog;
use crate::namespace::tool;
use crate::repository;

/// Namespace of the release.
pub const NAMESPACE: &str = "strata-system";
/// User that the operator's pods write as.
pub const USER: &str = "system:serviceaccount:strata-system:strata-operator";

/// The last chart before this one, of commit 2711e47: kept here, as a clone may have no history.
const PREVIOUS: &[u8] = include_bytes!("../manifests/chart-2711e47.tar.gz");
const MONITORING_CRDS: &str = include_str!("../manifests/monitoring-crds.yaml");

/// The chart.
#[must_use]
pub fn chart() -> PathBuf {
    repository::path("charts/strata")
}

/// `config/samples`.
#[must_use]
pub fn samples() -> PathBuf {
    repository::path("config/samples")
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

/// The chart that users may have now, unpacked into `folder`.
///
/// # Errors
/// The folder cannot be written.
pub fn previous_chart(folder: &Path) -> Result<PathBuf> {
    tar::Archive::new(flate2::read::GzDecoder::new(PREVIOUS)).unpack(folder)?;
    Ok(folder.join("charts/strata"))
}

/// The kinds of the Prometheus operator, as far as the chart uses them, so that the cluster takes its monitors.
///
/// # Errors
/// The API server refuses them.
pub fn monitoring_crds(bed: &Bed) -> Result<()> {
    let mut kubectl = bed.kubectl();
    kubectl.args(["apply", "--server-side", "--force-conflicts", "-f", "-"]);
    command::output_with_input(&mut kubectl, MONITORING_CRDS)?;
    let mut kubectl = bed.kubectl();
    kubectl.args(["wait", "--for=condition=established", "--timeout=60s", "crd"]);
    let kinds = ["servicemonitors", "podmonitors", "prometheusrules"];
    kubectl.args(kinds.map(|kind| format!("{kind}.monitoring.coreos.com")));
    command::output(&mut kubectl).map(drop)
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
    operator_from(&chart(), bed, settings)
}

/// As [`operator`], from another chart.
///
/// # Errors
/// What could not be built or installed.
pub fn operator_from(chart: &Path, bed: &Bed, settings: &[&str]) -> Result<()> {
    let images = bed.import(&catalog::STRATA)?;
    remove_pending(bed)?;
    let mut helm = helm(bed)?;
    helm.args(["upgrade", "--install", "strata"]).arg(chart);
    helm.args([
        "--namespace",
        NAMESPACE,
        "--create-namespace",
        "--wait",
        "--timeout",
        "3m",
    ]);
    for image in images {
        match image.name() {
            "strata-operator" => helm.args(["--set-string", &format!("image.tag={}", image.tag())]),
            "strata-runtime" => helm.args(["--set-string", &format!("runtimeImage.tag={}", image.tag())]),
            _ => &mut helm,
        };
    }
    for setting in settings {
        // A tag of digits alone is a text too; and helm lets texts win over what is set otherwise, whatever comes last.
        let flag = if setting.contains(".tag=") {
            "--set-string"
        } else {
            "--set"
        };
        helm.args([flag, setting]);
    }
    command::output(&mut helm).map(drop)
}

/// Removes a release that an interrupted run left half-done: helm refuses to go on from it.
fn remove_pending(bed: &Bed) -> Result<()> {
    let list = ["list", "--pending", "--short", "--namespace", NAMESPACE];
    for release in command::output(helm(bed)?.args(list))?.lines() {
        say(format_args!("removing the release {release}, which was left half-done"));
        let uninstall = ["uninstall", release, "--wait", "--namespace", NAMESPACE];
        command::output(helm(bed)?.args(uninstall))?;
    }
    Ok(())
}

//! Helm and kustomize install the same.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use strata_e2e::bed::{command, go::Program};
use strata_e2e::namespace::tool;
use strata_e2e::repository;

#[test]
fn what_kustomize_installs_is_what_the_chart_renders() -> Result<()> {
    let root = repository::path("");
    let rendered = tempfile::tempdir()?;
    command::output(
        Command::new(root.join("charts/render"))
            .arg(tool(Program::Helm)?)
            .arg(rendered.path()),
    )?;
    for file in ["rbac/rbac.yaml", "manager/manager.yaml"] {
        let committed = fs::read_to_string(root.join("config").join(file))?;
        ensure!(
            committed == fs::read_to_string(rendered.path().join(file))?,
            "config/{file} is out of step with charts/strata: run charts/render HELM and commit"
        );
    }
    Ok(())
}

//! What Argo CD makes of statuses, by the Lua interpreter that it runs health scripts with.

use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use strata_api::{Reason, Verdict};
use strata_e2e::argocd::{self, Health};
use strata_e2e::bed::{command, go::Program};
use strata_e2e::namespace::tool;

#[test]
fn argo_cd_judges_each_kind_as_its_conditions_say() -> Result<()> {
    let scripts = argocd::scripts()?;
    let kinds = ["AlignmentJob", "Dataset", "InferenceService", "PretrainJob"];
    ensure!(
        scripts.keys().eq(kinds),
        "there is one for each kind: {:?}",
        scripts.keys()
    );
    let fixtures = argocd::fixtures()?;
    for (kind, script) in &scripts {
        let resources: Vec<Value> = fixtures.iter().map(|case| case.of(kind)).collect();
        for (case, said) in fixtures.iter().zip(judge(script, &resources)?) {
            ensure!(
                said == case.health,
                "{kind}, {}: {said:?} instead of {:?}",
                case.case,
                case.health
            );
        }
        let resources: Vec<Value> = Reason::ALL.iter().map(|reason| with(kind, *reason)).collect();
        for (reason, said) in Reason::ALL.iter().zip(judge(script, &resources)?) {
            let wanted = wanted(*reason);
            ensure!(
                said.status == wanted,
                "{kind}, {}: {said:?} instead of {wanted}",
                reason.name()
            );
        }
    }
    Ok(())
}

fn with(kind: &str, reason: Reason) -> Value {
    let status = match reason.verdict() {
        Verdict::True => "True",
        Verdict::False => "False",
        Verdict::Unknown => "Unknown",
    };
    let condition = json!({"type": "Ready", "status": status, "reason": reason.name(), "message": reason.meaning()});
    json!({"kind": kind, "metadata": {"generation": 1}, "status": {"observedGeneration": 1, "conditions": [condition]}})
}

/// By the verdict of the table of reasons. What stands still because the spec says so is neither progress nor trouble.
fn wanted(reason: Reason) -> &'static str {
    match reason.verdict() {
        Verdict::True => "Healthy",
        Verdict::False => "Degraded",
        Verdict::Unknown if matches!(reason, Reason::Suspended | Reason::ScaledToZero) => "Suspended",
        Verdict::Unknown => "Progressing",
    }
}

fn judge(script: &str, resources: &[Value]) -> Result<Vec<Health>> {
    let request = json!({"script": script, "objects": resources});
    let said = command::output_with_input(&mut Command::new(tool(Program::LuaHealth)?), &request.to_string())?;
    Ok(serde_json::from_str(&said)?)
}

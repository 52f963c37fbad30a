//! Runs a stage from its configuration file to its report.
//!
//! ```text
//! read configuration → published already? → that report
//!                                   └ no  → run the stage ─┬ report → exit 0
//!                                                           └ error → report → exit 64, 70 or 75
//! ```

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use strata_artifact::RunFolder;
use strata_contract::{CONTRACT_VERSION, EXIT_DONE, FailureReason, Report, StageConfig};
use strata_stage::{Interrupt, ProgressHandle, StageContext, StageError};

use crate::StageArguments;
use crate::monitor::Monitor;

/// Largest configuration in bytes: more than a ConfigMap holds.
const CONFIG_LIMIT_BYTES: u64 = 1024 * 1024;

/// Carries out `stage`, which calls itself `command` in logs and metrics; the exit status is the contract's.
pub fn run(
    command: &str,
    arguments: StageArguments,
    volumes: PathBuf,
    stage: impl FnOnce(&StageConfig, &StageContext) -> Result<Report, StageError>,
) -> i32 {
    let result = prepare(&arguments, volumes).and_then(|(config, context)| {
        let monitor = Monitor::start(&arguments.monitor, command, &context)?;
        let result =
            published(&context).and_then(|found| found.map_or_else(|| carry_out(|| stage(&config, &context)), Ok));
        monitor.stop();
        result
    });
    let (report, code) = match result {
        Ok(report) => {
            tracing::info!(reused = report.reused, metrics = ?report.metrics, "{}", report.message);
            (report, EXIT_DONE)
        }
        Err(error) => {
            tracing::error!(reason = ?error.reason, "{}. {}", error.message, error.reason.remedy());
            (error.report(), error.reason.exit_code())
        }
    };
    // Without the report the exit status still says whether to try again, so this is no reason to fail.
    if let Err(error) = fs::write(&arguments.report, report.to_termination_message()) {
        tracing::warn!(path = %arguments.report.display(), %error, "the report could not be written");
    }
    code
}

fn prepare(arguments: &StageArguments, volumes: PathBuf) -> Result<(StageConfig, StageContext), StageError> {
    let config = read_config(&arguments.config)?;
    let context = StageContext {
        run: config.run.clone(),
        volumes,
        attempt_id: arguments.attempt_id.clone(),
        progress: ProgressHandle::default(),
        interrupt: Interrupt::default(),
    };
    Ok((config, context))
}

fn read_config(path: &Path) -> Result<StageConfig, StageError> {
    let invalid = |what: String| {
        StageError::new(
            FailureReason::ConfigInvalid,
            format!("configuration {}: {what}", path.display()),
        )
    };
    let size_bytes = fs::metadata(path).map_err(|error| invalid(error.to_string()))?.len();
    if size_bytes > CONFIG_LIMIT_BYTES {
        return Err(invalid(format!(
            "{size_bytes} bytes are more than {CONFIG_LIMIT_BYTES}"
        )));
    }
    let text = fs::read_to_string(path).map_err(|error| invalid(error.to_string()))?;
    let config: StageConfig = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
    match config.contract_version {
        CONTRACT_VERSION => Ok(config),
        version => Err(invalid(format!(
            "it has contract version {version}, this image has {CONTRACT_VERSION}: use operator and image of one release"
        ))),
    }
}

/// The report of this run id's artifact, if an earlier attempt (or a resource that was deleted since) published it.
fn published(context: &StageContext) -> Result<Option<Report>, StageError> {
    let output = &context.run.output;
    let manifest = RunFolder::new(output, &context.volumes).published()?;
    Ok(manifest.map(|manifest| Report {
        reused: true,
        ..Report::published(
            &manifest,
            output,
            "this run published before; nothing was computed".into(),
        )
    }))
}

fn carry_out(stage: impl FnOnce() -> Result<Report, StageError>) -> Result<Report, StageError> {
    // A panic is a defect of ours; the report says so instead of leaving a bare exit status. The message itself went to
    // the log, and the context is not used again.
    catch_unwind(AssertUnwindSafe(stage)).unwrap_or_else(|_| {
        Err(StageError::new(
            FailureReason::Internal,
            "the stage panicked; its log says where",
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_that_cannot_be_carried_out_ends_with_its_reason_and_status() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let run_with = |text: &str| {
            let config = folder.path().join("stage.json");
            let report = folder.path().join("report.json");
            fs::write(&config, text).expect("the configuration is written");
            let arguments = StageArguments {
                config,
                report: report.clone(),
                attempt_id: "a".into(),
                monitor: "none".into(),
            };
            let refuse = |_: &StageConfig, _: &StageContext| {
                let message = "the stage was started";
                Err(StageError::new(FailureReason::ConfigInvalid, message))
            };
            let code = run("pretrain", arguments, folder.path().to_owned(), refuse);
            let report: Report = serde_json::from_str(&fs::read_to_string(report).expect("a report")).expect("JSON");
            (code, report)
        };
        for (text, words) in [
            ("{", "EOF"),
            (r#"{"contractVersion":1,"surprise":0}"#, "surprise"),
            (
                r#"{"contractVersion":99,"run":{"id":"r","attempt":1,"resource":{"kind":"k","name":"n"},
                    "output":"file:///tmp/x"},"stage":{"quantize":{"model":{"name":"m","uri":"file:///m"},"format":"Q8_0"}}}"#,
                "contract version 99",
            ),
            (
                r#"{"contractVersion":1,"run":{"id":"r","attempt":1,"resource":{"kind":"k","name":"n"},
                    "output":"file:///tmp/x"},"stage":{"quantize":{"model":{"name":"m","uri":"file:///m"},"format":"Q8_0"}}}"#,
                "the stage was started",
            ),
        ] {
            let (code, report) = run_with(text);
            assert_eq!(
                (code, report.failure),
                (64, Some(FailureReason::ConfigInvalid)),
                "{text}"
            );
            assert!(report.message.contains(words), "{}", report.message);
        }
    }
}

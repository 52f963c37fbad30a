//! A stage, carried out by a program that knows folders and exit statuses.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use strata_artifact::{Attempt, Draft, Opened, RunFolder, Verify, check_figures, open};
use strata_contract::{
    CONTRACT_VERSION, EXIT_BAD_INPUT, EXIT_INTERRUPTED, FailureReason, INPUTS_ENV, NODE_COUNT_ENV, NODE_RANK_ENV,
    OUTPUT_ENV, PROGRESS_ENV, RESULT_ENV, Report, STATE_ENV, StageConfig, StageResult, stage_paths,
};
use strata_stage::{StageContext, StageError};

use crate::child::{self, End};

/// Largest result in bytes that is read.
const RESULT_LIMIT_BYTES: u64 = 256 * 1024;

/// Which of an attempt's nodes this is.
#[derive(Clone, Copy, Debug)]
struct Node {
    rank: u32,
    count: u32,
}

impl Node {
    fn from_env() -> Self {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
        Self {
            rank: number(NODE_RANK_ENV).unwrap_or(0),
            count: number(NODE_COUNT_ENV).unwrap_or(1),
        }
    }
}

/// Runs `program` as the stage of `config`, and publishes what it leaves. `exchange` is the folder of what the two hand each
/// other.
///
/// # Errors
/// Why nothing is published.
pub fn run(
    config: &StageConfig,
    context: &StageContext,
    exchange: &Path,
    program: &[String],
) -> Result<Report, StageError> {
    let node = Node::from_env();
    let run = RunFolder::new(&context.run.output, &context.volumes);
    let attempt = run.attempt(&context.attempt_id)?;
    let paths: BTreeMap<&str, _> =
        stage_paths(&context.volumes, exchange, &context.run.output, &context.attempt_id).into();
    let (state, result) = (&paths[STATE_ENV], &paths[RESULT_ENV]);
    // One node clears what an interrupted life of this attempt left; the others write when they have met it.
    if node.rank == 0 {
        attempt.clear()?;
    }
    let setting_up = |what: &Path, error: io::Error| {
        let message = format!("cannot prepare {}: {error}", what.display());
        StageError::new(FailureReason::StorageUnwritable, message)
    };
    fs::create_dir_all(state).map_err(|error| setting_up(state, error))?;
    let inputs = open_inputs(config, context)?;
    link(&inputs, &paths[INPUTS_ENV]).map_err(|error| setting_up(&paths[INPUTS_ENV], error))?;
    for file in [result, &paths[PROGRESS_ENV]] {
        match fs::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(setting_up(file, error)),
            _ => {}
        }
    }

    let (first, arguments) = program.split_first().ok_or_else(|| {
        StageError::new(
            FailureReason::ConfigInvalid,
            "engine.container.command is empty: name the program",
        )
    })?;
    let mut command = Command::new(first);
    command.args(arguments).envs(&paths);
    tracing::info!(
        program = first,
        rank = node.rank,
        nodes = node.count,
        "starting the container's program"
    );
    let end = child::run(&mut command, context, &paths[PROGRESS_ENV])?;
    let said = read_result(result)?;
    if !end.status.success() {
        return Err(failure(first, &end, said));
    }
    if node.rank != 0 {
        return Ok(done(node));
    }
    let report = publish(config, context, attempt, &inputs, said)?;
    // What is published needs no checkpoints any more; what cannot be removed only takes room.
    if let Err(error) = fs::remove_dir_all(state) {
        tracing::warn!(path = %state.display(), %error, "what was kept for further attempts could not be removed");
    }
    Ok(report)
}

fn open_inputs(config: &StageConfig, context: &StageContext) -> Result<Vec<Opened>, StageError> {
    let inputs = config.stage.inputs();
    context
        .progress
        .start("verifying inputs", "inputs", inputs.len() as u64);
    let open_one = |input| {
        let opened = open(input, &context.volumes, Verify::Hashes)?;
        context.progress.add(1);
        Ok(opened)
    };
    inputs.into_iter().map(open_one).collect()
}

/// Each input under its name.
fn link(inputs: &[Opened], folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => fs::create_dir_all(folder)?,
    }
    for input in inputs {
        symlink(input.path(), folder.join(&input.resolved().name))?;
    }
    Ok(())
}

/// What the program says of its result; nothing, where it left no file.
fn read_result(path: &Path) -> Result<StageResult, StageError> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(RESULT_LIMIT_BYTES).read_to_string(&mut text));
    match read {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(StageResult::default()),
        Err(error) => {
            let message = format!("the file of {RESULT_ENV} cannot be read: {error}");
            return Err(StageError::new(FailureReason::ConfigInvalid, message));
        }
        Ok(_) => {}
    }
    serde_json::from_str(&text).map_err(|error| {
        let message = format!(
            "the file of {RESULT_ENV} is no result ({error}): write a JSON object as docs/stage-contract.md has it"
        );
        StageError::new(FailureReason::ConfigInvalid, message)
    })
}

/// What the end of a program that failed means. The exit status decides whether to try again, the program's own word why.
fn failure(program: &str, end: &End, said: StageResult) -> StageError {
    let how = match (end.status.code(), end.status.signal()) {
        (Some(code), _) => format!("{program} ended with status {code}"),
        (None, Some(libc::SIGKILL)) => format!("{program} was killed (signal 9), perhaps for its memory"),
        (None, signal) => format!("{program} was ended by signal {}", signal.unwrap_or(0)),
    };
    let message = said.message.unwrap_or(how);
    let reason = match end.status.code() {
        Some(EXIT_INTERRUPTED) => FailureReason::Interrupted,
        Some(EXIT_BAD_INPUT) => said
            .failure
            .filter(|reason| reason.exit_code() == EXIT_BAD_INPUT)
            .unwrap_or(FailureReason::ConfigInvalid),
        // Who does not know the signal ends by it, and has saved what it has saved.
        _ if end.was_asked => FailureReason::Interrupted,
        _ => said.failure.unwrap_or(FailureReason::Internal),
    };
    StageError::new(reason, message)
}

fn done(node: Node) -> Report {
    Report {
        contract_version: CONTRACT_VERSION,
        failure: None,
        message: format!("node {} of {} is done; node 0 publishes", node.rank, node.count),
        artifact: None,
        inputs: Vec::new(),
        metrics: BTreeMap::new(),
        gates: Vec::new(),
        resumed_from_step: None,
        reused: false,
    }
}

fn publish(
    config: &StageConfig,
    context: &StageContext,
    attempt: Attempt,
    inputs: &[Opened],
    said: StageResult,
) -> Result<Report, StageError> {
    context.progress.start("publishing", "artifacts", 1);
    let files = attempt.adopt_all()?;
    if files == 0 {
        let message = format!("the program ended well but left no file in {OUTPUT_ENV}: there is nothing to publish");
        return Err(StageError::new(FailureReason::ConfigInvalid, message));
    }
    check_figures(&said.metrics)?;
    let gates: Vec<_> = config
        .stage
        .gates()
        .iter()
        .map(|gate| gate.judge(&said.metrics))
        .collect();
    if let Some(error) = StageError::from_gates(&gates) {
        return Err(error);
    }
    let made_by = serde_json::json!({"stage": config.stage, "container": config.container});
    let draft = Draft {
        kind: config.stage.artifact(),
        run_id: context.run.id.clone(),
        inputs: inputs.iter().map(Opened::resolved).collect(),
        config: made_by,
        metrics: said.metrics,
        gates,
        facts: said.facts,
    };
    let manifest = attempt.publish(draft, context.run.resource.clone(), context.run.attempt)?;
    context.progress.add(1);
    let message = said
        .message
        .unwrap_or_else(|| format!("published {files} files, {} bytes", manifest.content.bytes()));
    Ok(Report {
        resumed_from_step: said.resumed_from_step,
        ..Report::published(&manifest, &context.run.output, message)
    })
}

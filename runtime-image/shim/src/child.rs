//! The program of the user's image as a child: started in a group of its own, told to stop when the shim is, watched for its
//! progress, and waited for.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use strata_contract::{FailureReason, Progress};
use strata_stage::{StageContext, StageError};

/// Between two looks at the child.
const LOOK: Duration = Duration::from_millis(50);
/// Between two looks at its progress.
const PROGRESS: Duration = Duration::from_secs(2);
/// Largest file of progress that is read, in bytes.
const PROGRESS_LIMIT_BYTES: u64 = 64 * 1024;

/// How the program ended.
#[derive(Debug)]
pub struct End {
    /// Its exit status.
    pub status: ExitStatus,
    /// Whether it had been asked to stop.
    pub was_asked: bool,
}

/// Runs `command` to its end. A request to stop is handed on once, to all processes that it started.
///
/// # Errors
/// It cannot be started, or not be waited for.
pub fn run(command: &mut Command, context: &StageContext, progress_file: &Path) -> Result<End, StageError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command.process_group(0).spawn().map_err(|error| {
        let reason = match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => FailureReason::ConfigInvalid,
            _ => FailureReason::Internal,
        };
        let message = format!("cannot start {program:?} in this image: {error}; see engine.container.command");
        StageError::new(reason, message)
    })?;
    let group = i32::try_from(child.id()).expect("Linux numbers processes below 2^22");
    let (mut was_asked, mut last) = (false, Instant::now());
    loop {
        let end = ended(&mut child, group).map_err(|error| {
            StageError::new(FailureReason::Internal, format!("cannot wait for {program:?}: {error}"))
        })?;
        if let Some(status) = end {
            show(progress_file, context);
            return Ok(End { status, was_asked });
        }
        if context.interrupt.is_set() && !was_asked {
            was_asked = true;
            // SAFETY: a plain system call; the group is the child's, which has not been waited for, so its number is still its.
            unsafe { libc::kill(-group, libc::SIGTERM) };
        }
        if last.elapsed() >= PROGRESS {
            last = Instant::now();
            show(progress_file, context);
        }
        std::thread::sleep(LOOK);
    }
}

/// The end of the child. The first process of a container also has to wait for those whose parents are gone.
fn ended(child: &mut Child, id: i32) -> io::Result<Option<ExitStatus>> {
    if std::process::id() != 1 {
        return child.try_wait();
    }
    loop {
        let mut status = 0;
        // SAFETY: `status` is valid for the call. The child is waited for here and nowhere else.
        match unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) } {
            0 => return Ok(None),
            -1 => return Err(io::Error::last_os_error()),
            other if other == id => return Ok(Some(ExitStatus::from_raw(status))),
            _ => {}
        }
    }
}

/// Shows what the program last said of its progress; what is no progress is passed over.
fn show(file: &Path, context: &StageContext) {
    let mut text = String::new();
    let read = File::open(file).and_then(|file| file.take(PROGRESS_LIMIT_BYTES).read_to_string(&mut text));
    let Some(said) = read.ok().and_then(|_| serde_json::from_str::<Progress>(&text).ok()) else {
        return;
    };
    let known = context.progress.read();
    if (&known.activity, &known.unit, known.total) != (&said.activity, &said.unit, said.total) {
        context.progress.start(&said.activity, &said.unit, said.total);
    }
    context.progress.set(said.done);
}

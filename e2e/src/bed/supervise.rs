//! The first process of a bed: it lives in namespaces of its own, mounts what the bed needs, starts the programs,
//! starts them again when they end, and reaps what is orphaned. Killing it ends everything inside with it.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::bed::command;
use crate::image::catalog;

/// How long a program that ended stays down.
const RESTART_DELAY: Duration = Duration::from_secs(1);
/// How often the first process looks for work while something is about to start.
const TICK: Duration = Duration::from_millis(50);

/// All that the first process does, written by `up` and read by it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Where the programs' output goes, one file each.
    pub logs: PathBuf,
    /// Empty folders in memory, private to the bed.
    pub scratch: Vec<PathBuf>,
    /// `(from, to)`: folders of the state folder that appear elsewhere inside the bed.
    pub binds: Vec<(PathBuf, PathBuf)>,
    /// The node's address: programs start when the link that carries it is there.
    pub address: Ipv4Addr,
    /// What runs, in no particular order.
    pub programs: Vec<Program>,
}

impl Plan {
    /// The folders that something is mounted on.
    #[must_use]
    pub fn mount_points(&self) -> Vec<&Path> {
        let scratch = self.scratch.iter().map(PathBuf::as_path);
        scratch.chain(self.binds.iter().map(|(_, to)| to.as_path())).collect()
    }
}

/// A program of the bed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Program {
    /// Its name, also of its log file.
    pub name: String,
    /// Path and arguments.
    pub command: Vec<String>,
    /// Starts when this address accepts connections.
    pub after: Option<SocketAddr>,
}

enum State {
    Waiting { since: Option<Instant> },
    Running,
}

/// Runs the plan in `file` until killed.
///
/// # Errors
/// The plan is unreadable, this is not the first process of a namespace, or a mount fails.
pub fn run(file: &Path) -> Result<()> {
    // SAFETY: getpid has no preconditions.
    if unsafe { libc::getpid() } != 1 {
        bail!("this is the first process of a bed; start one with `bed up`");
    }
    let plan: Plan = serde_json::from_slice(&fs::read(file)?)?;
    mount_all(&plan)?;
    command::output(Command::new("ip").args(["link", "set", "lo", "up"]))?;
    // An address can be bound only when an interface carries it.
    while TcpListener::bind((plan.address, 0)).is_err() {
        std::thread::sleep(TICK);
    }
    let mut states: BTreeMap<&str, State> = plan
        .programs
        .iter()
        .map(|p| (p.name.as_str(), State::Waiting { since: None }))
        .collect();
    let mut running: BTreeMap<i32, &str> = BTreeMap::new();
    loop {
        for program in &plan.programs {
            let due = match states[program.name.as_str()] {
                State::Running => false,
                State::Waiting { since } => since.is_none_or(|at| at.elapsed() >= RESTART_DELAY),
            };
            if due && program.after.is_none_or(accepts) {
                let pid = start(program, &plan.logs)?;
                note(format_args!("{} runs as {pid}", program.name));
                running.insert(pid, &program.name);
                states.insert(&program.name, State::Running);
            }
        }
        for (pid, status) in reap() {
            if let Some(name) = running.remove(&pid) {
                note(format_args!(
                    "{name} ended with status {status:#x}, starts again in {RESTART_DELAY:?}"
                ));
                states.insert(
                    name,
                    State::Waiting {
                        since: Some(Instant::now()),
                    },
                );
            }
        }
        std::thread::sleep(if running.len() == plan.programs.len() {
            TICK * 10
        } else {
            TICK
        });
    }
}

fn start(program: &Program, logs: &Path) -> Result<i32> {
    let path = logs.join(format!("{}.log", program.name));
    let log = OpenOptions::new().create(true).append(true).open(&path)?;
    let mut command = Command::new(&program.command[0]);
    command
        .args(&program.command[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::from(log.try_clone()?))
        .stderr(Stdio::from(log))
        .process_group(0);
    let child = command
        .spawn()
        .with_context(|| format!("cannot start {}", program.command[0]))?;
    Ok(i32::try_from(child.id())?)
}

fn accepts(address: SocketAddr) -> bool {
    TcpStream::connect_timeout(&address, TICK).is_ok()
}

/// All children that ended: the programs, and whatever lost its parent.
fn reap() -> Vec<(i32, i32)> {
    let mut ended = Vec::new();
    loop {
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        match unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) } {
            pid if pid > 0 => ended.push((pid, status)),
            _ => return ended,
        }
    }
}

fn mount_all(plan: &Plan) -> Result<()> {
    mount("proc", Path::new("/proc"), "proc", 0, None)?;
    for folder in &plan.scratch {
        mount("tmpfs", folder, "tmpfs", 0, Some("mode=0755"))?;
    }
    for (from, to) in &plan.binds {
        mount(&from.to_string_lossy(), to, "", libc::MS_BIND, None)?;
    }
    // The kubelet's mounts must reach the pods; the namespace began private, so nothing reaches the host.
    mount("", Path::new("/"), "", libc::MS_REC | libc::MS_SHARED, None)
}

fn mount(source: &str, target: &Path, kind: &str, flags: libc::c_ulong, data: Option<&str>) -> Result<()> {
    let source = CString::new(source)?;
    let path = CString::new(target.to_string_lossy().as_bytes())?;
    let kind = CString::new(kind)?;
    let data = data.map(CString::new).transpose()?;
    let data = data.as_ref().map_or(std::ptr::null(), |d| d.as_ptr().cast());
    // SAFETY: all pointers are to NUL-terminated strings that outlive the call, or null.
    if unsafe { libc::mount(source.as_ptr(), path.as_ptr(), kind.as_ptr(), flags, data) } != 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| format!("cannot mount on {}", target.display()));
    }
    Ok(())
}

/// A line in the supervisor's own log, which is its standard error.
fn note(message: std::fmt::Arguments<'_>) {
    command::say(message);
}

/// Starts the first process of a bed in namespaces of its own and returns its process id on the host.
///
/// # Errors
/// `unshare` is refused (not root, or namespaces are switched off), or the process ends at once.
pub fn launch(plan: &Path, log: &Path) -> Result<i32> {
    let output = File::create(log)?;
    let mut command = Command::new("unshare");
    command
        .args([
            "--mount",
            "--net",
            "--pid",
            "--fork",
            "--kill-child=SIGKILL",
            "--propagation",
            "private",
        ])
        .arg(catalog::ours("bed")?)
        .arg("supervise")
        .arg(plan)
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::from(output.try_clone()?))
        .stderr(Stdio::from(output));
    // SAFETY: setsid is async-signal-safe and touches no memory. It frees the bed from the caller's terminal.
    unsafe {
        command.pre_exec(|| {
            if libc::setsid() < 0 {
                Err(std::io::Error::last_os_error())
            } else {
                Ok(())
            }
        });
    }
    let mut parent = command.spawn().context("cannot run unshare (package util-linux)")?;
    let children = format!("/proc/{0}/task/{0}/children", parent.id());
    loop {
        if let Some(status) = parent.try_wait()? {
            bail!(
                "the bed's first process ended at once ({status}):\n{}",
                command::tail_of_file(log, 10)
            );
        }
        let listed = fs::read_to_string(&children).with_context(|| format!("cannot read {children}"))?;
        if let Some(pid) = listed.split_whitespace().next() {
            return Ok(pid.parse()?);
        }
        std::thread::sleep(TICK);
    }
}

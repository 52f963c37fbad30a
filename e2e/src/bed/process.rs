//! A process by its id *and* start time: an id alone may have passed to another program.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// A process of this machine that is safe to signal later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// Process id as the host sees it.
    pub pid: i32,
    /// Clock ticks from boot to its start, field 22 of `/proc/PID/stat`.
    pub start_ticks: u64,
}

impl Recorded {
    /// The process that has `pid` now.
    ///
    /// # Errors
    /// No such process.
    pub fn of(pid: i32) -> Result<Self> {
        Ok(Self {
            pid,
            start_ticks: start_ticks(pid).with_context(|| format!("process {pid} is gone"))?,
        })
    }

    /// What an earlier run wrote to `path`; `None` where nothing readable is there.
    #[must_use]
    pub fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// Keeps it for a later run.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(self, path: &Path) -> Result<()> {
        Ok(fs::write(path, serde_json::to_vec(&self)?)?)
    }

    /// Whether that very process still runs.
    #[must_use]
    pub fn is_alive(self) -> bool {
        start_ticks(self.pid) == Some(self.start_ticks)
    }

    /// Kills it and waits until it is gone. For the first process of a process namespace that means all others in it
    /// are gone too: the kernel ends them and lets the first one go last.
    ///
    /// # Errors
    /// It is still there when `deadline` is over.
    pub fn kill(self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        while self.is_alive() {
            // SAFETY: kill takes no pointers. The start time was compared just above.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
            if Instant::now() > end {
                bail!("process {} does not end", self.pid);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Field 22 of `/proc/PID/stat`; `None` for a process that is gone or a zombie.
fn start_ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses and may hold anything, also spaces and parentheses.
    let mut fields = stat.get(stat.rfind(')')? + 2..)?.split(' ');
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// A child that ends with this value, or with the thread that started it, should that be killed.
#[derive(Debug)]
pub struct Owned(pub std::process::Child);

impl Owned {
    /// Starts it.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(command: &mut Command) -> std::io::Result<Self> {
        // SAFETY: prctl is safe between fork and exec.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        command.spawn().map(Self)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // Either fails only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_id_is_not_taken_for_the_old_process() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let recorded = Recorded::of(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(recorded.is_alive());
        let other = Recorded {
            start_ticks: recorded.start_ticks + 1,
            ..recorded
        };
        assert!(!other.is_alive());
        other.kill(Duration::from_secs(1)).unwrap();
        assert!(
            recorded.is_alive(),
            "the process of that id was started at another time, so it must live"
        );
        recorded.kill(Duration::from_secs(5)).unwrap();
        child.wait().unwrap();
    }
}

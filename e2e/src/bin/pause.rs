//! The first process of every pod sandbox: it reaps what is orphaned and ends when it is told to.

use std::process::ExitCode;

fn main() -> ExitCode {
    // SAFETY: the set is initialised by sigemptyset before it is read, and all pointers outlive their calls.
    unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        for signal in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT] {
            libc::sigaddset(&raw mut signals, signal);
        }
        // A blocked signal waits to be taken; as process 1, an unhandled one would be ignored instead.
        libc::sigprocmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut());
        loop {
            let mut signal = 0;
            libc::sigwait(&raw const signals, &raw mut signal);
            if signal != libc::SIGCHLD {
                return ExitCode::SUCCESS;
            }
            while libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 {}
        }
    }
}

//! How long a reconcile works: the processor time that it takes, and not its waiting for the API server or for its turn
//! on a processor that the API server may be using too.

use std::pin::pin;
use std::time::Duration;

/// The output of `future`, unless it takes longer than `limit`; and the processor time that went into it.
pub async fn measure<F: Future>(future: F, limit: Duration) -> (Option<F::Output>, Duration) {
    let mut worked = Duration::ZERO;
    let output = {
        let mut future = pin!(future);
        let counted = std::future::poll_fn(|context| {
            // One poll stays on one thread.
            let before = thread_time();
            let poll = future.as_mut().poll(context);
            worked += thread_time().saturating_sub(before);
            poll
        });
        tokio::time::timeout(limit, counted).await.ok()
    };
    (output, worked)
}

/// Processor time of this thread so far.
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec that lives through the call, which writes to nothing else.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    match (result, u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec)) {
        (0, Ok(seconds), Ok(nanoseconds)) => Duration::new(seconds, nanoseconds),
        _ => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waiting_is_no_work_and_has_an_end() {
        let wait = Duration::from_millis(100);
        let work = wait / 10;
        let task = async {
            std::thread::sleep(wait);
            tokio::time::sleep(wait).await;
            let before = thread_time();
            while thread_time() < before + work {}
        };
        let (output, worked) = measure(task, wait * 600).await;
        assert!(output.is_some());
        assert!(worked >= work && worked < wait, "{worked:?}");
        let (output, worked) = measure(std::future::pending::<()>(), wait).await;
        assert!(output.is_none() && worked < wait, "{worked:?}");
    }
}

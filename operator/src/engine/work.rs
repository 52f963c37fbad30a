//! How long a reconcile works, without its waiting: for the API server, or for its turn.

use std::pin::pin;
use std::time::{Duration, Instant};

/// The output of `future`, unless it takes longer than `limit`; and the time that this process worked on it.
pub async fn measure<F: Future>(future: F, limit: Duration) -> (Option<F::Output>, Duration) {
    let mut worked = Duration::ZERO;
    let output = {
        let mut future = pin!(future);
        let counted = std::future::poll_fn(|context| {
            let started = Instant::now();
            let poll = future.as_mut().poll(context);
            worked += started.elapsed();
            poll
        });
        tokio::time::timeout(limit, counted).await.ok()
    };
    (output, worked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waiting_is_no_work_and_has_an_end() {
        let wait = Duration::from_millis(100);
        let task = async {
            std::thread::sleep(wait / 10);
            tokio::time::sleep(wait).await;
            std::thread::sleep(wait / 10);
        };
        let started = Instant::now();
        let (output, worked) = measure(task, wait * 600).await;
        assert!(output.is_some());
        assert!(worked >= wait / 5, "{worked:?}");
        assert!(
            worked + wait <= started.elapsed(),
            "{worked:?} of {:?}",
            started.elapsed()
        );
        let started = Instant::now();
        let (output, worked) = measure(std::future::pending::<()>(), wait).await;
        assert!(output.is_none() && worked < started.elapsed(), "{worked:?}");
    }
}

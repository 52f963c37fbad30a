//! How fast answers end, so that a client that is refused hears when to come back.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The longest that a client is told to stay away, in seconds.
const MOST_SECONDS: u64 = 60;
/// How much of the mean the newest measurement is: one in so many.
const WEIGHT: u64 = 8;

/// The mean time between the ends of two answers while there was work; written by the engine, read by anybody.
#[derive(Debug, Default)]
pub(super) struct Pace {
    micros: AtomicU64,
}

impl Pace {
    /// An answer ended, that long after the one before it.
    pub(super) fn ended(&self, since_last: Duration) {
        let new = u64::try_from(since_last.as_micros())
            .unwrap_or(u64::MAX / WEIGHT)
            .max(1);
        let mean = match self.micros.load(Ordering::Relaxed) {
            0 => new,
            mean => mean - mean / WEIGHT + new / WEIGHT,
        };
        self.micros.store(mean, Ordering::Relaxed);
    }

    /// The seconds after which a quarter of `in_flight` answers will have ended: sooner, those who were refused would only be
    /// refused again, and most of all those who come at the same time.
    pub(super) fn retry_after_seconds(&self, in_flight: usize) -> u64 {
        let micros = (in_flight as u64)
            .div_ceil(4)
            .saturating_mul(self.micros.load(Ordering::Relaxed));
        micros.div_ceil(1_000_000).clamp(1, MOST_SECONDS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_refused_is_told_to_come_back_when_a_quarter_has_ended() {
        let pace = Pace::default();
        assert_eq!(pace.retry_after_seconds(300), 1, "nothing has been measured");
        for (millis, in_flight, seconds) in [(500, 4, 1), (500, 40, 5), (500, 41, 6), (500, 10_000, 60)] {
            (0..100).for_each(|_| pace.ended(Duration::from_millis(millis)));
            assert_eq!(pace.retry_after_seconds(in_flight), seconds, "{in_flight}");
        }
        (0..100).for_each(|_| pace.ended(Duration::from_millis(1)));
        assert_eq!(pace.retry_after_seconds(40), 1, "it has become faster");
    }
}

//! Which code an input reached: the counters that LLVM's coverage pass (`-C passes=sancov-module`) puts at every edge. Code that
//! was compiled without them leaves this empty.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU8, Ordering};

/// Every crate's counters; each is a byte that its code increments, possibly from several threads.
static COUNTERS: Mutex<Vec<&'static [AtomicU8]>> = Mutex::new(Vec::new());

fn all() -> Vec<&'static [AtomicU8]> {
    COUNTERS.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Called by instrumented code at the program's start.
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_8bit_counters_init(start: *const AtomicU8, stop: *const AtomicU8) {
    let count = (stop as usize).saturating_sub(start as usize);
    if count > 0 {
        // SAFETY: LLVM calls this with the bounds of a section of byte counters that lives as long as the program; an
        // AtomicU8 has a byte's layout, and nothing else but the instrumented code touches them.
        let counters = unsafe { std::slice::from_raw_parts(start, count) };
        COUNTERS.lock().unwrap_or_else(PoisonError::into_inner).push(counters);
    }
}

pub(crate) fn counters() -> usize {
    all().iter().map(|counters| counters.len()).sum()
}

pub(crate) fn reset() {
    all()
        .into_iter()
        .flatten()
        .for_each(|counter| counter.store(0, Ordering::Relaxed));
}

/// How often each edge has been run in one input, in eight ranges, over all inputs so far.
#[derive(Default)]
pub(crate) struct Seen(Vec<u8>);

impl Seen {
    /// Whether the last input ran an edge, or ran it so often, as none before.
    pub(crate) fn is_new(&mut self) -> bool {
        let all = all();
        self.0.resize(all.iter().map(|counters| counters.len()).sum(), 0);
        let mut new = false;
        for (seen, counter) in self.0.iter_mut().zip(all.into_iter().flatten()) {
            let bit = match counter.load(Ordering::Relaxed) {
                0 => continue,
                count => 1u8 << count.ilog2(),
            };
            new |= *seen & bit == 0;
            *seen |= bit;
        }
        new
    }

    /// Edges that some input ran.
    pub(crate) fn reached(&self) -> usize {
        self.0.iter().filter(|seen| **seen != 0).count()
    }
}

//! One thread pool for all kernels, sized from the cgroup. A job is a range that the caller and the workers take in chunks.
//!
//! Idle workers spin for at most 20 µs and then park: inside one forward pass the next kernel finds them awake, and
//! between requests they cost nothing to the other replica on the same cores. The caller always works too, and never waits
//! for a worker that has not woken up yet, so a job costs at most its serial time plus a few hundred nanoseconds.
//!
//! Which thread takes which chunk is not fixed. A kernel must therefore give each index a result that depends on that index
//! alone; then results are bit-equal for any number of threads.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a thread spins for new work before it parks.
const SPIN: Duration = Duration::from_micros(20);

/// The most threads a pool has, whatever was asked for.
pub const MAX_THREADS: usize = 256;

/// A chunk is this part of what is left, divided by the threads: large while there is much, as memory likes to be read, and small
/// at the end, so that all threads are done at about the same time.
const SHARE: usize = 2;
/// The smallest chunk is this part of the whole, divided by the threads: taking one costs a few hundred nanoseconds.
const MOST_SHARE: usize = 16;

/// Set in [`Shared::state`] while workers may join the job.
const OPEN: u64 = 1 << 31;
/// The workers inside the job, in [`Shared::state`].
const COUNT: u64 = OPEN - 1;
/// One job later, in [`Shared::state`].
const EPOCH: u64 = 1 << 32;

thread_local! {
    /// True inside a job: a kernel called by a kernel runs on its own thread.
    static IN_JOB: Cell<bool> = const { Cell::new(false) };
}

struct Job {
    work: *const (dyn Fn(Range<usize>) + Sync),
    len: usize,
    /// The smallest chunk.
    chunk: usize,
    /// A chunk is what is left, divided by this.
    divisor: usize,
    caller: Thread,
}

struct Shared {
    /// `epoch << 32 | OPEN | workers inside`. A worker reads `job` only after it has counted itself in while the job was
    /// open, and the caller replaces `job` only when it is closed and nobody is inside.
    state: AtomicU64,
    next: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleeping: Vec<AtomicBool>,
    stop: AtomicBool,
}

// SAFETY: `job` is the only field that is not Sync by itself; the protocol of `state` orders every access to it.
unsafe impl Sync for Shared {}
// SAFETY: the pointer inside `job` refers to a `Sync` closure, so any thread may call it.
unsafe impl Send for Shared {}

/// A fixed set of threads that share one job at a time.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the one caller whose job is running.
    turn: Mutex<()>,
}

impl Pool {
    /// A pool of `threads` in all, the caller of [`Pool::parallel_for`] included: `threads - 1` are started.
    /// Where the system refuses a thread, the pool is smaller.
    pub fn new(threads: usize) -> Self {
        let wanted = threads.clamp(1, MAX_THREADS) - 1;
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            sleeping: (0..wanted).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
        });
        let workers = (0..wanted)
            .map_while(|index| {
                let shared = shared.clone();
                std::thread::Builder::new()
                    .name(format!("kernel-{index}"))
                    .spawn(move || worker(&shared, index))
                    .ok()
            })
            .collect();
        Pool {
            shared,
            workers,
            turn: Mutex::new(()),
        }
    }

    /// The threads that share a job, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `work` on disjoint ranges that together cover `0..len`, from several threads; returns when all are done.
    ///
    /// Called from inside a job, or while another thread's job is running, it does all the work on the calling thread.
    /// A panic in `work` is raised again here, after every thread has left the job.
    pub fn parallel_for(&self, len: usize, work: impl Fn(Range<usize>) + Sync) {
        self.parallel_for_min(len, 1, work);
    }

    /// [`Pool::parallel_for`] with chunks of at least `min_chunk` indices, for work that is small per index.
    pub fn parallel_for_min(&self, len: usize, min_chunk: usize, work: impl Fn(Range<usize>) + Sync) {
        if len == 0 {
            return;
        }
        let chunk = len.div_ceil(self.threads() * MOST_SHARE).max(min_chunk).max(1);
        if self.workers.is_empty() || len <= chunk || IN_JOB.get() {
            return work(0..len);
        }
        let turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            Err(std::sync::TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(std::sync::TryLockError::WouldBlock) => return work(0..len),
        };
        self.run(len, chunk, &work);
        drop(turn);
    }

    fn run(&self, len: usize, chunk: usize, work: &(dyn Fn(Range<usize>) + Sync)) {
        let shared = &*self.shared;
        // SAFETY: the lifetime is erased; below, this function does not return before every thread has left the job.
        let work: *const (dyn Fn(Range<usize>) + Sync) =
            unsafe { std::mem::transmute(work as *const (dyn Fn(Range<usize>) + Sync + '_)) };
        // SAFETY: the job before this one is closed and empty, and `turn` keeps other callers out.
        unsafe {
            *shared.job.get() = Some(Job {
                work,
                len,
                chunk,
                divisor: SHARE * self.threads(),
                caller: std::thread::current(),
            })
        };
        shared.next.store(0, Relaxed);
        let epoch = (shared.state.load(Relaxed) & !(EPOCH - 1)).wrapping_add(EPOCH);
        shared.state.store(epoch | OPEN, SeqCst);
        for (sleeping, worker) in shared.sleeping.iter().zip(&self.workers) {
            if sleeping.load(SeqCst) && sleeping.swap(false, SeqCst) {
                worker.thread().unpark();
            }
        }

        // SAFETY: `job` was set above and stays until the next call.
        let own = catch_unwind(AssertUnwindSafe(|| unsafe { shared.take_chunks() }));
        shared.state.fetch_and(!OPEN, SeqCst);
        let mut spin = Spin::new();
        while shared.state.load(Acquire) & COUNT != 0 {
            if !spin.turn() {
                std::thread::park(); // the last worker to leave unparks the caller
            }
        }
        let others = shared.panic.lock().map_or(None, |mut panic| panic.take());
        if let Some(panic) = own.err().or(others) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its jobs, so joining cannot fail.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Works on chunks of the current job until none is left.
    ///
    /// # Safety
    /// The job must be set, and must stay so until this returns: the caller's own thread, or a worker counted in `state`.
    unsafe fn take_chunks(&self) {
        // SAFETY: as the function demands.
        let job = unsafe { (*self.job.get()).as_ref() }.expect("a job is set before it is opened");
        IN_JOB.set(true);
        let _leave = OnDrop(|| IN_JOB.set(false));
        loop {
            let size = |start: usize| (job.len.saturating_sub(start) / job.divisor).max(job.chunk);
            let taken = self
                .next
                .fetch_update(Relaxed, Relaxed, |start| (start < job.len).then(|| start + size(start)));
            let Ok(start) = taken else { return };
            // SAFETY: the closure outlives the job (see `Pool::run`).
            unsafe { (*job.work)(start..(start + size(start)).min(job.len)) };
        }
    }
}

fn worker(shared: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        let mut spin = Spin::new();
        let mut state = shared.state.load(Acquire);
        while state & OPEN == 0 || state & !(EPOCH - 1) == seen {
            if shared.stop.load(Relaxed) {
                return;
            }
            if !spin.turn() {
                shared.sleeping[index].store(true, SeqCst);
                state = shared.state.load(SeqCst);
                // Looked again after saying so: a job published before is seen here, one published after unparks us.
                if (state & OPEN == 0 || state & !(EPOCH - 1) == seen) && !shared.stop.load(SeqCst) {
                    std::thread::park();
                }
                shared.sleeping[index].store(false, SeqCst);
            }
            state = shared.state.load(Acquire);
        }
        if shared
            .state
            .compare_exchange_weak(state, state + 1, SeqCst, Relaxed)
            .is_err()
        {
            continue;
        }
        seen = state & !(EPOCH - 1);
        // SAFETY: counted in while the job was open.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| unsafe { shared.take_chunks() })) {
            if let Ok(mut first) = shared.panic.lock() {
                first.get_or_insert(panic);
            }
            shared.next.store(usize::MAX / 2, Relaxed); // nobody takes further chunks
        }
        // SAFETY: still counted in.
        let caller = unsafe {
            (*shared.job.get())
                .as_ref()
                .expect("the job stays while workers are inside")
                .caller
                .clone()
        };
        if (shared.state.fetch_sub(1, SeqCst) - 1) & (OPEN | COUNT) == 0 {
            caller.unpark();
        }
    }
}

/// Spinning that ends after [`SPIN`]; reading the clock only every 64 turns.
struct Spin {
    since: Option<Instant>,
    turns: u32,
}

impl Spin {
    fn new() -> Self {
        Spin { since: None, turns: 0 }
    }

    /// One turn; false once the time is over.
    fn turn(&mut self) -> bool {
        std::hint::spin_loop();
        self.turns = self.turns.wrapping_add(1);
        if self.turns % 64 != 1 {
            return true;
        }
        self.since.get_or_insert_with(Instant::now).elapsed() < SPIN
    }
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// The pool of this process: [`crate::cgroup::cpu_count`] threads, started at the first use.
pub fn global() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| Pool::new(crate::cgroup::cpu_count()))
}

/// [`Pool::parallel_for`] on the process's pool.
pub fn parallel_for(len: usize, work: impl Fn(Range<usize>) + Sync) {
    global().parallel_for(len, work);
}

/// [`Pool::parallel_for_min`] on the process's pool.
pub fn parallel_for_min(len: usize, min_chunk: usize, work: impl Fn(Range<usize>) + Sync) {
    global().parallel_for_min(len, min_chunk, work);
}

/// A mutable slice that several threads write at disjoint places.
///
/// The indices a kernel gives to its threads are disjoint by construction; this carries the slice to them.
pub struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    _slice: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: access is only through `slice_mut`, whose caller promises that no two threads touch the same element.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Wraps `slice` for the time of one job.
    pub fn new(slice: &'a mut [T]) -> Self {
        Disjoint {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            _slice: std::marker::PhantomData,
        }
    }

    /// The elements of `range`. Panics when it lies outside.
    ///
    /// # Safety
    /// No other live reference may cover an element of `range`.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice_mut(&self, range: Range<usize>) -> &mut [T] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "range {range:?} outside of a slice of {}",
            self.len
        );
        // SAFETY: inside the slice, and exclusive as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.end - range.start) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn every_index_is_visited_exactly_once_whatever_the_sizes_and_threads() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for len in [0, 1, 2, 7, 64, 1000] {
                for min_chunk in [1, 3, 2000] {
                    let visits: Vec<AtomicU32> = (0..len).map(|_| AtomicU32::new(0)).collect();
                    pool.parallel_for_min(len, min_chunk, |range| {
                        range.for_each(|i| {
                            visits[i].fetch_add(1, Relaxed);
                        })
                    });
                    assert!(
                        visits.iter().all(|count| count.load(Relaxed) == 1),
                        "threads {threads} len {len} min_chunk {min_chunk}"
                    );
                }
            }
        }
    }

    #[test]
    fn callers_from_many_threads_and_nested_jobs_all_finish() {
        let pool = Pool::new(3);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        pool.parallel_for(16, |outer| {
                            pool.parallel_for(outer.len(), |inner| {
                                sum.fetch_add(inner.len(), Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4 * 500 * 16);
    }

    #[test]
    fn a_panic_in_a_chunk_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(2);
        for bad in [0, 40, 99] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.parallel_for(100, |range| assert!(!range.contains(&bad)))
            }));
            assert!(result.is_err(), "index {bad}");
            let count = AtomicUsize::new(0);
            pool.parallel_for(100, |range| {
                count.fetch_add(range.len(), Relaxed);
            });
            assert_eq!(count.into_inner(), 100);
        }
    }
}

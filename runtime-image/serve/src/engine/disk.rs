//! The disk behind the cache: a thread writes and reads what blocks hold, so that no step waits for it.
//!
//! ```text
//! engine ──Write, Read──▶ thread, one after the other ──Done──▶ engine, between two steps
//! ```
//! What is under way is bounded by its buffers, which go with it and come back: without a free one nothing more is written, and
//! a read waits. The thread never touches the cache: the engine copies between blocks and buffers.
//!
//! The file has no name, so nobody finds it, and nothing is left of it when the process ends, however it ends. What its slots
//! hold is known here alone: of each the content's name, which is never used twice, and a checksum. What differs is a miss.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant, SystemTime};

use crate::error::ServeError;
use crate::metrics::Metrics;
use crate::schedule::{Load, Spill};

/// Memory of what is to be written. A long prompt evicts many blocks in one step; what does not fit is lost.
const WRITE_BYTES: usize = 64 << 20;
/// Memory of what is being read: that much is copied into the cache between two steps, at most.
const READ_BYTES: usize = 8 << 20;
/// However large a block is, that many can be under way.
const LEAST_BUFFERS: usize = 8;

/// A disk that does nothing of what it was asked for that long is given up: some hang instead of failing, and requests wait for it.
const PATIENCE: Duration = Duration::from_secs(10);

enum Job {
    Write(Spill, Vec<u8>),
    Read(Load, Vec<u8>),
}

/// What was done; the buffer comes back.
enum Done {
    Written(Vec<u8>),
    Read(Load, Vec<u8>),
    /// What is there is not what was written.
    Missed(Load, Vec<u8>),
}

/// The disk is of no more use; its thread has said why.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gone;

/// Buffers as large as a block, made when they are first needed.
struct Buffers {
    bytes: usize,
    free: Vec<Vec<u8>>,
    unmade: usize,
}

impl Buffers {
    fn new(bytes: usize, memory: usize) -> Self {
        Buffers {
            bytes,
            free: Vec::new(),
            unmade: (memory / bytes.max(1)).max(LEAST_BUFFERS),
        }
    }

    fn left(&self) -> usize {
        self.free.len() + self.unmade
    }

    fn take(&mut self) -> Option<Vec<u8>> {
        if let Some(buffer) = self.free.pop() {
            return Some(buffer);
        }
        self.unmade = self.unmade.checked_sub(1)?;
        Some(vec![0; self.bytes])
    }
}

/// The engine's side.
pub(crate) struct Disk {
    jobs: SyncSender<Job>,
    done: Receiver<Done>,
    to_write: Buffers,
    to_read: Buffers,
    /// Reads that wait for a buffer.
    waiting: VecDeque<Load>,
    /// Jobs that were not answered, and since when none was.
    under_way: usize,
    silent_since: Instant,
    patience: Duration,
}

impl Disk {
    /// A file in `folder` with slots for blocks of `bytes` bytes, and the thread that writes and reads it.
    pub(crate) fn start(folder: &Path, bytes: usize, slots: usize, metrics: Arc<Metrics>) -> Result<Self, ServeError> {
        let file = nameless(folder).and_then(|file| {
            // As long as it will ever be, without taking room: to a file that grows some file systems give more than it asks for.
            file.set_len(bytes as u64 * slots as u64)?;
            Ok(file)
        });
        let file = file.map_err(|error| {
            ServeError::Arguments(format!(
                "--kv-spill-dir {}: {error}; name a folder that the server may write to, on a disk that takes a file of \
                 --kv-spill-bytes",
                folder.display()
            ))
        })?;
        Self::over(file, bytes, metrics).map_err(|source| ServeError::System {
            what: "cannot start the thread for --kv-spill-dir",
            source,
        })
    }

    fn over(file: File, bytes: usize, metrics: Arc<Metrics>) -> io::Result<Self> {
        let (to_write, to_read) = (Buffers::new(bytes, WRITE_BYTES), Buffers::new(bytes, READ_BYTES));
        // Each has room for all buffers that there are, so neither side ever waits to send.
        let most = to_write.left() + to_read.left();
        let (jobs, queue) = mpsc::sync_channel(most);
        let (answers, done) = mpsc::sync_channel(most);
        let worker = Worker {
            file,
            bytes: bytes as u64,
            known: HashMap::new(),
            metrics,
        };
        std::thread::Builder::new().name("spill".to_owned()).spawn(move || {
            if let Err(error) = worker.run(&queue, &answers) {
                tracing::warn!(%error, "the disk of --kv-spill-dir fails: serving goes on without it until a restart");
            }
        })?;
        Ok(Disk {
            jobs,
            done,
            to_write,
            to_read,
            waiting: VecDeque::new(),
            under_way: 0,
            silent_since: Instant::now(),
            patience: PATIENCE,
        })
    }

    /// Bytes of several slots.
    pub(super) fn bytes(&self, slots: usize) -> usize {
        slots * self.to_write.bytes
    }

    /// How many blocks can be written now.
    pub(super) fn room(&self) -> usize {
        self.to_write.left()
    }

    /// Has a block written, of which `save` gives the bytes.
    pub(super) fn write(&mut self, spill: Spill, save: impl FnOnce(&mut [u8])) -> Result<(), Gone> {
        // There is one, as no more is spilled than there is room for. Were there none, a read would find another content.
        let Some(mut buffer) = self.to_write.take() else {
            return Ok(());
        };
        save(&mut buffer);
        self.send(Job::Write(spill, buffer))
    }

    fn send(&mut self, job: Job) -> Result<(), Gone> {
        if self.under_way == 0 {
            self.silent_since = Instant::now();
        }
        self.under_way += 1;
        self.jobs.try_send(job).map_err(|_| Gone)
    }

    /// Has slots read, behind those that still wait; of these, only what is wanted: the slots of others may be written anew.
    pub(super) fn read(&mut self, loads: Vec<Load>, is_wanted: impl Fn(&Load) -> bool) -> Result<(), Gone> {
        self.waiting.retain(is_wanted);
        self.waiting.extend(loads);
        while !self.waiting.is_empty()
            && let Some(buffer) = self.to_read.take()
            && let Some(load) = self.waiting.pop_front()
        {
            self.send(Job::Read(load, buffer))?;
        }
        Ok(())
    }

    /// Gives out what has been read since, or that it could not be; waits up to `wait` for something to be done.
    pub(super) fn take(&mut self, mut wait: Duration, mut give: impl FnMut(Load, Option<&[u8]>)) -> Result<(), Gone> {
        loop {
            match self.done.recv_timeout(wait) {
                Ok(Done::Written(buffer)) => self.to_write.free.push(buffer),
                Ok(Done::Read(load, buffer)) => {
                    give(load, Some(&buffer));
                    self.to_read.free.push(buffer);
                }
                Ok(Done::Missed(load, buffer)) => {
                    give(load, None);
                    self.to_read.free.push(buffer);
                }
                Err(RecvTimeoutError::Timeout)
                    if self.under_way > 0 && self.silent_since.elapsed() >= self.patience =>
                {
                    let seconds = self.patience.as_secs();
                    tracing::warn!(
                        seconds,
                        "the disk of --kv-spill-dir hangs: serving goes on without it until a restart"
                    );
                    return Err(Gone);
                }
                Err(RecvTimeoutError::Timeout) => return Ok(()),
                Err(RecvTimeoutError::Disconnected) => return Err(Gone),
            }
            wait = Duration::ZERO;
            self.under_way -= 1;
            self.silent_since = Instant::now();
        }
    }
}

/// A file for this process alone.
fn nameless(folder: &Path) -> io::Result<File> {
    // Containers that share a folder may all be process 1.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let name = format!(
        ".strata-kv-{}-{}",
        std::process::id(),
        now.map_or(0, |now| now.as_nanos())
    );
    let path = folder.join(name);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

/// The thread's side.
struct Worker {
    file: File,
    bytes: u64,
    /// What the slots hold: the content's name, and the checksum.
    known: HashMap<u32, (u64, u32)>,
    metrics: Arc<Metrics>,
}

impl Worker {
    /// Runs until the engine has gone, or the disk fails.
    fn run(mut self, queue: &Receiver<Job>, answers: &SyncSender<Done>) -> io::Result<()> {
        while let Ok(job) = queue.recv() {
            let done = match job {
                Job::Write(spill, buffer) => {
                    self.write(&spill, &buffer)?;
                    Done::Written(buffer)
                }
                Job::Read(load, mut buffer) => match self.read(&load, &mut buffer)? {
                    true => Done::Read(load, buffer),
                    false => {
                        tracing::warn!(
                            slot = load.slot,
                            "a block on the disk is damaged: it is computed instead"
                        );
                        self.metrics.damaged();
                        Done::Missed(load, buffer)
                    }
                },
            };
            if answers.send(done).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn write(&mut self, spill: &Spill, bytes: &[u8]) -> io::Result<()> {
        self.known.remove(&spill.slot); // until it is whole
        self.file.write_all_at(bytes, u64::from(spill.slot) * self.bytes)?;
        self.known.insert(spill.slot, (spill.content, crc32fast::hash(bytes)));
        Ok(())
    }

    /// Whether the slot holds what it must.
    fn read(&self, load: &Load, buffer: &mut [u8]) -> io::Result<bool> {
        match self.file.read_exact_at(buffer, u64::from(load.slot) * self.bytes) {
            Ok(()) => Ok(self.known.get(&load.slot) == Some(&(load.content, crc32fast::hash(buffer)))),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::Limits;

    const BYTES: usize = 4096;

    fn metrics() -> Arc<Metrics> {
        let limits = Limits {
            max_sequences: 1,
            max_batched_tokens: 1,
            max_waiting: 1,
            block_tokens: 1,
            blocks: 1,
            prefix_caching: true,
            spill_slots: 1,
        };
        Arc::new(Metrics::new("m", &limits, 1, "float16").unwrap())
    }

    fn spill(slot: u32, content: u64) -> Spill {
        Spill {
            block: 0,
            slot,
            content,
        }
    }

    fn load(slot: u32, content: u64) -> Load {
        Load {
            id: 0,
            attempt: 0,
            slot,
            content,
            block: 0,
        }
    }

    /// Reads slots and gives out what came of each, in order.
    fn read(disk: &mut Disk, loads: &[Load]) -> Result<Vec<Option<Vec<u8>>>, Gone> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut got = Vec::new();
        disk.read(loads.to_vec(), |_| true)?;
        while got.len() < loads.len() {
            assert!(Instant::now() < deadline, "{} of {} were read", got.len(), loads.len());
            disk.take(Duration::from_millis(10), |load, bytes| {
                assert_eq!(load, loads[got.len()]);
                got.push(bytes.map(<[u8]>::to_vec));
            })?;
            disk.read(Vec::new(), |_| true)?;
        }
        Ok(got)
    }

    #[test]
    fn what_was_written_is_read_and_what_is_damaged_cut_off_or_another_content_is_a_miss() {
        let folder = tempfile::tempdir().unwrap();
        let file = nameless(folder.path()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "it has no name");
        let mode = std::os::unix::fs::MetadataExt::mode(&file.metadata().unwrap());
        assert_eq!(mode & 0o777, 0o600);
        let (same, metrics) = (file.try_clone().unwrap(), metrics());
        let mut disk = Disk::over(file, BYTES, metrics.clone()).unwrap();
        for slot in 0..4u32 {
            disk.write(spill(slot, u64::from(slot) + 10), |bytes| bytes.fill(slot as u8))
                .unwrap();
        }
        let loads = [
            load(0, 10),
            load(1, 11),
            load(2, 12),
            load(3, 13),
            load(3, 99),
            load(9, 1),
        ];
        let whole = |slot: u8| Some(vec![slot; BYTES]);
        let expected = vec![whole(0), whole(1), whole(2), whole(3), None, None];
        assert_eq!(read(&mut disk, &loads).unwrap(), expected);
        same.write_all_at(b"!", BYTES as u64 + 100).unwrap();
        same.set_len(BYTES as u64 * 3 + 5).unwrap();
        let expected = vec![whole(0), None, whole(2), None, None, None];
        assert_eq!(read(&mut disk, &loads).unwrap(), expected);
        let text = metrics.text().unwrap();
        assert!(
            text.contains("strata_kv_spill_damaged_total{engine=\"0\",model_name=\"m\"} 6"),
            "{text}"
        );
    }

    #[test]
    fn more_reads_than_buffers_wait_for_one_and_there_is_no_room_to_write_more_than_there_are() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = WRITE_BYTES / LEAST_BUFFERS;
        let mut disk = Disk::start(folder.path(), bytes, 2, metrics()).unwrap();
        let most = disk.room();
        for _ in 0..most {
            disk.write(spill(1, 7), |bytes| bytes.fill(3)).unwrap();
        }
        assert_eq!(disk.room(), 0);
        let loads = vec![load(1, 7); 3 * LEAST_BUFFERS];
        let got = read(&mut disk, &loads).unwrap();
        assert!(
            got.iter()
                .all(|got| got.as_ref().is_some_and(|got| got[bytes - 1] == 3))
        );
        assert_eq!(disk.room(), most, "all came back");
    }

    #[test]
    fn a_disk_that_hangs_is_given_up_and_one_that_has_nothing_to_do_is_not() {
        let ((jobs, _queue), (_answers, done)) = (mpsc::sync_channel(1), mpsc::sync_channel(1));
        let mut disk = Disk {
            jobs,
            done,
            to_write: Buffers::new(BYTES, BYTES),
            to_read: Buffers::new(BYTES, BYTES),
            waiting: VecDeque::new(),
            under_way: 0,
            silent_since: Instant::now(),
            patience: Duration::ZERO,
        };
        assert_eq!(disk.take(Duration::ZERO, |_, _| ()), Ok(()));
        disk.read(vec![load(0, 1)], |_| true).unwrap();
        assert_eq!(disk.take(Duration::ZERO, |_, _| ()), Err(Gone));
    }

    #[test]
    fn a_disk_that_is_full_is_given_up() {
        let full = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
        let mut disk = Disk::over(full, BYTES, metrics()).unwrap();
        disk.write(spill(0, 1), |_| ()).unwrap();
        assert_eq!(read(&mut disk, &[load(0, 1)]), Err(Gone));
        let nowhere = Disk::start(Path::new("/nowhere"), BYTES, 1, metrics());
        let error = nowhere.err().expect("there is no such folder");
        assert!(
            error.is_bad_input() && error.to_string().contains("--kv-spill-dir /nowhere"),
            "{error}"
        );
    }
}

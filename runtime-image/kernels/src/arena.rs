//! Memory for weights: zeroed, aligned to cache lines, in huge pages where the system gives them.
//!
//! Reading a gigabyte a step through 4 KiB pages spends a good part of the time on address translation. One arena holds the
//! weights of a model, so that small matrices share huge pages, and is freed with the last matrix that lies in it.

use std::alloc::{Layout, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

/// Size and alignment of a huge page, in bytes.
const HUGE: usize = 2 << 20;
/// Bytes of a chunk: what the last one wastes is small beside a model, and few chunks mean few seams.
const CHUNK: usize = 32 << 20;
/// Every slice begins on a cache line.
const LINE: usize = 64;

/// An anonymous mapping, a huge page longer than what is used, so that the used part begins on a huge page.
struct Chunk {
    mapped: NonNull<u8>,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a chunk is plain memory; slices of it are disjoint, and each has one owner.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn new(bytes: usize) -> Self {
        let len = bytes.next_multiple_of(HUGE);
        // SAFETY: a new anonymous mapping touches nothing that is there.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len + HUGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let out_of_memory =
            || handle_alloc_error(Layout::from_size_align(len, HUGE).unwrap_or_else(|_| Layout::new::<u8>()));
        if mapped == libc::MAP_FAILED {
            out_of_memory();
        }
        let mapped: NonNull<u8> = NonNull::new(mapped.cast()).unwrap_or_else(out_of_memory);
        // SAFETY: less than a huge page further, which the mapping is longer than `len`.
        let start = unsafe { mapped.add(mapped.as_ptr().align_offset(HUGE)) };
        #[cfg(target_os = "linux")]
        // SAFETY: the range lies in the mapping. The advice may be refused; then pages are small.
        unsafe {
            libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE);
        }
        Chunk { mapped, start, len }
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: mapped with this length; the last slice has gone.
        unsafe { libc::munmap(self.mapped.as_ptr().cast(), self.len + HUGE) };
    }
}

/// Gives out slices; cheap to clone, to be shared by the threads that fill them.
#[derive(Clone, Default)]
pub struct Arena(Arc<Mutex<Open>>);

#[derive(Default)]
struct Open {
    chunk: Option<Arc<Chunk>>,
    used: usize,
}

impl Arena {
    /// `bytes` zeroed bytes that begin on a cache line.
    pub fn take(&self, bytes: usize) -> ArenaSlice {
        let size = bytes.next_multiple_of(LINE);
        let mut open = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let room = open.chunk.as_ref().map_or(0, |chunk| chunk.len - open.used);
        if room < size {
            *open = Open {
                chunk: Some(Arc::new(Chunk::new(size.max(CHUNK)))),
                used: 0,
            };
        }
        let chunk = open.chunk.clone().expect("made above");
        // SAFETY: `used + size` lies inside the chunk, as was just checked.
        let start = unsafe { chunk.start.add(open.used) };
        open.used += size;
        ArenaSlice {
            start,
            len: bytes,
            _chunk: chunk,
        }
    }
}

/// Bytes in an arena.
pub struct ArenaSlice {
    start: NonNull<u8>,
    len: usize,
    _chunk: Arc<Chunk>,
}

// SAFETY: it owns its bytes, which nobody else reaches.
unsafe impl Send for ArenaSlice {}
// SAFETY: as above.
unsafe impl Sync for ArenaSlice {}

impl std::ops::Deref for ArenaSlice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: initialized (zeroed), alive as long as the chunk, and given out once.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for ArenaSlice {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl std::fmt::Debug for ArenaSlice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ArenaSlice({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_zeroed_aligned_disjoint_and_outlive_the_arena() {
        let arena = Arena::default();
        let mut slices: Vec<ArenaSlice> = [1, 64, 100, CHUNK + 1, 0, 7].map(|bytes| arena.take(bytes)).into();
        drop(arena);
        for (i, slice) in slices.iter_mut().enumerate() {
            assert!(slice.as_ptr().addr().is_multiple_of(LINE) && slice.iter().all(|byte| *byte == 0));
            slice.fill(i as u8 + 1);
        }
        for (i, slice) in slices.iter().enumerate() {
            assert!(slice.iter().all(|byte| *byte == i as u8 + 1));
        }
    }
}

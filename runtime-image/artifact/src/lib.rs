//! The artifact store: what a stage publishes is hashed, complete and never changes; what it reads is verified.
//!
//! ```text
//! RUN/                          the run's folder, a URI in the configuration
//!   manifest.json               there: published; not there: nothing is
//!   attempts/ATTEMPT_ID/
//!     content/…                 the artifact's files, if this attempt is the one that published
//!     …                         whatever else the attempt keeps, such as checkpoints
//! ```
//!
//! Each file is written under a temporary name, synced and renamed. The manifest, with the size and hash of every file,
//! is written last and appears by one hard link, which the file system grants to one attempt only. So a crash at any
//! point leaves no manifest or a complete one, and of two attempts that end together the second takes over the first
//! one's result.

mod error;
mod hashing;
mod open;
mod run;

pub use error::ArtifactError;
pub use hashing::{HashingReader, HashingWriter, hash_file, hash_files};
pub use open::{Opened, Verify, open};
pub use run::{Attempt, Draft, FileWriter, RunFolder, check_figures};

/// Result of a storage operation.
pub type Result<T> = std::result::Result<T, ArtifactError>;

/// Suffix of a file that is still being written.
const PARTIAL_SUFFIX: &str = ".partial";

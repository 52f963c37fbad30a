//! Checkpoints: saved so that a crash at any point leaves the ones before intact, found again across the attempts of a run.
//!
//! ```text
//! RUN/attempts/ATTEMPT/checkpoints/
//!   step-00000040/
//!     state.safetensors     parameters and moments (F32), notes (F64)
//!     checkpoint.json       step, position in the data, size and hash of the state
//!   step-00000060.partial/  still being written, or left by a crash; never read
//! ```
//!
//! A step's folder is written under a temporary name, each file synced, the description last, then renamed and the parent
//! synced. Each attempt writes only below its own folder, so one that lives on after it was replaced disturbs nobody; what it
//! removes are checkpoints older than the newest of the run.
//! Reading verifies the hash; a checkpoint that does not match is passed over with a warning, for the next older one. If
//! none is left, the run ends and says so.
//! The order of the data is a function of the seed and the position, so no generator state is needed.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata, View};
use safetensors::{SafeTensorError, serialize_to_file};
use serde::{Deserialize, Serialize};
use strata_artifact::{ArtifactError, RunFolder, hash_file};

const FOLDER: &str = "checkpoints";
const STATE: &str = "state.safetensors";
const DESCRIPTION: &str = "checkpoint.json";
const VERSION: u32 = 1;
/// Longest header of a state that is read: names and shapes of a handful of tensors.
const HEADER_LIMIT_BYTES: u64 = 1 << 20;

/// Why a checkpoint could not be saved or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The volume refused.
    #[error(transparent)]
    Storage(#[from] ArtifactError),
    /// One checkpoint is damaged; an older one may do.
    #[error("checkpoint {path} is not usable: {detail}", path = path.display())]
    Unusable {
        /// Its folder.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// There are checkpoints, and all are damaged: starting anew would throw the work away without a word.
    #[error("all {count} checkpoints are damaged; the newest: {newest}")]
    AllUnusable {
        /// How many.
        count: usize,
        /// What is wrong with the newest.
        newest: String,
    },
}

/// Everything that training goes on from. Saving borrows it: a copy of parameters and moments would need as much memory as
/// training does.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State<'a> {
    /// Optimizer steps made.
    pub step: u64,
    /// Samples that were used; the position in the seed's order of the data.
    pub samples: u64,
    /// The trained parameters.
    pub parameters: Cow<'a, [f32]>,
    /// First moments.
    pub first: Cow<'a, [f32]>,
    /// Second moments.
    pub second: Cow<'a, [f32]>,
    /// What else the stage computed before, by name.
    pub notes: Cow<'a, BTreeMap<String, Vec<f64>>>,
}

/// The checkpoint that a run goes on from.
#[derive(Debug, PartialEq)]
pub struct Resumed {
    /// What it holds.
    pub state: State<'static>,
    /// Newer ones that were damaged.
    pub passed_over: usize,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Description {
    version: u32,
    run_id: String,
    step: u64,
    samples: u64,
    bytes: u64,
    sha256: String,
}

/// Where an attempt saves its checkpoints.
#[derive(Clone, Debug)]
pub struct Checkpoints<'a> {
    run: &'a RunFolder,
    attempt: &'a str,
    run_id: &'a str,
    keep: usize,
}

impl<'a> Checkpoints<'a> {
    /// Checkpoints of `attempt`; the newest `keep` (at least 1) of the whole run stay.
    pub fn new(run: &'a RunFolder, attempt: &'a str, run_id: &'a str, keep: u32) -> Self {
        Self {
            run,
            attempt,
            run_id,
            keep: keep.max(1) as usize,
        }
    }

    /// Saves `state`, then removes the run's checkpoints beyond the newest, those of earlier attempts included.
    pub fn save(&self, state: &State) -> Result<(), CheckpointError> {
        let folder = self.run.attempt_dir(self.attempt).join(FOLDER);
        let name = format!("step-{:08}", state.step);
        let (place, partial) = (folder.join(&name), folder.join(name + ".partial"));
        let written = self.write(state, &partial).and_then(|()| {
            remove(&place)?;
            fs::rename(&partial, &place).map_err(|error| ArtifactError::writing(&place, error))?;
            sync(&folder)
        });
        if let Err(error) = written {
            // What is half-written would only hold space that may be the problem.
            let _ = fs::remove_dir_all(&partial);
            return Err(error.into());
        }
        for (_, path) in of_run(self.run)?.into_iter().rev().skip(self.keep) {
            remove(&path)?;
        }
        Ok(())
    }

    fn write(&self, state: &State, partial: &Path) -> Result<(), ArtifactError> {
        remove(partial)?;
        fs::create_dir_all(partial).map_err(|error| ArtifactError::writing(partial, error))?;
        let path = partial.join(STATE);
        encode(state, &path)?;
        sync(&path)?;
        let (bytes, sha256) = hash_file(&path)?;
        let description = Description {
            version: VERSION,
            run_id: self.run_id.to_owned(),
            step: state.step,
            samples: state.samples,
            bytes,
            sha256,
        };
        let text = serde_json::to_vec_pretty(&description).expect("numbers and words serialize to JSON");
        let path = partial.join(DESCRIPTION);
        let mut file = create(&path)?;
        file.write_all(&text)
            .map_err(|error| ArtifactError::writing(&path, error))?;
        file.sync_all().map_err(|error| ArtifactError::writing(&path, error))?;
        sync(partial)
    }
}

/// The newest usable checkpoint of any attempt of the run, by step; none if nothing was saved.
///
/// # Errors
/// The volume cannot be read, or there are checkpoints and all are damaged.
pub fn resume(run: &RunFolder, run_id: &str) -> Result<Option<Resumed>, CheckpointError> {
    let all = of_run(run)?;
    let mut newest = None;
    for (passed_over, (_, path)) in all.iter().rev().enumerate() {
        match read(path, run_id) {
            Ok(state) => {
                tracing::info!(step = state.step, path = %path.display(), passed_over, "going on from a checkpoint");
                return Ok(Some(Resumed { state, passed_over }));
            }
            Err(error @ CheckpointError::Unusable { .. }) => {
                tracing::warn!(%error, "a checkpoint is passed over");
                newest.get_or_insert(error.to_string());
            }
            Err(error) => return Err(error),
        }
    }
    match newest {
        Some(newest) => Err(CheckpointError::AllUnusable {
            count: all.len(),
            newest,
        }),
        None => Ok(None),
    }
}

/// Removes the checkpoints of all attempts of a run that has its result: nothing will be resumed.
pub fn remove_all(run: &RunFolder) -> Result<(), ArtifactError> {
    run.attempts()?
        .iter()
        .try_for_each(|attempt| remove(&run.attempt_dir(attempt).join(FOLDER)))
}

/// Complete checkpoints of all attempts, as step and path, oldest first.
fn of_run(run: &RunFolder) -> Result<Vec<(u64, PathBuf)>, ArtifactError> {
    let mut all = Vec::new();
    for attempt in run.attempts()? {
        let folder = run.attempt_dir(&attempt).join(FOLDER);
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries.map_err(|error| ArtifactError::reading(&folder, error))?,
        };
        for entry in entries {
            let entry = entry.map_err(|error| ArtifactError::reading(&folder, error))?;
            let name = entry.file_name();
            let step = name.to_str().and_then(|name| name.strip_prefix("step-")?.parse().ok());
            all.extend(step.map(|step| (step, entry.path())));
        }
    }
    all.sort();
    Ok(all)
}

fn read(path: &Path, run_id: &str) -> Result<State<'static>, CheckpointError> {
    let unusable = |detail: String| CheckpointError::Unusable {
        path: path.to_owned(),
        detail,
    };
    // A file that is missing or cut is damage; any other failure is the volume's, and may pass.
    let failed = |file: &Path, error: ArtifactError| match error {
        ArtifactError::NotFound { .. } | ArtifactError::Corrupt { .. } => {
            unusable(format!("{}: {error}", file.display()))
        }
        error => error.into(),
    };
    let description_path = path.join(DESCRIPTION);
    let text = fs::read(&description_path)
        .map_err(|error| failed(&description_path, ArtifactError::reading(&description_path, error)))?;
    let description: Description =
        serde_json::from_slice(&text).map_err(|error| unusable(format!("{DESCRIPTION}: {error}")))?;
    if description.version != VERSION || description.run_id != run_id {
        return Err(unusable(format!(
            "it is of version {} and run {}",
            description.version, description.run_id
        )));
    }
    let state_path = path.join(STATE);
    let (bytes, sha256) = hash_file(&state_path).map_err(|error| failed(&state_path, error))?;
    if bytes != description.bytes {
        return Err(unusable(format!(
            "{STATE} has {bytes} bytes, {} were written",
            description.bytes
        )));
    }
    if sha256 != description.sha256 {
        return Err(unusable(format!("{STATE} does not have the hash that was written")));
    }
    let mut state = decode(&state_path).map_err(|error| match error {
        DecodeError::Io(error) => failed(&state_path, ArtifactError::reading(&state_path, error)),
        DecodeError::Format(detail) => unusable(format!("{STATE}: {detail}")),
    })?;
    (state.step, state.samples) = (description.step, description.samples);
    Ok(state)
}

/// A buffer of the state as a tensor; its bytes exist only while they are written.
enum Buffer<'a> {
    F32(&'a [f32], [usize; 1]),
    F64(&'a [f64], [usize; 1]),
}

impl View for Buffer<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Self::F32(..) => Dtype::F32,
            Self::F64(..) => Dtype::F64,
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Self::F32(_, shape) | Self::F64(_, shape) => shape,
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(match self {
            Self::F32(values, _) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Self::F64(values, _) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        })
    }

    fn data_len(&self) -> usize {
        match self {
            Self::F32(values, _) => size_of_val(*values),
            Self::F64(values, _) => size_of_val(*values),
        }
    }
}

fn encode(state: &State, path: &Path) -> Result<(), ArtifactError> {
    let floats = [
        ("parameters", &state.parameters),
        ("first", &state.first),
        ("second", &state.second),
    ];
    let mut buffers: Vec<(String, Buffer)> = floats
        .into_iter()
        .map(|(name, values)| (name.to_owned(), Buffer::F32(values, [values.len()])))
        .collect();
    let notes = state.notes.iter();
    buffers.extend(notes.map(|(name, values)| (format!("notes.{name}"), Buffer::F64(values, [values.len()]))));
    serialize_to_file(buffers, None, path).map_err(|error| {
        let error = match error {
            SafeTensorError::IoError(error) => error,
            error => std::io::Error::other(error),
        };
        ArtifactError::writing(path, error)
    })
}

enum DecodeError {
    Io(std::io::Error),
    Format(String),
}

impl From<std::io::Error> for DecodeError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

/// Reads tensor by tensor, so that bytes and numbers of only one are in memory at the same time.
fn decode(path: &Path) -> Result<State<'static>, DecodeError> {
    let format = |detail: String| DecodeError::Format(detail);
    let mut file = File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > HEADER_LIMIT_BYTES {
        return Err(format(format!("a header of {header_bytes} bytes")));
    }
    let mut header = vec![0; header_bytes as usize];
    file.read_exact(&mut header)?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| format(error.to_string()))?;
    let mut state = State::default();
    for (name, info) in metadata.tensors() {
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0; end - start];
        file.seek(SeekFrom::Start(8 + header_bytes + start as u64))?;
        file.read_exact(&mut bytes)?;
        let place = match (name.as_str(), info.dtype) {
            ("parameters", Dtype::F32) => &mut state.parameters,
            ("first", Dtype::F32) => &mut state.first,
            ("second", Dtype::F32) => &mut state.second,
            (other, dtype) => {
                let note = other.strip_prefix("notes.").filter(|_| dtype == Dtype::F64);
                let note = note.ok_or_else(|| format(format!("unknown tensor {other} of {dtype:?}")))?;
                let values = bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
                state.notes.to_mut().insert(note.into(), values);
                continue;
            }
        };
        *place = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    }
    if state.first.len() != state.parameters.len() || state.second.len() != state.parameters.len() {
        return Err(format("moments and parameters differ in length".into()));
    }
    Ok(state)
}

fn create(path: &Path) -> Result<File, ArtifactError> {
    File::create(path).map_err(|error| ArtifactError::writing(path, error))
}

fn sync(folder: &Path) -> Result<(), ArtifactError> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|error| ArtifactError::writing(folder, error))
}

fn remove(folder: &Path) -> Result<(), ArtifactError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(ArtifactError::writing(folder, error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use strata_contract::Uri;

    fn state(step: u64) -> State<'static> {
        let values = |seed: f32| (0..100).map(|i| seed + i as f32 / 3.0).collect();
        State {
            step,
            samples: step * 8,
            parameters: values(1.0),
            first: values(2.0),
            second: values(3.0),
            notes: Cow::Owned(BTreeMap::from([(
                "reference".to_owned(),
                vec![-1.0 / 3.0, f64::MIN_POSITIVE],
            )])),
        }
    }

    struct Bed {
        folder: tempfile::TempDir,
        run: RunFolder,
    }

    impl Bed {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let run = RunFolder::new(&Uri::File(folder.path().to_owned()), Path::new("/"));
            Self { folder, run }
        }

        fn attempt<'a>(&'a self, id: &'a str) -> Checkpoints<'a> {
            Checkpoints::new(&self.run, id, "run", 2)
        }

        fn file(&self, attempt: &str, step: u64, name: &str) -> PathBuf {
            self.folder
                .path()
                .join(format!("attempts/{attempt}/checkpoints/step-{step:08}/{name}"))
        }

        fn resumed(&self) -> Option<u64> {
            resume(&self.run, "run").unwrap().map(|resumed| resumed.state.step)
        }
    }

    #[test]
    fn the_newest_of_all_attempts_comes_back_bit_for_bit_and_old_ones_go() {
        let bed = Bed::new();
        assert_eq!(bed.resumed(), None);
        for step in [10, 20, 30] {
            bed.attempt("a").save(&state(step)).unwrap();
        }
        assert!(!bed.file("a", 10, STATE).exists() && bed.file("a", 20, STATE).exists());
        bed.attempt("b").save(&state(40)).unwrap();
        let resumed = resume(&bed.run, "run").unwrap().unwrap();
        assert_eq!((resumed.state, resumed.passed_over), (state(40), 0));
        assert!(!bed.file("a", 20, STATE).exists() && bed.file("a", 30, STATE).exists());
        remove_all(&bed.run).unwrap();
        assert_eq!(bed.resumed(), None);
    }

    #[test]
    fn a_damaged_checkpoint_is_passed_over_for_the_last_good_one() {
        type Damage = fn(&Bed);
        let damages: [(&str, Damage); 5] = [
            ("a flipped bit", |bed| {
                let path = bed.file("a", 20, STATE);
                let mut bytes = fs::read(&path).unwrap();
                let at = bytes.len() - 7;
                bytes[at] ^= 1;
                fs::write(path, bytes).unwrap();
            }),
            ("a truncated state", |bed| {
                let path = bed.file("a", 20, STATE);
                let bytes = fs::read(&path).unwrap();
                fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
            }),
            ("no state", |bed| fs::remove_file(bed.file("a", 20, STATE)).unwrap()),
            ("no description", |bed| {
                fs::remove_file(bed.file("a", 20, DESCRIPTION)).unwrap()
            }),
            ("a crash before the rename", |bed| {
                let from = bed.file("a", 20, "");
                fs::rename(&from, from.with_file_name("step-00000020.partial")).unwrap();
            }),
        ];
        for (name, damage) in damages {
            let bed = Bed::new();
            bed.attempt("a").save(&state(10)).unwrap();
            bed.attempt("a").save(&state(20)).unwrap();
            damage(&bed);
            let resumed = resume(&bed.run, "run").unwrap().unwrap();
            assert_eq!(resumed.state.step, 10, "{name}");
            assert_eq!(
                resumed.passed_over,
                usize::from(bed.file("a", 20, "").exists()),
                "{name}"
            );
            // The attempt that goes on can save that step again.
            bed.attempt("b").save(&state(20)).unwrap();
            assert_eq!(bed.resumed(), Some(20), "{name}");
        }
    }

    #[test]
    fn when_every_checkpoint_is_damaged_the_run_ends_and_says_so() {
        let bed = Bed::new();
        for step in [10, 20] {
            bed.attempt("a").save(&state(step)).unwrap();
            fs::write(bed.file("a", step, STATE), "no tensors").unwrap();
        }
        let error = resume(&bed.run, "run").unwrap_err();
        let said = error.to_string();
        assert!(
            said.contains("all 2 checkpoints") && said.contains("step-00000020"),
            "{said}"
        );
        let error = strata_stage::StageError::from(error);
        assert_eq!(error.reason, strata_contract::FailureReason::CheckpointCorrupt);
    }
}

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
//! synced. Each attempt writes only below its own folder, so one that lives on after it was replaced disturbs nobody.
//! Reading verifies the hash; a checkpoint that does not match is passed over with a warning, for the next older one.
//! The order of the data is a function of the seed and the position, so no generator state is needed.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use serde::{Deserialize, Serialize};
use strata_artifact::{ArtifactError, HashingReader, HashingWriter, RunFolder};

const FOLDER: &str = "checkpoints";
const STATE: &str = "state.safetensors";
const DESCRIPTION: &str = "checkpoint.json";
const VERSION: u32 = 1;

/// Why a checkpoint could not be saved or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The volume refused.
    #[error(transparent)]
    Storage(#[from] ArtifactError),
    /// The checkpoint cannot be used.
    #[error("checkpoint {path} is not usable: {detail}", path = path.display())]
    Unusable {
        /// Its folder.
        path: PathBuf,
        /// Why.
        detail: String,
    },
}

/// Everything that training goes on from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// Optimizer steps made.
    pub step: u64,
    /// Samples that were used; the position in the seed's order of the data.
    pub samples: u64,
    /// The trained parameters.
    pub parameters: Vec<f32>,
    /// First moments.
    pub first: Vec<f32>,
    /// Second moments.
    pub second: Vec<f32>,
    /// What else the stage computed before, by name.
    pub notes: BTreeMap<String, Vec<f64>>,
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
pub struct Checkpoints {
    folder: PathBuf,
    run_id: String,
    keep: usize,
}

impl Checkpoints {
    /// Checkpoints of the attempt whose own folder is `attempt`; the newest `keep` (at least 1) stay.
    pub fn new(attempt: &Path, run_id: &str, keep: u32) -> Self {
        Self {
            folder: attempt.join(FOLDER),
            run_id: run_id.into(),
            keep: keep.max(1) as usize,
        }
    }

    /// Saves `state`, then removes this attempt's checkpoints beyond the newest.
    pub fn save(&self, state: &State) -> Result<(), CheckpointError> {
        let name = format!("step-{:08}", state.step);
        let (place, partial) = (self.folder.join(&name), self.folder.join(name + ".partial"));
        let written = self.write(state, &partial).and_then(|()| {
            remove(&place)?;
            fs::rename(&partial, &place).map_err(|error| ArtifactError::writing(&place, error))?;
            sync(&self.folder)
        });
        if let Err(error) = written {
            // What is half-written would only hold space that may be the problem.
            let _ = fs::remove_dir_all(&partial);
            return Err(error.into());
        }
        for (_, path) in found(&self.folder).into_iter().rev().skip(self.keep) {
            remove(&path)?;
        }
        Ok(())
    }

    fn write(&self, state: &State, partial: &Path) -> Result<(), ArtifactError> {
        remove(partial)?;
        fs::create_dir_all(partial).map_err(|error| ArtifactError::writing(partial, error))?;
        let path = partial.join(STATE);
        let file = create(&path)?;
        let mut file = HashingWriter::new(file);
        let bytes = encode(state).map_err(|error| ArtifactError::writing(&path, error))?;
        file.write_all(&bytes)
            .map_err(|error| ArtifactError::writing(&path, error))?;
        let (file, bytes, sha256) = file.finish();
        file.sync_all().map_err(|error| ArtifactError::writing(&path, error))?;
        let description = Description {
            version: VERSION,
            run_id: self.run_id.clone(),
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

/// The newest usable checkpoint of any attempt of the run, by step.
pub fn resume(run: &RunFolder, run_id: &str) -> Result<Option<State>, ArtifactError> {
    let mut all = Vec::new();
    for attempt in run.attempts()? {
        all.extend(found(&run.attempt_dir(&attempt).join(FOLDER)));
    }
    all.sort();
    for (_, path) in all.into_iter().rev() {
        match read(&path, run_id) {
            Ok(state) => {
                tracing::info!(step = state.step, path = %path.display(), "going on from a checkpoint");
                return Ok(Some(state));
            }
            Err(error) => tracing::warn!(%error, "a checkpoint is passed over"),
        }
    }
    Ok(None)
}

/// Removes the checkpoints of all attempts of a run that has published: nothing will be resumed.
pub fn remove_all(run: &RunFolder) -> Result<(), ArtifactError> {
    run.attempts()?
        .iter()
        .try_for_each(|attempt| remove(&run.attempt_dir(attempt).join(FOLDER)))
}

/// Complete checkpoints in `folder`, as step and path, oldest first. A folder that is not there has none.
fn found(folder: &Path) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut all: Vec<_> = entries
        .filter_map(|entry| {
            let step = entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok()?;
            Some((step, entry.path()))
        })
        .collect();
    all.sort();
    all
}

fn read(path: &Path, run_id: &str) -> Result<State, CheckpointError> {
    let unusable = |detail: String| CheckpointError::Unusable {
        path: path.to_owned(),
        detail,
    };
    let text = fs::read(path.join(DESCRIPTION)).map_err(|error| unusable(format!("{DESCRIPTION}: {error}")))?;
    let description: Description =
        serde_json::from_slice(&text).map_err(|error| unusable(format!("{DESCRIPTION}: {error}")))?;
    if description.version != VERSION || description.run_id != run_id {
        return Err(unusable(format!(
            "it is of version {} and run {}",
            description.version, description.run_id
        )));
    }
    let state_path = path.join(STATE);
    let file = File::open(&state_path).map_err(|error| unusable(format!("{STATE}: {error}")))?;
    let size = file
        .metadata()
        .map_err(|error| unusable(format!("{STATE}: {error}")))?
        .len();
    if size != description.bytes {
        return Err(unusable(format!(
            "{STATE} has {size} bytes, {} were written",
            description.bytes
        )));
    }
    let bytes = fs::read(&state_path).map_err(|error| unusable(format!("{STATE}: {error}")))?;
    let hash = HashingReader::new(bytes.as_slice())
        .finish()
        .map_err(|error| unusable(error.to_string()))?
        .1;
    if hash != description.sha256 {
        return Err(unusable(format!("{STATE} does not have the hash that was written")));
    }
    let mut state = decode(&bytes).map_err(|error| unusable(format!("{STATE}: {error}")))?;
    (state.step, state.samples) = (description.step, description.samples);
    Ok(state)
}

fn encode(state: &State) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let floats = [
        ("parameters", &state.parameters),
        ("first", &state.first),
        ("second", &state.second),
    ];
    let mut buffers: Vec<(String, Dtype, usize, Vec<u8>)> = floats
        .into_iter()
        .map(|(name, values)| {
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            (name.to_owned(), Dtype::F32, values.len(), bytes)
        })
        .collect();
    buffers.extend(state.notes.iter().map(|(name, values)| {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        (format!("notes.{name}"), Dtype::F64, values.len(), bytes)
    }));
    let views = buffers
        .iter()
        .map(|(name, dtype, len, bytes)| Ok((name.as_str(), TensorView::new(*dtype, vec![*len], bytes)?)))
        .collect::<Result<HashMap<_, _>, safetensors::SafeTensorError>>()?;
    serialize(views, None)
}

fn decode(bytes: &[u8]) -> Result<State, String> {
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let mut state = State::default();
    for (name, view) in tensors.tensors() {
        let place = match name.as_str() {
            "parameters" => &mut state.parameters,
            "first" => &mut state.first,
            "second" => &mut state.second,
            other => {
                let name = other.strip_prefix("notes.").filter(|_| view.dtype() == Dtype::F64);
                let name = name.ok_or_else(|| format!("unknown tensor {other}"))?;
                state.notes.insert(
                    name.into(),
                    view.data()
                        .as_chunks()
                        .0
                        .iter()
                        .map(|b| f64::from_le_bytes(*b))
                        .collect(),
                );
                continue;
            }
        };
        if view.dtype() != Dtype::F32 {
            return Err(format!("{name} is not F32"));
        }
        *place = view
            .data()
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
    }
    if state.first.len() != state.parameters.len() || state.second.len() != state.parameters.len() {
        return Err("moments and parameters differ in length".into());
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

    fn state(step: u64) -> State {
        let values = |seed: f32| (0..100).map(|i| seed + i as f32 / 3.0).collect::<Vec<f32>>();
        State {
            step,
            samples: step * 8,
            parameters: values(1.0),
            first: values(2.0),
            second: values(3.0),
            notes: BTreeMap::from([("reference".to_owned(), vec![-1.0 / 3.0, f64::MIN_POSITIVE])]),
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

        fn attempt(&self, id: &str) -> Checkpoints {
            Checkpoints::new(&self.run.attempt_dir(id), "run", 2)
        }

        fn file(&self, attempt: &str, step: u64, name: &str) -> PathBuf {
            self.folder
                .path()
                .join(format!("attempts/{attempt}/checkpoints/step-{step:08}/{name}"))
        }

        fn resumed(&self) -> Option<u64> {
            resume(&self.run, "run").unwrap().map(|state| state.step)
        }
    }

    #[test]
    fn the_newest_of_all_attempts_comes_back_bit_for_bit_and_old_ones_go() {
        let bed = Bed::new();
        assert_eq!(bed.resumed(), None);
        for step in [10, 20, 30] {
            bed.attempt("a").save(&state(step)).unwrap();
        }
        bed.attempt("b").save(&state(25)).unwrap();
        assert_eq!(resume(&bed.run, "run").unwrap(), Some(state(30)));
        assert!(!bed.file("a", 10, STATE).exists() && bed.file("a", 20, STATE).exists());
        assert_eq!(resume(&bed.run, "another run").unwrap(), None);
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
            assert_eq!(bed.resumed(), Some(10), "{name}");
            // The attempt that goes on can save that step again.
            bed.attempt("b").save(&state(20)).unwrap();
            assert_eq!(bed.resumed(), Some(20), "{name}");
        }
    }
}

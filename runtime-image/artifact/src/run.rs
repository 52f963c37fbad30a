//! A run's folder: its attempts, and the one publication.

mod figures;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use strata_contract::{
    ArtifactKind, CONTRACT_VERSION, Content, FileEntry, GateResult, Input, MANIFEST_FILE, Manifest, Publication,
    Resource, Uri,
};

pub use figures::check_figures;
use figures::settle;
pub use writer::FileWriter;

use crate::hashing::{HashingWriter, hash_file, walk};
use crate::{ArtifactError, PARTIAL_SUFFIX, Result};

const ATTEMPTS: &str = "attempts";
const CONTENT: &str = "content";
const MANIFEST_LIMIT_BYTES: u64 = 16 * 1024 * 1024;

/// The folder of one run id.
#[derive(Clone, Debug)]
pub struct RunFolder {
    path: PathBuf,
}

/// One attempt's folder, and the files of the artifact that it is making.
#[derive(Debug)]
pub struct Attempt {
    run: PathBuf,
    id: String,
    files: Mutex<BTreeMap<String, FileEntry>>,
}

/// What an artifact is, except for its files: those the [`Attempt`] knows.
#[derive(Clone, Debug, PartialEq)]
pub struct Draft {
    /// What kind of artifact this is.
    pub kind: ArtifactKind,
    /// Id of the run.
    pub run_id: String,
    /// What it was made from, each with the digest that was read.
    pub inputs: Vec<Input>,
    /// The stage's configuration, as it was handed in.
    pub config: serde_json::Value,
    /// Figures of the result by name.
    pub metrics: BTreeMap<String, f64>,
    /// The gates and how they were passed.
    pub gates: Vec<GateResult>,
    /// Facts a user should know about its origin.
    pub facts: BTreeMap<String, String>,
}

impl Draft {
    fn with(self, files: Vec<FileEntry>) -> Content {
        let Self {
            kind,
            run_id,
            inputs,
            config,
            metrics,
            gates,
            facts,
        } = self;
        Content {
            kind,
            run_id,
            inputs,
            config,
            files,
            metrics,
            gates,
            facts,
        }
    }
}

/// The steps of a publication, in their order; a test stops after each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    FilesChecked,
    ContentSynced,
    ManifestWritten,
    ManifestLinked,
    RunSynced,
}

impl RunFolder {
    /// The run's folder at `uri`; nothing is read or written yet.
    pub fn new(uri: &Uri, volumes: &Path) -> Self {
        Self {
            path: uri.local_path(volumes),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The manifest, if the run has published; its version and digest are verified.
    pub fn published(&self) -> Result<Option<Manifest>> {
        read_manifest(&self.path)
    }

    /// Ids of the attempts that left a folder, sorted.
    pub fn attempts(&self) -> Result<Vec<String>> {
        let path = self.path.join(ATTEMPTS);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(ArtifactError::reading(&path, error)),
        };
        let mut ids = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| ArtifactError::reading(&path, error))?;
            ids.extend(entry.file_name().into_string().ok().filter(|_| entry.path().is_dir()));
        }
        ids.sort();
        Ok(ids)
    }

    /// Folder of the attempt `id`, which may not be there.
    pub fn attempt_dir(&self, id: &str) -> PathBuf {
        self.path.join(ATTEMPTS).join(id)
    }

    /// Starts the attempt `id`: makes its folder, and removes what crashed attempts left half-written.
    pub fn attempt(&self, id: &str) -> Result<Attempt> {
        check_name(id, false)?;
        let content = self.attempt_dir(id).join(CONTENT);
        let published = self.published()?.map(|manifest| manifest.publication.content_path);
        if published == Some(content_path(id)) {
            return Err(ArtifactError::Name {
                path: id.into(),
                detail: "the attempt of this id has published, which stands",
            });
        }
        fs::create_dir_all(&content).map_err(|error| ArtifactError::writing(&content, error))?;
        for other in self.attempts()? {
            let content = self.attempt_dir(&other).join(CONTENT);
            for (name, path) in if content.is_dir() { walk(&content)? } else { Vec::new() } {
                if name.ends_with(PARTIAL_SUFFIX) {
                    tracing::info!(path = %path.display(), "removing a half-written file");
                    fs::remove_file(&path).map_err(|error| ArtifactError::writing(&path, error))?;
                }
            }
        }
        Ok(Attempt {
            run: self.path.clone(),
            id: id.into(),
            files: Mutex::default(),
        })
    }
}

impl Attempt {
    /// The attempt's own folder, for what is not part of the artifact, such as checkpoints.
    pub fn dir(&self) -> PathBuf {
        self.run.join(ATTEMPTS).join(&self.id)
    }

    /// The folder of the artifact's files.
    pub fn content_dir(&self) -> PathBuf {
        self.dir().join(CONTENT)
    }

    /// Starts the artifact's file at `relative`, a slash-separated path. It appears when the writer is finished.
    pub fn file(&self, relative: &str) -> Result<FileWriter<'_>> {
        let path = self.place(relative)?;
        let mut partial = path.clone().into_os_string();
        partial.push(PARTIAL_SUFFIX);
        let partial = PathBuf::from(partial);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&partial)
            .map_err(|error| ArtifactError::writing(&partial, error))?;
        let writer = BufWriter::with_capacity(256 * 1024, HashingWriter::new(file));
        Ok(FileWriter {
            attempt: self,
            relative: relative.into(),
            path,
            partial,
            writer: Some(writer),
        })
    }

    /// Writes `bytes` as the artifact's file at `relative`.
    pub fn write(&self, relative: &str, bytes: &[u8]) -> Result<FileEntry> {
        let mut file = self.file(relative)?;
        file.write_all(bytes)
            .map_err(|error| ArtifactError::writing(&file.path, error))?;
        file.finish()
    }

    /// Where a library that opens its own files may write the artifact's file `relative`; [`Attempt::adopt`] it then.
    pub fn place(&self, relative: &str) -> Result<PathBuf> {
        check_name(relative, true)?;
        let path = self.content_dir().join(relative);
        let folder = path.parent().expect("a joined path has a parent");
        fs::create_dir_all(folder).map_err(|error| ArtifactError::writing(folder, error))?;
        Ok(path)
    }

    /// Makes the file that someone else wrote at `relative` part of the artifact: hashed and synced.
    pub fn adopt(&self, relative: &str) -> Result<FileEntry> {
        let path = self.place(relative)?;
        let (bytes, sha256) = hash_file(&path)?;
        sync(&path)?;
        Ok(self.register(FileEntry {
            path: relative.into(),
            bytes,
            sha256,
        }))
    }

    /// Makes every file in the content folder part of the artifact; returns how many there are. A link becomes the file that it
    /// leads to, as what it leads to may not last.
    pub fn adopt_all(&self) -> Result<usize> {
        let files = walk(&self.content_dir())?;
        for (name, path) in &files {
            let writing = |error: io::Error| ArtifactError::writing(path, error);
            if fs::symlink_metadata(path).map_err(writing)?.is_symlink() {
                let mut partial = path.clone().into_os_string();
                partial.push(PARTIAL_SUFFIX);
                fs::copy(path, &partial).map_err(writing)?;
                fs::rename(&partial, path).map_err(writing)?;
            }
            self.adopt(name)?;
        }
        Ok(files.len())
    }

    /// Removes what is in the content folder: an attempt that is started a second time begins with an empty one.
    pub fn clear(&self) -> Result<()> {
        let content = self.content_dir();
        fs::remove_dir_all(&content)
            .and_then(|()| fs::create_dir(&content))
            .map_err(|error| ArtifactError::writing(&content, error))
    }

    /// Publishes the finished files with `draft` as the run's artifact; `number` counts the run's attempts from 1.
    ///
    /// If another attempt was faster, its manifest is returned and stands.
    pub fn publish(self, draft: Draft, resource: Resource, number: u32) -> Result<Manifest> {
        self.publish_stepwise(draft, resource, number, &mut |_| Ok(()))
    }

    fn publish_stepwise(
        self,
        draft: Draft,
        resource: Resource,
        number: u32,
        after: &mut dyn FnMut(Step) -> Result<()>,
    ) -> Result<Manifest> {
        check_figures(&draft.metrics)?;
        // The winner may have removed this attempt's files.
        if let Some(manifest) = read_manifest(&self.run)? {
            tracing::info!("another attempt published this run first; its result stands");
            return Ok(manifest);
        }
        let content_dir = self.content_dir();
        let files = std::mem::take(&mut *self.files.lock().unwrap_or_else(PoisonError::into_inner));
        for (name, path) in walk(&content_dir)? {
            if !files.contains_key(&name) {
                fs::remove_file(&path).map_err(|error| ArtifactError::writing(&path, error))?;
            }
        }
        for entry in files.values() {
            let path = content_dir.join(&entry.path);
            let found = fs::metadata(&path)
                .map_err(|error| ArtifactError::reading(&path, error))?
                .len();
            if found != entry.bytes {
                let detail = format!("it had {} bytes when it was finished and has {found} now", entry.bytes);
                return Err(ArtifactError::Corrupt { path, detail });
            }
        }
        after(Step::FilesChecked)?;

        // A renamed file survives a crash only when its folder, and that folder's name in its parent, are synced too.
        let mut folders: Vec<PathBuf> = files
            .keys()
            .flat_map(|name| Path::new(name).ancestors().skip(1))
            .map(|folder| content_dir.join(folder))
            .chain([self.dir(), self.run.join(ATTEMPTS), self.run.clone()])
            .collect();
        folders.sort();
        folders.dedup();
        folders.iter().try_for_each(|folder| sync(folder))?;
        after(Step::ContentSynced)?;

        let content = settle(draft.with(files.into_values().collect()));
        let manifest = Manifest {
            contract_version: CONTRACT_VERSION,
            digest: content.digest(),
            content,
            publication: Publication {
                resource,
                attempt: number,
                content_path: content_path(&self.id),
                time: rfc3339(SystemTime::now()),
                code_version: env!("CARGO_PKG_VERSION").into(),
            },
        };
        let partial = self.dir().join(format!("{MANIFEST_FILE}{PARTIAL_SUFFIX}"));
        let text = serde_json::to_vec_pretty(&manifest).expect("a manifest serializes to JSON");
        fs::write(&partial, text).map_err(|error| ArtifactError::writing(&partial, error))?;
        sync(&partial)?;
        after(Step::ManifestWritten)?;

        let target = self.run.join(MANIFEST_FILE);
        let won = link_new(&partial, &target)?;
        after(Step::ManifestLinked)?;

        sync(&self.run)?;
        after(Step::RunSynced)?;
        match fs::remove_file(&partial) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, path = %partial.display(), "cannot remove a temporary file");
            }
            _ => {}
        }
        if won {
            self.remove_other_content();
            return Ok(manifest);
        }
        tracing::info!("another attempt published this run first; its result stands");
        read_manifest(&self.run)?.ok_or(ArtifactError::NotFound {
            path: target,
            detail: "it was there a moment ago".into(),
        })
    }

    /// Removes what attempts of this run that were killed would have published. (One that failed its gates is of another
    /// run: gates are part of the configuration.) An attempt that still lives finds its files gone, fails or finds this
    /// publication, and publishes nothing.
    fn remove_other_content(&self) {
        let folder = RunFolder { path: self.run.clone() };
        for other in folder.attempts().unwrap_or_default() {
            let content = folder.attempt_dir(&other).join(CONTENT);
            if other == self.id || !content.exists() {
                continue;
            }
            if let Err(error) = fs::remove_dir_all(&content) {
                tracing::warn!(%error, path = %content.display(), "cannot remove what another attempt left");
            }
        }
    }

    fn register(&self, entry: FileEntry) -> FileEntry {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.insert(entry.path.clone(), entry.clone());
        entry
    }
}

/// The manifest in the run's folder `run`, if there is one, verified in version and digest.
pub(crate) fn read_manifest(run: &Path) -> Result<Option<Manifest>> {
    let path = run.join(MANIFEST_FILE);
    let reading = |error: io::Error| ArtifactError::reading(&path, error);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(reading(error)),
    };
    let mut text = Vec::new();
    file.take(MANIFEST_LIMIT_BYTES)
        .read_to_end(&mut text)
        .map_err(reading)?;
    let corrupt = |detail: String| ArtifactError::Corrupt {
        path: path.clone(),
        detail,
    };
    let json: serde_json::Value = serde_json::from_slice(&text).map_err(|error| corrupt(error.to_string()))?;
    // The version is judged before the shape, which a newer version may have changed.
    match json.get("contractVersion").and_then(serde_json::Value::as_u64) {
        Some(version) if version > u64::from(CONTRACT_VERSION) => {
            return Err(ArtifactError::Newer {
                path,
                version: u32::try_from(version).unwrap_or(u32::MAX),
            });
        }
        Some(_) => {}
        None => return Err(corrupt("it has no contractVersion".into())),
    }
    let manifest: Manifest = serde_json::from_value(json).map_err(|error| corrupt(error.to_string()))?;
    let digest = manifest.content.digest();
    if digest != manifest.digest {
        return Err(corrupt(format!(
            "it says digest {}, its content has {digest}",
            manifest.digest
        )));
    }
    let names = manifest
        .content
        .files
        .iter()
        .map(|file| &file.path)
        .chain([&manifest.publication.content_path]);
    for name in names {
        check_name(name, true).map_err(|error| corrupt(error.to_string()))?;
    }
    Ok(Some(manifest))
}

/// Gives `from` the name `to` unless that is taken; false if it was.
fn link_new(from: &Path, to: &Path) -> Result<bool> {
    match fs::hard_link(from, to) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        // SMB shares such as Azure Files, blobfuse and NFS to Azure Blob have no hard links. There the rename is as atomic,
        // but of two attempts that end in the same instant the later one wins; the operator runs one attempt at a time.
        Err(error) if error.raw_os_error().is_some_and(means_no_links) => {
            if to.exists() {
                return Ok(false);
            }
            fs::rename(from, to).map_err(|error| ArtifactError::writing(to, error))?;
            Ok(true)
        }
        Err(error) => Err(ArtifactError::writing(to, error)),
    }
}

/// Whether the file system has no hard links.
fn means_no_links(errno: i32) -> bool {
    /// The kernel's own `ENOTSUPP`, which NFS hands on where a server knows no LINK; no C library has a name for it.
    const NOT_SUPPORTED_BY_SERVER: i32 = 524;
    matches!(
        errno,
        libc::EPERM | libc::EOPNOTSUPP | libc::ENOSYS | libc::EMLINK | NOT_SUPPORTED_BY_SERVER
    )
}

fn content_path(id: &str) -> String {
    format!("{ATTEMPTS}/{id}/{CONTENT}")
}

fn sync(path: &Path) -> Result<()> {
    let file = File::open(path).map_err(|error| ArtifactError::reading(path, error))?;
    file.sync_all().map_err(|error| ArtifactError::writing(path, error))
}

fn check_name(name: &str, folders: bool) -> Result<()> {
    let wrong = |detail| {
        Err(ArtifactError::Name {
            path: name.into(),
            detail,
        })
    };
    if name.split('/').any(|part| matches!(part, "" | "." | "..")) || name.contains(['\\', '\0']) {
        return wrong("it must be a relative path of plain components");
    }
    if !folders && name.contains('/') {
        return wrong("it must be one component");
    }
    if name.ends_with(PARTIAL_SUFFIX) {
        return wrong("its suffix is that of unfinished files");
    }
    Ok(())
}

/// `time` in RFC 3339, UTC, to the second.
fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days to a date, after Howard Hinnant's civil_from_days; eras of 400 years start on 1 March.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

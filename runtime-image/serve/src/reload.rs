//! Values that stand in files which change while the server runs: keys and certificates of mounted Secrets.
//!
//! The files are polled: a kubelet swaps the link of a mounted folder, which no watch on a file sees.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::Duration;

use tokio::fs::File;
use tokio::io::AsyncReadExt;

use crate::error::ServeError;

/// How often the files are read. A kubelet itself takes up to a minute.
const POLL: Duration = Duration::from_secs(1);
/// The largest file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Makes the value from the files' contents, or says what is wrong with them. Nothing of a content may be in that sentence.
type Parse<T> = Box<dyn Fn(&[Vec<u8>]) -> Result<T, String> + Send>;

/// The newest value that the files held.
#[derive(Debug)]
pub(crate) struct Reloaded<T>(RwLock<Arc<T>>);

impl<T: Send + Sync + 'static> Reloaded<T> {
    /// Reads the files now, and again as long as the value is used by anybody.
    pub(crate) async fn start(
        paths: Vec<PathBuf>,
        parse: impl Fn(&[Vec<u8>]) -> Result<T, String> + Send + 'static,
    ) -> Result<Arc<Self>, ServeError> {
        let contents = read(&paths).await.map_err(ServeError::Arguments)?;
        let value = parse(&contents).map_err(|error| ServeError::Arguments(format!("{}: {error}", names(&paths))))?;
        let reloaded = Arc::new(Reloaded(RwLock::new(Arc::new(value))));
        tokio::spawn(follow(Arc::downgrade(&reloaded), paths, contents, Box::new(parse)));
        Ok(reloaded)
    }

    /// The value of now.
    pub(crate) fn get(&self) -> Arc<T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Replaces the value whenever the files hold another one. One that cannot be used leaves the last good one in place.
async fn follow<T>(reloaded: Weak<Reloaded<T>>, paths: Vec<PathBuf>, mut last: Vec<Vec<u8>>, parse: Parse<T>) {
    let mut said = String::new();
    loop {
        tokio::time::sleep(POLL).await;
        let Some(reloaded) = reloaded.upgrade() else {
            return;
        };
        let problem = match read(&paths).await {
            Ok(contents) if contents == last => continue,
            Ok(contents) => {
                let parsed = parse(&contents);
                last = contents;
                match parsed {
                    Ok(value) => {
                        *reloaded.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(value);
                        said.clear();
                        tracing::info!(files = names(&paths), "read again");
                        continue;
                    }
                    Err(problem) => problem,
                }
            }
            Err(problem) => problem,
        };
        // Once, not every second.
        if problem != said {
            tracing::warn!(
                files = names(&paths),
                problem,
                "cannot be used; what was read before holds"
            );
            said = problem;
        }
    }
}

async fn read(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>, String> {
    let mut contents = Vec::with_capacity(paths.len());
    for path in paths {
        contents.push(
            one(path)
                .await
                .map_err(|error| format!("cannot read {}: {error}", path.display()))?,
        );
    }
    Ok(contents)
}

async fn one(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)
        .await?
        .take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .await?;
    match bytes.len() as u64 > MAX_FILE_BYTES {
        true => Err(std::io::Error::other(format!(
            "it is larger than {MAX_FILE_BYTES} bytes"
        ))),
        false => Ok(bytes),
    }
}

fn names(paths: &[PathBuf]) -> String {
    let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    names.join(", ")
}

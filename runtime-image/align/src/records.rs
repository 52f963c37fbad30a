//! Records of a published data set, from Parquet. Errors name the file and the row, never what is written there.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use strata_artifact::{ArtifactError, Opened};
use strata_stage::StageError;

/// Which records of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Split {
    /// Those to train on.
    Train,
    /// Those that are held out.
    HeldOut,
}

impl Split {
    /// Its name in the data set's files.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::HeldOut => "test",
        }
    }
}

/// One turn of a conversation.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) role: String,
    pub(crate) content: String,
}

/// A conversation with a preferred and another last part. Has no `Debug`: its text must not reach a log.
pub(crate) struct Preference {
    pub(crate) prompt: Vec<Message>,
    pub(crate) chosen: Vec<Message>,
    pub(crate) rejected: Vec<Message>,
}

/// Calls `visit` with each row of `split`, in order; `visit` ends the reading by answering false.
pub(crate) fn for_each_row(
    dataset: &Opened,
    split: Split,
    mut visit: impl FnMut(Record) -> Result<bool, StageError>,
) -> Result<(), StageError> {
    for path in files(dataset, split)? {
        let corrupt = |detail: String| ArtifactError::Corrupt {
            path: path.clone(),
            detail,
        };
        let file = File::open(&path).map_err(|error| ArtifactError::reading(&path, error))?;
        let reader = SerializedFileReader::new(file).map_err(|error| corrupt(error.to_string()))?;
        let rows = reader.get_row_iter(None).map_err(|error| corrupt(error.to_string()))?;
        for (number, row) in rows.enumerate() {
            let row = row.map_err(|error| corrupt(format!("row {number}: {error}")))?;
            if !visit(Record {
                path: &path,
                number,
                row,
            })? {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The Parquet files of `split`, sorted.
fn files(dataset: &Opened, split: Split) -> Result<Vec<PathBuf>, StageError> {
    let prefix = format!("data/{}-", split.name());
    let mut names: Vec<String> = match dataset.manifest() {
        Some(manifest) => manifest.content.files.iter().map(|file| file.path.clone()).collect(),
        None => {
            let folder = dataset.path().join("data");
            let entries = fs::read_dir(&folder).map_err(|error| ArtifactError::reading(&folder, error))?;
            entries
                .flatten()
                .filter_map(|entry| Some(format!("data/{}", entry.file_name().to_str()?)))
                .collect()
        }
    };
    names.retain(|name| name.starts_with(&prefix) && name.ends_with(".parquet"));
    names.sort();
    if names.is_empty() {
        let detail = format!("the data set has no files {prefix}*.parquet");
        return Err(ArtifactError::NotFound {
            path: dataset.path().join("data"),
            detail,
        }
        .into());
    }
    names.iter().map(|name| Ok(dataset.file(name)?)).collect()
}

/// One row of a file.
pub(crate) struct Record<'a> {
    path: &'a Path,
    number: usize,
    row: Row,
}

impl Record<'_> {
    fn field(&self, column: &str) -> Result<&Field, StageError> {
        let found = self.row.get_column_iter().find(|(name, _)| *name == column);
        found
            .map(|(_, field)| field)
            .ok_or_else(|| self.corrupt(&format!("there is no column {column}")))
    }

    fn corrupt(&self, detail: &str) -> StageError {
        let detail = format!("row {}: {detail}", self.number);
        ArtifactError::Corrupt {
            path: self.path.to_owned(),
            detail,
        }
        .into()
    }

    /// The column `text` of a document.
    pub(crate) fn text(&self) -> Result<&str, StageError> {
        match self.field("text")? {
            Field::Str(text) => Ok(text),
            _ => Err(self.corrupt("column text is not text")),
        }
    }

    /// The columns of a preference.
    pub(crate) fn preference(&self) -> Result<Preference, StageError> {
        Ok(Preference {
            prompt: self.messages("prompt")?,
            chosen: self.messages("chosen")?,
            rejected: self.messages("rejected")?,
        })
    }

    fn messages(&self, column: &str) -> Result<Vec<Message>, StageError> {
        let wrong = || {
            self.corrupt(&format!(
                "column {column} is not a list of messages with role and content"
            ))
        };
        let Field::ListInternal(list) = self.field(column)? else {
            return Err(wrong());
        };
        let message = |field: &Field| -> Option<Message> {
            let Field::Group(row) = field else { return None };
            let text = |name: &str| {
                row.get_column_iter().find_map(|(found, field)| match field {
                    Field::Str(text) if found == name => Some(text.clone()),
                    _ => None,
                })
            };
            Some(Message {
                role: text("role")?,
                content: text("content")?,
            })
        };
        list.elements()
            .iter()
            .map(|field| message(field).ok_or_else(wrong))
            .collect()
    }
}

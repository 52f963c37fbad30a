//! Records as Parquet in the layout of Hugging Face's `datasets`.

use std::io::Write;
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType, DoubleType};
use parquet::errors::Result;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use serde_json::{Value, json};
use strata_contract::Task;

use crate::record::{Body, Message, Record};

/// Rows of a row group, and bytes of text, whichever is reached first.
const GROUP_ROWS: usize = 1000;
const GROUP_BYTES: u64 = 32 * 1024 * 1024;

/// Columns of a table: their Parquet type and `datasets` feature.
fn columns(task: Task) -> &'static [(&'static str, ColumnKind)] {
    use ColumnKind::{Messages, Score, Text};
    match task {
        Task::Pretraining => &[
            ("id", Text),
            ("text", Text),
            ("source", Text),
            ("origin", Text),
            ("language", Text),
            ("language_score", Score),
        ],
        Task::Preference => &[
            ("id", Text),
            ("prompt", Messages),
            ("chosen", Messages),
            ("rejected", Messages),
            ("source", Text),
            ("origin", Text),
        ],
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ColumnKind {
    Text,
    Score,
    Messages,
}

/// Features of a table, as `datasets` keeps them.
pub(super) fn features(task: Task) -> Value {
    let value = |dtype: &str| json!({"dtype": dtype, "_type": "Value"});
    let feature = |kind: ColumnKind| match kind {
        ColumnKind::Text => value("string"),
        ColumnKind::Score => value("float64"),
        ColumnKind::Messages => json!([{"role": value("string"), "content": value("string")}]),
    };
    columns(task)
        .iter()
        .map(|(name, kind)| ((*name).to_owned(), feature(*kind)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn schema(task: Task) -> String {
    let columns = columns(task).iter().map(|(name, kind)| match kind {
        ColumnKind::Text => format!("REQUIRED BYTE_ARRAY {name} (UTF8);"),
        ColumnKind::Score => format!("REQUIRED DOUBLE {name};"),
        ColumnKind::Messages => format!(
            "REQUIRED GROUP {name} (LIST) {{ REPEATED GROUP list {{ REQUIRED GROUP element {{ REQUIRED BYTE_ARRAY role \
             (UTF8); REQUIRED BYTE_ARRAY content (UTF8); }} }} }}"
        ),
    });
    format!("message records {{ {} }}", columns.collect::<Vec<_>>().join(" "))
}

/// Writes records to a Parquet file; holds one row group in memory.
pub(crate) struct RecordWriter<W: Write + Send> {
    task: Task,
    file: SerializedFileWriter<W>,
    rows: Vec<Record>,
    bytes: u64,
}

impl<W: Write + Send> RecordWriter<W> {
    pub(crate) fn new(task: Task, out: W) -> Result<Self> {
        let info = json!({"info": {"features": features(task)}}).to_string();
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .set_key_value_metadata(Some(vec![KeyValue::new("huggingface".into(), info)]))
            .set_created_by(concat!("strata ", env!("CARGO_PKG_VERSION")).into())
            .build();
        let schema = Arc::new(parse_message_type(&schema(task))?);
        Ok(Self {
            task,
            file: SerializedFileWriter::new(out, schema, Arc::new(properties))?,
            rows: Vec::new(),
            bytes: 0,
        })
    }

    pub(crate) fn push(&mut self, record: Record) -> Result<()> {
        self.bytes += record.body.bytes();
        self.rows.push(record);
        if self.rows.len() >= GROUP_ROWS || self.bytes >= GROUP_BYTES {
            self.write_group()?;
        }
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Result<W> {
        if !self.rows.is_empty() {
            self.write_group()?;
        }
        self.file.into_inner()
    }

    fn write_group(&mut self) -> Result<()> {
        let rows = std::mem::take(&mut self.rows);
        self.bytes = 0;
        let mut group = self.file.next_row_group()?;
        for (name, kind) in columns(self.task) {
            match kind {
                ColumnKind::Text => write_texts(&mut group, rows.iter().map(|row| text(row, name)), None)?,
                ColumnKind::Score => {
                    let values: Vec<f64> = rows.iter().map(|row| row.language_score).collect();
                    let mut column = group.next_column()?.expect("the schema has this column");
                    column.typed::<DoubleType>().write_batch(&values, None, None)?;
                    column.close()?;
                }
                ColumnKind::Messages => {
                    let lists: Vec<Vec<Message>> = rows.iter().map(|row| messages(row, name)).collect();
                    let levels = list_levels(&lists);
                    let of = |field: for<'m> fn(&'m Message) -> &'m str| lists.iter().flatten().map(field);
                    write_texts(&mut group, of(|message| &message.role), Some(&levels))?;
                    write_texts(&mut group, of(|message| &message.content), Some(&levels))?;
                }
            }
        }
        group.close()?;
        Ok(())
    }
}

/// Definition and repetition levels of a column of lists.
type Levels = (Vec<i16>, Vec<i16>);

/// An empty list is there (definition 0) without an element; each other element repeats (1) the list of the first (0).
fn list_levels(lists: &[Vec<Message>]) -> Levels {
    let mut levels = (Vec::new(), Vec::new());
    for list in lists {
        for at in 0..list.len().max(1) {
            levels.0.push(i16::from(!list.is_empty()));
            levels.1.push(i16::from(at > 0));
        }
    }
    levels
}

fn write_texts<'t, W: Write + Send>(
    group: &mut SerializedRowGroupWriter<'_, W>,
    texts: impl Iterator<Item = &'t str>,
    levels: Option<&Levels>,
) -> Result<()> {
    let values: Vec<ByteArray> = texts.map(ByteArray::from).collect();
    let mut column = group.next_column()?.expect("the schema has this column");
    let (definition, repetition) = levels.map(|(d, r)| (d.as_slice(), r.as_slice())).unzip();
    column
        .typed::<ByteArrayType>()
        .write_batch(&values, definition, repetition)?;
    column.close()
}

fn text<'r>(record: &'r Record, column: &str) -> &'r str {
    match (column, &record.body) {
        ("id", _) => &record.id,
        ("source", _) => &record.source,
        ("origin", _) => &record.origin,
        ("language", _) => &record.language,
        (_, Body::Text(text)) => text,
        (_, Body::Pair(_)) => unreachable!("a pair has no other column of text"),
    }
}

fn messages(record: &Record, column: &str) -> Vec<Message> {
    let Body::Pair(pair) = &record.body else {
        unreachable!("only pairs are written as messages")
    };
    let answer = |content: &String| {
        vec![Message {
            role: "assistant".into(),
            content: content.clone(),
        }]
    };
    match column {
        "prompt" => pair.prompt.clone(),
        "chosen" => answer(&pair.chosen),
        _ => answer(&pair.rejected),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Pair;
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::{ListAccessor, RowAccessor};

    fn record(id: usize, body: Body) -> Record {
        let (source, origin) = ("s".into(), format!("o{id}"));
        Record {
            id: id.to_string(),
            source,
            origin,
            language: "en".into(),
            language_score: 0.5,
            body,
        }
    }

    fn write(task: Task, records: Vec<Record>) -> SerializedFileReader<std::fs::File> {
        let file = tempfile::tempfile().unwrap();
        let mut writer = RecordWriter::new(task, file.try_clone().unwrap()).unwrap();
        records.into_iter().for_each(|record| writer.push(record).unwrap());
        writer.finish().unwrap();
        SerializedFileReader::new(file).unwrap()
    }

    #[test]
    fn documents_read_back_over_several_row_groups_with_their_features() {
        let records = (0..2500)
            .map(|id| record(id, Body::Text(format!("text é {id}"))))
            .collect();
        let reader = write(Task::Pretraining, records);
        assert_eq!(reader.num_row_groups(), 3);
        let rows: Vec<_> = reader.get_row_iter(None).unwrap().map(|row| row.unwrap()).collect();
        assert_eq!(rows.len(), 2500);
        assert_eq!(rows[1234].get_string(1).unwrap(), "text é 1234");
        assert_eq!(rows[1234].get_double(5).unwrap(), 0.5);
        let metadata = reader.metadata().file_metadata().key_value_metadata().unwrap();
        let info: Value = serde_json::from_str(metadata[0].value.as_ref().unwrap()).unwrap();
        assert_eq!(metadata[0].key, "huggingface");
        assert_eq!(
            info["info"]["features"]["text"],
            json!({"dtype": "string", "_type": "Value"})
        );
    }

    #[test]
    fn pairs_read_back_with_their_turns() {
        let pair = |turns: usize| {
            let prompt = (0..turns)
                .map(|turn| Message {
                    role: "user".into(),
                    content: format!("q{turn}"),
                })
                .collect();
            Body::Pair(Pair {
                prompt,
                chosen: "good".into(),
                rejected: "bad".into(),
            })
        };
        let reader = write(
            Task::Preference,
            [2, 0, 3]
                .into_iter()
                .enumerate()
                .map(|(id, n)| record(id, pair(n)))
                .collect(),
        );
        let rows: Vec<_> = reader.get_row_iter(None).unwrap().map(|row| row.unwrap()).collect();
        let turns = |row: usize, column: usize| {
            let list = rows[row].get_list(column).unwrap();
            let turn = |at: usize| {
                let turn = list.get_group(at).unwrap();
                format!("{}: {}", turn.get_string(0).unwrap(), turn.get_string(1).unwrap())
            };
            (0..list.len()).map(turn).collect::<Vec<_>>()
        };
        assert_eq!(turns(2, 1), ["user: q0", "user: q1", "user: q2"]);
        assert_eq!(turns(1, 1), [""; 0]);
        assert_eq!(turns(0, 2), ["assistant: good"]);
        assert_eq!(turns(1, 3), ["assistant: bad"]);
    }
}

//! What a data set is published as.

mod card;
mod parquet;

pub(crate) use card::write as card;
pub(crate) use parquet::RecordWriter;

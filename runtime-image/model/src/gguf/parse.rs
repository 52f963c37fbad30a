//! The container: header, metadata, tensor directory. Every length is checked against the file before it is used, and
//! nothing is allocated in proportion to a number that the file merely claims.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::{ALIGNMENT, DTYPES, MAGIC, OTHER_DTYPES};
use crate::dtype::Dtype;
use crate::error::{ModelError, Result};
use crate::weights::Mapped;

/// The most dimensions of a tensor.
const MAX_DIMENSIONS: u32 = 4;
/// The deepest nesting of arrays; real files have one level.
const MAX_DEPTH: u32 = 4;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// Any float.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// A list, left in the file.
    Array(Array),
}

/// A metadata list: element type (GGUF's number), count, and where the elements stand in the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    kind: u32,
    len: usize,
    bytes: Range<usize>,
}

/// A tensor's entry in the directory.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Sizes, the slowest first (GGUF writes the fastest first).
    pub shape: Vec<usize>,
    /// GGUF's number of the element type: a file may hold tensors that nobody asks for, in types that this engine lacks.
    kind: u32,
    /// Where the elements stand in the file; empty for a type whose size is unknown here.
    bytes: Range<usize>,
}

impl TensorInfo {
    /// How the elements are stored; if this engine does not read that, what it is and what would be read.
    pub fn dtype(&self) -> std::result::Result<Dtype, String> {
        dtype(self.kind).ok_or_else(|| {
            let name = OTHER_DTYPES.iter().find(|(number, _)| *number == self.kind);
            let name = name.map_or_else(|| format!("number {}", self.kind), |(_, name)| (*name).to_owned());
            let known = DTYPES.map(|(_, dtype)| dtype.name()).join(", ");
            format!("element type {name} is not supported; {known} are: use a file in one of them")
        })
    }
}

fn dtype(kind: u32) -> Option<Dtype> {
    let found = DTYPES.iter().find(|(number, _)| *number == kind);
    found.map(|(_, dtype)| *dtype)
}

/// An opened GGUF file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    file: Mapped,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, TensorInfo>,
}

impl Gguf {
    /// Maps and checks the file at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Mapped::open(path)?;
        if let Some(version) = other_version(file.bytes()) {
            let what = format!(
                "GGUF version {version} is not supported (2 and 3 are), and big-endian files are not: write it anew with \
                 today's llama.cpp"
            );
            return Err(ModelError::unsupported(path, what));
        }
        let (metadata, tensors) = parse(file.bytes()).map_err(|what| ModelError::malformed(path, what))?;
        Ok(Gguf {
            path: path.to_owned(),
            file,
            metadata,
            tensors,
        })
    }

    /// Gives back the pages that were read.
    pub(super) fn release(&self) {
        self.file.release();
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A metadata value.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A text value.
    pub fn string(&self, key: &str) -> Option<&str> {
        match self.get(key) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.get(key) {
            Some(Value::Bool(value)) => Some(*value),
            _ => None,
        }
    }

    /// A non-negative integer value.
    pub fn unsigned(&self, key: &str) -> Option<u64> {
        match self.get(key) {
            Some(Value::Unsigned(value)) => Some(*value),
            Some(Value::Signed(value)) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// A number.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.get(key) {
            Some(Value::Float(value)) => Some(*value),
            _ => None,
        }
    }

    /// A list of texts.
    pub fn strings(&self, key: &str) -> Option<Vec<&str>> {
        let Some(Value::Array(array)) = self.get(key) else {
            return None;
        };
        if array.kind != 8 {
            return None;
        }
        let mut cursor = Cursor {
            bytes: self.file.range(&array.bytes),
            at: 0,
        };
        (0..array.len).map(|_| cursor.text().ok()).collect()
    }

    /// A list of integers.
    pub fn integers(&self, key: &str) -> Option<Vec<i64>> {
        let Some(Value::Array(array)) = self.get(key) else {
            return None;
        };
        let mut cursor = Cursor {
            bytes: self.file.range(&array.bytes),
            at: 0,
        };
        let mut out = Vec::with_capacity(array.len);
        for _ in 0..array.len {
            match cursor.value(array.kind, 0).ok()? {
                Value::Unsigned(value) => out.push(i64::try_from(value).ok()?),
                Value::Signed(value) => out.push(value),
                _ => return None,
            }
        }
        Some(out)
    }

    /// A list of floats.
    pub fn floats(&self, key: &str) -> Option<Vec<f64>> {
        let Some(Value::Array(array)) = self.get(key) else {
            return None;
        };
        let mut cursor = Cursor {
            bytes: self.file.range(&array.bytes),
            at: 0,
        };
        let one = |cursor: &mut Cursor<'_>| match cursor.value(array.kind, 0).ok()? {
            Value::Float(value) => Some(value),
            _ => None,
        };
        (0..array.len).map(|_| one(&mut cursor)).collect()
    }

    /// A tensor's entry.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// A tensor's bytes as they stand in the file.
    pub fn tensor_bytes(&self, info: &TensorInfo) -> &[u8] {
        self.file.range(&info.bytes)
    }
}

/// The version of a GGUF file that is none of those read here. In a big-endian file it looks huge.
fn other_version(bytes: &[u8]) -> Option<u32> {
    let mut cursor = Cursor { bytes, at: 0 };
    let magic = cursor.take(4).ok()?;
    let version = cursor.u32().ok()?;
    (magic == MAGIC && !(2..=3).contains(&version)).then_some(version)
}

type Parsed<T> = std::result::Result<T, String>;

fn parse(bytes: &[u8]) -> Parsed<(HashMap<String, Value>, HashMap<String, TensorInfo>)> {
    let mut cursor = Cursor { bytes, at: 0 };
    if cursor.take(4)? != MAGIC {
        return Err("this is no GGUF file (it does not begin with \"GGUF\")".to_owned());
    }
    cursor.u32()?; // The version, of which `open` has judged.
    let tensor_count = cursor.count(8 + 4 + 4 + 8, "tensors")?;
    let value_count = cursor.count(8 + 4 + 1, "metadata values")?;

    let mut metadata = HashMap::new();
    for _ in 0..value_count {
        let key = cursor.text()?.to_owned();
        let kind = cursor.u32()?;
        let value = cursor
            .value(kind, 0)
            .map_err(|what| format!("metadata {key:?}: {what}"))?;
        metadata.insert(key, value);
    }
    let alignment = match metadata.get("general.alignment") {
        None => ALIGNMENT,
        Some(Value::Unsigned(value)) if value.is_power_of_two() && *value <= 1 << 16 => *value as usize,
        Some(other) => {
            return Err(format!(
                "general.alignment is {other:?}; a power of two up to 65536 is needed"
            ));
        }
    };

    let mut entries = Vec::new();
    for _ in 0..tensor_count {
        let name = cursor.text()?.to_owned();
        let dimensions = cursor.u32()?;
        if dimensions == 0 || dimensions > MAX_DIMENSIONS {
            return Err(format!(
                "tensor {name:?} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible"
            ));
        }
        let mut shape = Vec::with_capacity(dimensions as usize);
        for _ in 0..dimensions {
            shape.push(usize::try_from(cursor.u64()?).map_err(|_| format!("tensor {name:?} is too large"))?);
        }
        shape.reverse();
        let kind = cursor.u32()?;
        let offset = cursor.u64()?;
        entries.push((name, shape, kind, offset));
    }

    let data = cursor.at.next_multiple_of(alignment);
    let mut tensors = HashMap::with_capacity(entries.len());
    for (name, shape, kind, offset) in entries {
        let Some(dtype) = dtype(kind) else {
            // Whether anybody needs it, and whether the architecture is known at all, is judged later.
            tensors.insert(
                name,
                TensorInfo {
                    shape,
                    kind,
                    bytes: 0..0,
                },
            );
            continue;
        };
        let columns = *shape.last().expect("a tensor has at least one dimension");
        let elements = shape
            .iter()
            .try_fold(1usize, |product, size| product.checked_mul(*size));
        let size = elements
            .filter(|_| columns.is_multiple_of(dtype.block().0))
            .and_then(|elements| dtype.size_bytes(elements));
        let size =
            size.ok_or_else(|| format!("tensor {name:?}: shape {shape:?} does not fit type {}", dtype.name()))?;
        let start = usize::try_from(offset).ok().and_then(|offset| data.checked_add(offset));
        let range = start
            .and_then(|start| Some(start..start.checked_add(size)?))
            .filter(|range| range.end <= bytes.len());
        let range = range.ok_or_else(|| {
            format!(
                "tensor {name:?} ends after the end of the file ({} bytes): the file is truncated or corrupt",
                bytes.len()
            )
        })?;
        tensors.insert(
            name,
            TensorInfo {
                shape,
                kind,
                bytes: range,
            },
        );
    }
    Ok((metadata, tensors))
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Parsed<&'a [u8]> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| {
            format!(
                "the file ends at byte {}, {count} more were needed at byte {}",
                self.bytes.len(),
                self.at
            )
        })?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        Ok(self
            .take(N)?
            .try_into()
            .expect("take returns as many bytes as it was asked for"))
    }

    fn u32(&mut self) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Parsed<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things that take at least `min_bytes` each, so that it cannot exceed what the file holds.
    fn count(&mut self, min_bytes: usize, what: &str) -> Parsed<usize> {
        let count = self.u64()?;
        let most = (self.bytes.len() - self.at) / min_bytes;
        usize::try_from(count)
            .ok()
            .filter(|count| *count <= most)
            .ok_or_else(|| {
                format!(
                    "the file claims {count} {what} at byte {}, and has room for {most} at most",
                    self.at
                )
            })
    }

    fn text(&mut self) -> Parsed<&'a str> {
        let at = self.at;
        let length = self.count(1, "bytes of text")?;
        std::str::from_utf8(self.take(length)?).map_err(|_| format!("the text at byte {at} is not UTF-8"))
    }

    fn value(&mut self, kind: u32, depth: u32) -> Parsed<Value> {
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>()?[0].into()),
            1 => Value::Signed((self.array::<1>()?[0] as i8).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed((self.u32()? as i32).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::String(self.text()?.to_owned()),
            9 => {
                let kind = self.u32()?;
                let min_bytes = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    8 | 10..=12 => 8,
                    9 if depth < MAX_DEPTH => 12,
                    _ => return Err(format!("a list of element type {kind} is not possible here")),
                };
                let len = self.count(min_bytes, "list elements")?;
                let start = self.at;
                if matches!(kind, 8 | 9) {
                    for _ in 0..len {
                        match kind {
                            8 => {
                                self.text()?;
                            }
                            _ => {
                                self.value(kind, depth + 1)?;
                            }
                        }
                    }
                } else {
                    self.take(len * min_bytes)?;
                }
                Value::Array(Array {
                    kind,
                    len,
                    bytes: start..self.at,
                })
            }
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(self.u64()? as i64),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("value type {other} does not exist")),
        })
    }
}

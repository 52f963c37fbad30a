//! Weights as views of mapped files, converted to floats only when somebody asks.

use std::borrow::Cow;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use crate::config::ModelConfig;
use crate::dtype::Dtype;
use crate::error::{ModelError, Result};
use crate::family::{TensorSpec, tensors};

/// A stored tensor: type, sizes (slowest first) and bytes in HF's row order.
#[derive(Clone, Debug)]
pub struct RawTensor<'a> {
    /// How the elements are stored.
    pub dtype: Dtype,
    /// Sizes, the slowest first.
    pub shape: Vec<usize>,
    /// The elements. Borrowed from the mapped file unless the file's row order had to be undone.
    pub bytes: Cow<'a, [u8]>,
}

/// The named tensors of a model, in HF's names, shapes and row order whatever the file.
pub trait Weights: Send + Sync {
    /// The tensor's sizes, slowest first; `None` if there is no such tensor.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// The tensor as it is stored.
    fn raw(&self, name: &str) -> Result<RawTensor<'_>>;

    /// How the tensor is stored, without reading it where that can be told.
    fn dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.raw(name)?.dtype)
    }

    /// The tensor converted to floats. Who holds floats gives them out without the way through bytes.
    fn f32(&self, name: &str) -> Result<Vec<f32>> {
        let raw = self.raw(name)?;
        let mut out = vec![0.0; raw.shape.iter().product()];
        raw.dtype.to_f32(&raw.bytes, &mut out);
        Ok(out)
    }

    /// Says that the tensors will hardly be read again: memory that only holds what the files hold can go. Reading stays possible.
    fn release(&self) {}
}

/// Checks that every tensor of `config` is there with its shape. `path` is named in errors.
pub fn check_tensors(weights: &dyn Weights, config: &ModelConfig, path: &Path) -> Result<()> {
    for TensorSpec { name, shape, .. } in tensors(config) {
        match weights.shape(&name) {
            Some(found) if found == shape => {}
            Some(found) => {
                return Err(ModelError::malformed(
                    path,
                    format!("tensor {name} has shape {found:?}; the configuration needs {shape:?}"),
                ));
            }
            None => return Err(ModelError::malformed(path, format!("tensor {name} is missing"))),
        }
    }
    Ok(())
}

/// A read-only mapping of a file.
#[derive(Clone, Debug)]
pub(crate) struct Mapped(Arc<Mmap>);

impl Mapped {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| ModelError::io(path, error))?;
        if file.metadata().map_err(|error| ModelError::io(path, error))?.len() == 0 {
            return Err(ModelError::malformed(path, "the file is empty"));
        }
        // SAFETY: published artifacts are immutable and replaced by rename, never written in place; a user who truncates
        // a model file that is being served gets SIGBUS from any program that maps it.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| ModelError::io(path, error))?;
        Ok(Mapped(Arc::new(map)))
    }

    /// Gives back the pages that were read; the next read fetches them anew.
    pub(crate) fn release(&self) {
        // SAFETY: of a read-only mapping of a file, pages that are dropped come back with the same content.
        // Refused, it only costs memory.
        let _ = unsafe { self.0.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes of a range that was checked against the file's length when it was read.
    pub(crate) fn range(&self, range: &Range<usize>) -> &[u8] {
        &self.0[range.clone()]
    }
}

//! JSON of thousands of objects in little room.
//!
//! Objects of one type that are about the same kind differ in names, times and numbers. With one of them as the dictionary, LZ4
//! leaves a quarter of another or less; packing takes some microseconds, unpacking one.

use std::collections::HashMap;
use std::sync::Arc;

use lz4_flex::block::{DecompressError, compress_with_dict, decompress_with_dict};

use crate::engine::kind::ResourceKind;

/// Largest pattern in bytes: each packing reads all of it.
const PATTERN_LIMIT_BYTES: usize = 16 * 1024;

/// What objects of one type look like, by the kind of the resource that they are about.
#[derive(Debug, Default)]
pub struct Patterns(HashMap<Option<ResourceKind>, Arc<[u8]>>);

/// JSON, packed.
#[derive(Debug)]
pub struct Packed {
    bytes: Box<[u8]>,
    length: usize,
    /// It stays as long as somebody is packed by it.
    pattern: Arc<[u8]>,
}

impl Patterns {
    /// Packs the JSON of an object about a resource of this kind.
    pub fn pack(&mut self, kind: Option<ResourceKind>, json: &[u8]) -> Packed {
        let pattern = self.0.entry(kind).or_default();
        // Objects grow: one without a status is a poor pattern. By a quarter at least, so that there are few of them in all.
        if json.len() <= PATTERN_LIMIT_BYTES && json.len() > pattern.len() + pattern.len() / 4 {
            *pattern = json.into();
        }
        Packed {
            bytes: compress_with_dict(json, pattern).into(),
            length: json.len(),
            pattern: pattern.clone(),
        }
    }
}

impl Packed {
    /// The JSON.
    ///
    /// # Errors
    /// The memory holds something else than what was packed.
    pub fn unpack(&self) -> Result<Vec<u8>, DecompressError> {
        decompress_with_dict(&self.bytes, self.length, &self.pattern)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// As a Job's or a pod's, with a status once it runs.
    fn object(number: usize, runs: bool) -> Vec<u8> {
        let conditions: Vec<_> = ["Accepted", "InputsReady", "Placed", "Complete", "Ready"]
            .iter()
            .map(|name| {
                json!({
                    "type": name,
                    "status": "True",
                    "reason": "AsItShouldBe",
                    "message": format!("the resource number {number} is as it should be"),
                    "lastTransitionTime": format!("2026-11-29T12:{:02}:{:02}Z", number / 60 % 60, number % 60),
                })
            })
            .collect();
        let object = json!({
            "metadata": {"name": format!("copy-{number:04}"), "uid": format!("{:032x}", number * 7919)},
            "status": runs.then_some(conditions),
        });
        object.to_string().into_bytes()
    }

    #[test]
    fn a_thousand_like_objects_take_a_quarter_also_where_the_first_were_without_a_status() {
        let mut patterns = Patterns::default();
        let objects: Vec<_> = (0..1000).map(|number| object(number, number > 10)).collect();
        let packed: Vec<_> = objects.iter().map(|json| patterns.pack(None, json)).collect();
        let before: usize = objects.iter().map(Vec::len).sum();
        let after: usize = packed.iter().map(|packed| packed.bytes.len()).sum();
        assert!(after * 4 < before, "{after} of {before} bytes");
    }

    proptest! {
        #[test]
        fn whatever_is_packed_comes_back(all in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..20)) {
            let mut patterns = Patterns::default();
            let packed: Vec<_> = all.iter().map(|bytes| patterns.pack(None, bytes)).collect();
            for (packed, bytes) in packed.iter().zip(all) {
                prop_assert_eq!(packed.unpack().expect("it comes back"), bytes);
            }
        }
    }
}

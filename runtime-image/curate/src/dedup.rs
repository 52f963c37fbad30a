//! Duplicates, exact and near, with survivors that depend on the order of the records alone.
//!
//! Near duplicates: MinHash over word 5-grams (Broder 1997), 112 hashes of 64 bits in bands (datatrove's 14 × 8 has its
//! knee at a similarity of 0.72). Two records that share a band are compared by their whole signatures; a record goes if the
//! estimated Jaccard similarity to one kept before reaches the threshold. Memory: a 16-byte hash and one entry a band per
//! kept record; the signatures themselves (896 bytes each) lie in a file.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::hash::{HashedMap, mix};

/// Words in a shingle.
const SHINGLE_WORDS: usize = 5;
/// Hashes in a signature.
const HASHES: usize = 112;
const SIGNATURE_BYTES: usize = HASHES * 8;
/// Records of one band that are compared; a band that more share holds near-identical boilerplate.
const BAND_LIMIT: usize = 64;
/// Rows a band, by the smallest similarity in percent for which that many still find nearly all pairs.
const ROWS: [(u8, usize); 3] = [(72, 8), (45, 4), (0, 2)];

/// A record's minima under each hash function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Signature(Vec<u64>);

impl Signature {
    /// The signature of a text, given the hashes of its words.
    pub(crate) fn new(words: &[u64]) -> Self {
        let mut minima = vec![u64::MAX; HASHES];
        let whole = [words];
        let shingles: Box<dyn Iterator<Item = &[u64]>> = match words.len() < SHINGLE_WORDS {
            true => Box::new(whole.into_iter()),
            false => Box::new(words.windows(SHINGLE_WORDS)),
        };
        for shingle in shingles {
            let hash = shingle.iter().fold(
                0,
                |hash: u64, word| mix(hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ word),
            );
            for (index, minimum) in minima.iter_mut().enumerate() {
                *minimum = (*minimum).min(mix(hash ^ seed(index)));
            }
        }
        Self(minima)
    }

    /// The minima, little-endian.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|hash| hash.to_le_bytes()).collect()
    }

    /// Reads what [`Signature::to_bytes`] wrote.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        let hash = |chunk: &[u8]| u64::from_le_bytes(chunk.try_into().expect("chunks of 8 bytes"));
        Self(bytes.chunks_exact(8).map(hash).collect())
    }

    /// Estimated Jaccard similarity of the two texts' shingles.
    fn similarity(&self, other: &Self) -> f64 {
        let equal = self.0.iter().zip(&other.0).filter(|(a, b)| a == b).count();
        equal as f64 / HASHES as f64
    }
}

fn seed(index: usize) -> u64 {
    mix((index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// Figures of the near-duplicate search.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct NearFigures {
    /// Records that were looked up.
    pub(crate) lookups: u64,
    /// Pairs that shared a band and were compared.
    pub(crate) pairs: u64,
    /// Pairs that were similar enough.
    pub(crate) matches: u64,
}

/// Finds records that are near-duplicates of ones kept before.
pub(crate) struct NearDuplicates {
    threshold: f64,
    rows: usize,
    bands: HashedMap<Vec<u32>>,
    signatures: File,
    kept: u32,
    /// What was looked up and found.
    pub(crate) figures: NearFigures,
}

impl NearDuplicates {
    /// Looks for a similarity of at least `percent`; `signatures` is an empty file for reading and writing.
    pub(crate) fn new(percent: u8, signatures: File) -> Self {
        let rows = ROWS
            .iter()
            .find(|(least, _)| percent >= *least)
            .map_or(2, |(_, rows)| *rows);
        let threshold = f64::from(percent) / 100.0;
        Self {
            threshold,
            rows,
            bands: HashedMap::default(),
            signatures,
            kept: 0,
            figures: NearFigures::default(),
        }
    }

    /// The number, in the order of keeping, of the record that this one resembles; `None` if it is new, and then it is
    /// kept for the ones after it.
    pub(crate) fn insert(&mut self, signature: &Signature) -> io::Result<Option<u32>> {
        self.figures.lookups += 1;
        let keys: Vec<u64> = signature
            .0
            .chunks(self.rows)
            .enumerate()
            .map(|(band, rows)| rows.iter().fold(seed(HASHES + band), |key, row| mix(key ^ row)))
            .collect();
        let mut candidates: Vec<u32> = keys
            .iter()
            .filter_map(|key| self.bands.get(key))
            .flatten()
            .copied()
            .collect();
        candidates.sort_unstable();
        candidates.dedup();
        for candidate in candidates {
            self.figures.pairs += 1;
            if signature.similarity(&self.read(candidate)?) >= self.threshold {
                self.figures.matches += 1;
                return Ok(Some(candidate));
            }
        }
        self.signatures
            .write_all_at(&signature.to_bytes(), u64::from(self.kept) * SIGNATURE_BYTES as u64)?;
        for key in keys {
            let band = self.bands.entry(key).or_default();
            if band.len() < BAND_LIMIT {
                band.push(self.kept);
            }
        }
        self.kept = self
            .kept
            .checked_add(1)
            .ok_or_else(|| io::Error::other("more than 4 billion records"))?;
        Ok(None)
    }

    /// Records kept so far.
    pub(crate) fn kept(&self) -> u32 {
        self.kept
    }

    fn read(&self, record: u32) -> io::Result<Signature> {
        let mut bytes = vec![0u8; SIGNATURE_BYTES];
        self.signatures
            .read_exact_at(&mut bytes, u64::from(record) * SIGNATURE_BYTES as u64)?;
        Ok(Signature::from_bytes(&bytes))
    }
}

/// Finds records whose normalized text was seen before.
#[derive(Debug, Default)]
pub(crate) struct ExactDuplicates(HashMap<u128, u32>);

impl ExactDuplicates {
    /// The number, in the order of keeping, of the record with this digest; `None` if it is new.
    pub(crate) fn insert(&mut self, digest: u128) -> Option<u32> {
        let number = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        match self.0.entry(digest) {
            Entry::Occupied(known) => Some(*known.get()),
            Entry::Vacant(new) => {
                new.insert(number);
                None
            }
        }
    }

    /// Records kept so far.
    pub(crate) fn kept(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(percent: u8) -> NearDuplicates {
        NearDuplicates::new(percent, tempfile::tempfile().unwrap())
    }

    /// `count` words of which the ones from `changed` on are others than in text `a`.
    fn words(count: u64, changed: u64) -> Vec<u64> {
        (0..count)
            .map(|i| mix(i + if i < changed { 0 } else { 1 << 40 }))
            .collect()
    }

    #[test]
    fn similar_records_go_and_different_ones_stay() {
        let mut near = near(80);
        assert_eq!(near.insert(&Signature::new(&words(500, 500))).unwrap(), None);
        assert_eq!(
            near.insert(&Signature::new(&words(500, 500))).unwrap(),
            Some(0),
            "the same"
        );
        assert_eq!(
            near.insert(&Signature::new(&words(500, 490))).unwrap(),
            Some(0),
            "2 % of its words differ"
        );
        assert_eq!(
            near.insert(&Signature::new(&words(500, 250))).unwrap(),
            None,
            "half of it differs"
        );
        assert_eq!(
            near.insert(&Signature::new(&words(500, 0))).unwrap(),
            None,
            "all of it differs"
        );
        assert_eq!((near.figures.lookups, near.figures.matches), (5, 2));
        assert_eq!(near.insert(&Signature::new(&words(3, 3))).unwrap(), None);
        assert_eq!(
            near.insert(&Signature::new(&words(3, 3))).unwrap(),
            Some(3),
            "shorter than a shingle"
        );
    }

    #[test]
    fn the_estimate_is_close_and_bands_find_pairs_at_every_threshold() {
        for percent in [30u8, 50, 72, 80, 95] {
            // Half the words that differ, differ on each side: shared shingles s of n give s / (2n - s).
            let mut found = 0;
            for trial in 0..40u64 {
                let shingles = 996f64;
                let jaccard = f64::from(percent) / 100.0 + 0.04;
                let shared = (shingles * 2.0 * jaccard / (1.0 + jaccard)) as u64;
                let shift = |words: Vec<u64>| words.into_iter().map(|word| mix(word ^ trial)).collect::<Vec<_>>();
                let (a, b) = (shift(words(1000, 1000)), shift(words(1000, shared.min(1000))));
                let estimate = Signature::new(&a).similarity(&Signature::new(&b));
                assert!((estimate - jaccard).abs() < 0.2, "{percent}: {estimate}");
                let mut near = near(percent);
                near.insert(&Signature::new(&a)).unwrap();
                found += u32::from(near.insert(&Signature::new(&b)).unwrap().is_some());
            }
            // The estimate of a pair 4 points above the threshold is itself below it in some of the trials.
            assert!(found >= 24, "{percent}: {found} of 40");
        }
    }
}

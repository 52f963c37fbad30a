//! Duplicates, exact and near, with survivors that depend on the order of the records alone.
//!
//! Near duplicates: MinHash over word 5-grams (Broder 1997), 112 hashes of 64 bits as datatrove has, in bands of so many
//! rows that a pair at the threshold shares one with a probability of 0.99. Two records that share a band are compared by
//! their whole signatures; a record goes if the estimated Jaccard similarity to one kept before reaches the threshold.
//! Memory: a 16-byte hash and about 14 bytes a band per kept record; the signatures (896 bytes each) lie in a file.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::hash::mix;

/// Words in a shingle.
const SHINGLE_WORDS: usize = 5;
/// Hashes in a signature.
const HASHES: usize = 112;
const SIGNATURE_BYTES: usize = HASHES * 8;
/// Records of one band that are compared; a band that more share holds near-identical boilerplate.
const BAND_LIMIT: usize = 64;
/// Smallest probability that a pair as similar as the threshold shares a band.
const RECALL: f64 = 0.99;

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

/// Most rows a band, and so fewest false candidates, with which pairs at the threshold are still found.
fn rows_for(threshold: f64) -> usize {
    let recall = |rows: usize| 1.0 - (1.0 - threshold.powi(rows as i32)).powi((HASHES / rows) as i32);
    (1..=HASHES).rev().find(|&rows| recall(rows) >= RECALL).unwrap_or(1)
}

/// Finds records that are near-duplicates of ones kept before.
pub(crate) struct NearDuplicates {
    threshold: f64,
    rows: usize,
    bands: BandIndex,
    signatures: File,
    kept: u32,
    /// What was looked up and found.
    pub(crate) figures: NearFigures,
}

impl NearDuplicates {
    /// Looks for a similarity of at least `percent`; `signatures` is an empty file for reading and writing.
    pub(crate) fn new(percent: u8, signatures: File) -> Self {
        let threshold = f64::from(percent) / 100.0;
        Self {
            threshold,
            rows: rows_for(threshold),
            bands: BandIndex::default(),
            signatures,
            kept: 0,
            figures: NearFigures::default(),
        }
    }

    /// The first record, by its number in the order of [`NearDuplicates::add`], that this one resembles.
    pub(crate) fn find(&mut self, signature: &Signature) -> io::Result<Option<u32>> {
        self.figures.lookups += 1;
        let bands = HASHES / self.rows;
        let mut candidates: Vec<u32> = self
            .tags(signature)
            .flat_map(|tag| self.bands.entries_of(tag))
            .map(|entry| entry / bands as u32)
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
        Ok(None)
    }

    /// Keeps a record for the ones after it.
    pub(crate) fn add(&mut self, signature: &Signature) -> io::Result<()> {
        self.signatures
            .write_all_at(&signature.to_bytes(), u64::from(self.kept) * SIGNATURE_BYTES as u64)?;
        for tag in self.tags(signature).collect::<Vec<_>>() {
            if !self.bands.push(tag) {
                return Err(io::Error::other(
                    "too many records to find near duplicates in: split the data set",
                ));
            }
        }
        self.kept += 1;
        Ok(())
    }

    /// Records kept so far.
    pub(crate) fn kept(&self) -> u32 {
        self.kept
    }

    /// A short hash of each band; that two differ is certain, that two are one is for the signatures to say.
    fn tags<'s>(&self, signature: &'s Signature) -> impl Iterator<Item = u32> + use<'s> {
        signature
            .0
            .chunks_exact(self.rows)
            .enumerate()
            .map(|(band, rows)| rows.iter().fold(seed(HASHES + band), |key, row| mix(key ^ row)) as u32)
    }

    fn read(&self, record: u32) -> io::Result<Signature> {
        let mut bytes = vec![0u8; SIGNATURE_BYTES];
        self.signatures
            .read_exact_at(&mut bytes, u64::from(record) * SIGNATURE_BYTES as u64)?;
        Ok(Signature::from_bytes(&bytes))
    }
}

/// Entries by tag: a hash table of chains in two vectors, since a map of lists takes six times the memory.
#[derive(Default)]
struct BandIndex {
    /// First entry of each chain; their number is a power of two.
    heads: Vec<u32>,
    entries: Vec<BandEntry>,
}

#[derive(Clone, Copy)]
struct BandEntry {
    tag: u32,
    next: u32,
}

/// The end of a chain.
const END: u32 = u32::MAX;
/// In no chain, since [`BAND_LIMIT`] others of its tag are.
const UNLINKED: u32 = u32::MAX - 1;

impl BandIndex {
    /// Numbers of the entries with this tag, in the order of their adding.
    fn entries_of(&self, tag: u32) -> impl Iterator<Item = u32> + '_ {
        self.chain(tag).filter(move |&at| self.entries[at as usize].tag == tag)
    }

    /// Adds the next entry; false if there is no number left for it.
    fn push(&mut self, tag: u32) -> bool {
        if self.entries.len() == UNLINKED as usize {
            return false;
        }
        if self.entries.len() == self.heads.len() {
            self.grow();
        }
        let new = self.entries.len() as u32;
        let linked = self.entries_of(tag).count() < BAND_LIMIT;
        let last = self.chain(tag).last();
        let next = if linked { END } else { UNLINKED };
        self.entries.push(BandEntry { tag, next });
        match (linked, last) {
            (false, _) => {}
            (true, Some(last)) => self.entries[last as usize].next = new,
            (true, None) => {
                let head = self.head(tag);
                self.heads[head] = new;
            }
        }
        true
    }

    fn head(&self, tag: u32) -> usize {
        tag as usize & (self.heads.len() - 1)
    }

    fn chain(&self, tag: u32) -> impl Iterator<Item = u32> + '_ {
        let mut at = if self.heads.is_empty() {
            END
        } else {
            self.heads[self.head(tag)]
        };
        std::iter::from_fn(move || {
            let entry = self.entries.get(at as usize)?;
            Some(std::mem::replace(&mut at, entry.next))
        })
    }

    fn grow(&mut self) {
        self.heads = vec![END; (self.heads.len() * 2).max(1024)];
        // From the last to the first, each before the ones after it.
        for at in (0..self.entries.len()).rev() {
            if self.entries[at].next != UNLINKED {
                let head = self.head(self.entries[at].tag);
                self.entries[at].next = std::mem::replace(&mut self.heads[head], at as u32);
            }
        }
    }
}

/// Finds records whose normalized text was seen before.
#[derive(Debug, Default)]
pub(crate) struct ExactDuplicates(HashMap<u128, u32>);

impl ExactDuplicates {
    /// The record with this digest, by its number in the order of [`ExactDuplicates::add`].
    pub(crate) fn find(&self, digest: u128) -> Option<u32> {
        self.0.get(&digest).copied()
    }

    /// Keeps a record for the ones after it.
    pub(crate) fn add(&mut self, digest: u128) {
        let number = self.kept();
        if let Entry::Vacant(new) = self.0.entry(digest) {
            new.insert(number);
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

    /// What [`NearDuplicates::find`] says, and keeps the record if it is new.
    fn insert(near: &mut NearDuplicates, words: &[u64]) -> Option<u32> {
        let signature = Signature::new(words);
        let found = near.find(&signature).unwrap();
        if found.is_none() {
            near.add(&signature).unwrap();
        }
        found
    }

    #[test]
    fn similar_records_go_and_different_ones_stay() {
        let mut near = near(80);
        for (text, found, what) in [
            (words(500, 500), None, "the first"),
            (words(500, 500), Some(0), "the same"),
            (words(500, 490), Some(0), "2 % of its words differ"),
            (words(500, 250), None, "half of it differs"),
            (words(500, 0), None, "all of it differs"),
        ] {
            assert_eq!(insert(&mut near, &text), found, "{what}");
        }
        assert_eq!((near.figures.lookups, near.figures.matches), (5, 2));
        assert_eq!(insert(&mut near, &words(3, 3)), None);
        assert_eq!(insert(&mut near, &words(3, 3)), Some(3), "shorter than a shingle");
    }

    #[test]
    fn of_the_pairs_that_are_just_similar_enough_99_percent_are_found_at_every_threshold() {
        for percent in [10u8, 30, 50, 65, 72, 80, 90, 95, 99, 100] {
            let mut found = 0;
            for trial in 0..1000u64 {
                let random = |index: usize| mix(trial << 32 | index as u64);
                let a = Signature((0..HASHES).map(random).collect());
                // As many equal hashes as reach the threshold, in random places.
                let mut places: Vec<usize> = (0..HASHES).collect();
                places.sort_by_key(|&place| mix(random(HASHES + place)));
                let equal = (HASHES * usize::from(percent)).div_ceil(100);
                let mut b = a.clone();
                places[equal..].iter().for_each(|&place| b.0[place] ^= 1);
                let mut near = near(percent);
                near.add(&a).unwrap();
                found += u32::from(near.find(&b).unwrap().is_some());
            }
            assert!(found >= 985, "{percent}: {found} of 1000");
        }
    }

    #[test]
    fn the_estimate_is_close_to_the_similarity() {
        for percent in [30u8, 50, 72, 80, 95] {
            // Half the words that differ, differ on each side: shared shingles s of n give s / (2n - s).
            let jaccard = f64::from(percent) / 100.0;
            let shared = (996.0 * 2.0 * jaccard / (1.0 + jaccard)) as u64;
            let estimate = Signature::new(&words(1000, 1000)).similarity(&Signature::new(&words(1000, shared)));
            assert!((estimate - jaccard).abs() < 0.15, "{percent}: {estimate}");
        }
    }

    #[test]
    fn the_index_finds_the_first_entries_of_a_tag_however_it_grew() {
        let mut index = BandIndex::default();
        for at in 0..10_000u32 {
            assert!(index.push(if at % 2 == 0 { 7 } else { 7 + (at << 10) }));
        }
        let even: Vec<u32> = (0..BAND_LIMIT as u32).map(|n| n * 2).collect();
        assert_eq!(index.entries_of(7).collect::<Vec<_>>(), even);
        for at in (1..10_000u32).step_by(2) {
            assert_eq!(index.entries_of(7 + (at << 10)).collect::<Vec<_>>(), [at]);
        }
    }
}

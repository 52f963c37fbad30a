//! Damage: inputs that are almost right, as those find more than noise does.

use std::hash::{DefaultHasher, Hash, Hasher};

/// An input never grows beyond this; most are far smaller.
const MAX_BYTES: usize = 256 << 10;
/// Where headers are: half of the damage is done there.
const HEAD_BYTES: usize = 4096;
const MAX_STEPS: u64 = 6;
const EDGES: [u64; 12] = [
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFF_FFFF,
    0xFFFF_FFFF,
    i64::MAX as u64,
    u64::MAX,
];

pub(crate) fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

pub(crate) struct Mutator {
    state: u64,
    words: &'static [&'static str],
}

impl Mutator {
    pub(crate) fn new(seed: u64, words: &'static [&'static str]) -> Self {
        Mutator { state: seed, words }
    }

    fn below(&mut self, bound: usize) -> usize {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % bound.max(1) as u64) as usize
    }

    /// A damaged copy of one of `kept`, the newest ones first.
    pub(crate) fn next(&mut self, kept: &[Vec<u8>]) -> Vec<u8> {
        let from = if self.below(2) == 0 {
            0
        } else {
            kept.len().saturating_sub(kept.len() / 4 + 1)
        };
        let mut input = kept[from + self.below(kept.len() - from)].clone();
        for _ in 0..=self.below(MAX_STEPS as usize) {
            self.step(&mut input, kept);
        }
        input.truncate(MAX_BYTES);
        input
    }

    fn place(&mut self, length: usize) -> usize {
        let within = if self.below(2) == 0 {
            length.min(HEAD_BYTES)
        } else {
            length
        };
        self.below(within + 1).min(length)
    }

    fn step(&mut self, input: &mut Vec<u8>, kept: &[Vec<u8>]) {
        let at = self.place(input.len());
        let rest = input.len() - at;
        let some = 1 + self.below(rest.min(64));
        let end = (at + some).min(input.len());
        match self.below(10) {
            0 if rest > 0 => input[at] ^= 1 << self.below(8),
            1 if rest > 0 => input[at] = self.below(256) as u8,
            2 => drop(input.drain(at..end)),
            3 => {
                let copy = input[at..end].to_vec();
                let to = self.place(input.len());
                input.splice(to..to, copy);
            }
            4 => {
                let count = 1 + self.below(200);
                let byte = input.get(at).copied().unwrap_or(b'[');
                input.splice(at..at, std::iter::repeat_n(byte, count));
            }
            5 => {
                let width = [1, 2, 4, 8][self.below(4)];
                let bytes = EDGES[self.below(EDGES.len())].to_le_bytes();
                let end = (at + width).min(input.len());
                input.splice(at..end, bytes[..width].iter().copied());
            }
            6 | 7 if !self.words.is_empty() => {
                let word = self.words[self.below(self.words.len())];
                let end = if self.below(2) == 0 { at } else { end };
                input.splice(at..end, word.bytes());
            }
            8 => {
                let other = &kept[self.below(kept.len())];
                let (from, to) = (self.below(other.len() + 1), self.below(other.len() + 1));
                input.splice(at..end, other[from.min(to)..from.max(to)].iter().copied());
            }
            _ => input.truncate(at),
        }
    }
}

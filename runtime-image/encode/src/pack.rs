//! Packing: documents of any length into sequences of at most one length.

use std::io;

use strata_contract::Packing;

/// Sequences that best-fit packing keeps open; bounds its memory at this many sequences.
const OPEN_SEQUENCES: usize = 1024;

/// Packs documents into sequences of at most `length` tokens, handing each full one to a closure.
#[derive(Debug)]
pub struct Packer {
    packing: Packing,
    length: usize,
    /// Sequences that are not full yet, in the order in which they were opened; one if concatenating.
    open: Vec<Vec<u32>>,
}

impl Packer {
    /// A packer for sequences of `length` tokens (at least 1).
    pub fn new(packing: Packing, length: u32) -> Self {
        Self {
            packing,
            length: length.max(1) as usize,
            open: Vec::new(),
        }
    }

    /// Adds a document, which ends with the end-of-text token; `emit` gets every sequence that is now full.
    pub fn push(&mut self, document: &[u32], emit: &mut dyn FnMut(&[u32]) -> io::Result<()>) -> io::Result<()> {
        match self.packing {
            Packing::Concatenate => self.concatenate(document, emit),
            Packing::BestFit => document
                .chunks(self.length)
                .try_for_each(|piece| self.best_fit(piece, emit)),
        }
    }

    /// Hands out what is left: sequences that are not full.
    pub fn finish(self, emit: &mut dyn FnMut(&[u32]) -> io::Result<()>) -> io::Result<()> {
        self.open
            .iter()
            .filter(|sequence| !sequence.is_empty())
            .try_for_each(|sequence| emit(sequence))
    }

    fn concatenate(&mut self, mut document: &[u32], emit: &mut dyn FnMut(&[u32]) -> io::Result<()>) -> io::Result<()> {
        if self.open.is_empty() {
            self.open.push(Vec::with_capacity(self.length));
        }
        let stream = &mut self.open[0];
        while !document.is_empty() {
            let (piece, rest) = document.split_at(document.len().min(self.length - stream.len()));
            stream.extend_from_slice(piece);
            document = rest;
            if stream.len() == self.length {
                emit(stream)?;
                stream.clear();
            }
        }
        Ok(())
    }

    /// Puts `piece` into the fullest open sequence that has room for it; a new one if none has.
    fn best_fit(&mut self, piece: &[u32], emit: &mut dyn FnMut(&[u32]) -> io::Result<()>) -> io::Result<()> {
        let room = self.length - piece.len();
        let fits = self
            .open
            .iter()
            .enumerate()
            .filter(|(_, sequence)| sequence.len() <= room);
        // Of equally full ones the oldest, so that the result depends on the documents alone.
        let at = match fits.max_by_key(|(at, sequence)| (sequence.len(), usize::MAX - at)) {
            Some((at, _)) => at,
            None => {
                if self.open.len() == OPEN_SEQUENCES {
                    let fullest = (0..self.open.len()).max_by_key(|&at| (self.open[at].len(), usize::MAX - at));
                    emit(&self.open.remove(fullest.expect("OPEN_SEQUENCES is not zero")))?;
                }
                self.open.push(Vec::with_capacity(self.length));
                self.open.len() - 1
            }
        };
        self.open[at].extend_from_slice(piece);
        if self.open[at].len() == self.length {
            emit(&self.open.remove(at))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack(packing: Packing, length: u32, documents: &[&[u32]]) -> Vec<Vec<u32>> {
        let mut packed = Vec::new();
        let mut packer = Packer::new(packing, length);
        let mut emit = |sequence: &[u32]| {
            packed.push(sequence.to_vec());
            Ok(())
        };
        for document in documents {
            packer.push(document, &mut emit).unwrap();
        }
        packer.finish(&mut emit).unwrap();
        packed
    }

    #[test]
    fn concatenation_cuts_one_stream() {
        let packed = pack(Packing::Concatenate, 4, &[&[1, 2, 0], &[3, 0], &[4, 5, 6, 7, 0]]);
        assert_eq!(packed, [vec![1, 2, 0, 3], vec![0, 4, 5, 6], vec![7, 0]]);
    }

    #[test]
    fn best_fit_cuts_only_documents_longer_than_a_sequence_and_fills_the_fullest() {
        let packed = pack(
            Packing::BestFit,
            4,
            &[&[1, 0], &[2, 3, 0], &[0], &[4, 5, 6, 7, 8, 0], &[9, 9, 0]],
        );
        // The lone end token goes beside the three tokens, not beside the two; the tail 8, 0 fills up 1, 0.
        assert_eq!(
            packed,
            [vec![2, 3, 0, 0], vec![4, 5, 6, 7], vec![1, 0, 8, 0], vec![9, 9, 0]]
        );
    }

    #[test]
    fn no_token_is_lost_however_many_sequences_are_open() {
        let documents: Vec<Vec<u32>> = (0..3000u32).map(|i| vec![i; 6 + (i as usize * 7) % 5]).collect();
        let slices: Vec<&[u32]> = documents.iter().map(Vec::as_slice).collect();
        for packing in [Packing::Concatenate, Packing::BestFit] {
            let packed = pack(packing, 10, &slices);
            assert!(packed.iter().all(|sequence| sequence.len() <= 10));
            let mut found: Vec<u32> = packed.concat();
            let mut expected: Vec<u32> = documents.concat();
            found.sort_unstable();
            expected.sort_unstable();
            assert_eq!(found, expected, "{packing:?}");
        }
    }
}

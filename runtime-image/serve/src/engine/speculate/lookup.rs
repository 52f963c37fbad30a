//! Guesses from the text itself: answers often repeat what stands in the prompt, or what they said before.

/// What followed the longest end of `tokens`, of at most `most` and at least `least` tokens, where it stood before: up to
/// `count` tokens. The last such place counts, unless an earlier one is followed by more.
pub(super) fn lookup(tokens: &[u32], most: usize, least: usize, count: usize) -> Vec<u32> {
    if count == 0 {
        return Vec::new();
    }
    for length in (least..=most.min(tokens.len().saturating_sub(1))).rev() {
        let end = &tokens[tokens.len() - length..];
        let mut best: &[u32] = &[];
        // Places whose continuation begins before the end of the text.
        for after in (length..tokens.len()).rev() {
            if tokens[after - length..after] == *end {
                let follows = &tokens[after..(after + count).min(tokens.len())];
                if follows.len() > best.len() {
                    best = follows;
                }
                if best.len() == count {
                    break;
                }
            }
        }
        if !best.is_empty() {
            return best.to_vec();
        }
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::lookup;

    #[test]
    fn the_longest_end_wins_then_the_last_place_that_is_followed_by_enough() {
        for (tokens, most, least, count, expected) in [
            (&[1, 2, 3, 9, 1, 2][..], 2, 1, 3, &[3, 9, 1][..]),
            // Three tokens beat two, though these stood later.
            (&[1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3], 3, 1, 1, &[7]),
            (&[1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3], 2, 1, 1, &[8]),
            // Two places: the later one.
            (&[4, 5, 4, 6, 4], 1, 1, 1, &[6]),
            // The last place is followed by one token only.
            (&[6, 6, 6, 6, 6], 1, 1, 3, &[6, 6, 6]),
            (&[6, 6], 1, 1, 3, &[6]),
            (&[1, 2, 3], 3, 1, 3, &[]),
            (&[1, 2, 1], 2, 2, 3, &[]),
            (&[1], 5, 5, 3, &[]),
            (&[1, 1], 1, 1, 0, &[]),
        ] {
            assert_eq!(
                lookup(tokens, most, least, count),
                expected,
                "{tokens:?} {most} {least}"
            );
        }
    }
}

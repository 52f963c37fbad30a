//! What the quality rules measure on a text: words, lines, repetitions. The text is split into words once.

use crate::hash::{HashedMap, HashedSet, hash_bytes, mix};

/// The stop words of Gopher's quality filter.
const STOP_WORDS: [&str; 8] = ["the", "be", "to", "of", "and", "that", "have", "with"];
/// Marks that end a sentence or close a quotation, as FineWeb's rule on line ends counts them.
const LINE_END_MARKS: [char; 13] = ['.', '!', '?', '"', '\'', '”', '’', '…', '。', '！', '？', '।', '؟'];
/// Longest line that FineWeb calls short, in characters.
const SHORT_LINE_CHARACTERS: usize = 30;

/// One word or punctuation mark.
#[derive(Clone, Copy, Debug)]
struct Token {
    hash: u64,
    characters: u32,
    is_word: bool,
    has_letter: bool,
}

/// A text split into words.
#[derive(Debug)]
pub(crate) struct Analysis<'a> {
    text: &'a str,
    characters: usize,
    tokens: Vec<Token>,
    /// Hashes of the words in lower case, without punctuation: what duplicates are judged by.
    normalized: Vec<u64>,
    stop_words: usize,
}

/// Splits `text` into words (letters and digits, with apostrophes inside) and single punctuation marks; a run of the same
/// mark, such as an ellipsis, is one.
fn tokens(text: &str) -> impl Iterator<Item = (&str, bool)> {
    let mut rest = text;
    std::iter::from_fn(move || {
        rest = rest.trim_start();
        let first = rest.chars().next()?;
        let end = match first.is_alphanumeric() {
            true => {
                let mut end = 0;
                let mut characters = rest.char_indices().peekable();
                while let Some((at, c)) = characters.next() {
                    let inside = matches!(c, '\'' | '’') && characters.peek().is_some_and(|(_, c)| c.is_alphanumeric());
                    if !c.is_alphanumeric() && !inside {
                        break;
                    }
                    end = at + c.len_utf8();
                }
                end
            }
            false => rest.find(|c| c != first).unwrap_or(rest.len()),
        };
        let (token, tail) = rest.split_at(end);
        rest = tail;
        Some((token, first.is_alphanumeric()))
    })
}

impl<'a> Analysis<'a> {
    /// Splits and hashes `text`.
    pub(crate) fn new(text: &'a str) -> Self {
        let mut seen = 0u32;
        let mut normalized = Vec::new();
        let mut lower = String::new();
        let tokens: Vec<Token> = tokens(text)
            .map(|(token, is_word)| {
                let hash = hash_bytes(token.as_bytes());
                if is_word {
                    if let Some(at) = STOP_WORDS.iter().position(|word| *word == token) {
                        seen |= 1 << at;
                    }
                    let has_upper = token.chars().any(char::is_uppercase);
                    normalized.push(match has_upper {
                        true => {
                            lower.clear();
                            lower.extend(token.chars().flat_map(char::to_lowercase));
                            hash_bytes(lower.as_bytes())
                        }
                        false => hash,
                    });
                }
                let characters = token.chars().count() as u32;
                Token {
                    hash,
                    characters,
                    is_word,
                    has_letter: token.chars().any(char::is_alphabetic),
                }
            })
            .collect();
        Self {
            text,
            characters: text.chars().count(),
            tokens,
            normalized,
            stop_words: seen.count_ones() as usize,
        }
    }

    /// Number of words; punctuation is not counted.
    pub(crate) fn words(&self) -> usize {
        self.normalized.len()
    }

    /// Hashes of the words in lower case, without punctuation.
    pub(crate) fn normalized(&self) -> &[u64] {
        &self.normalized
    }

    /// Number of different ones of Gopher's eight stop words.
    pub(super) fn stop_words(&self) -> f64 {
        self.stop_words as f64
    }

    /// Characters in a word, on average.
    pub(super) fn mean_word_length(&self) -> f64 {
        let words = self.tokens.iter().filter(|token| token.is_word);
        ratio(words.map(|token| token.characters as usize).sum(), self.words())
    }

    /// Hash signs or ellipses, whichever are more, per word or punctuation mark.
    pub(super) fn symbol_ratio(&self) -> f64 {
        let hash_signs = self.text.matches('#').count();
        let ellipses = self.text.matches("...").count() + self.text.matches('…').count();
        ratio(hash_signs.max(ellipses), self.tokens.len())
    }

    /// Share of words and punctuation marks that have a letter.
    pub(super) fn alphabetic_share(&self) -> f64 {
        ratio(
            self.tokens.iter().filter(|token| token.has_letter).count(),
            self.tokens.len(),
        )
    }

    /// Share of lines that start with a bullet.
    pub(super) fn bullet_lines(&self) -> f64 {
        self.share_of_lines(|line| line.trim_start().starts_with(['•', '-']))
    }

    /// Share of lines that end in an ellipsis.
    pub(super) fn ellipsis_lines(&self) -> f64 {
        self.share_of_lines(|line| line.trim_end().ends_with("...") || line.trim_end().ends_with('…'))
    }

    fn share_of_lines(&self, test: impl Fn(&str) -> bool) -> f64 {
        ratio(
            self.text.lines().filter(|line| test(line)).count(),
            self.text.lines().count(),
        )
    }

    /// Share of non-empty lines that end in a punctuation mark.
    pub(super) fn punctuated_lines(&self) -> f64 {
        ratio(
            self.full_lines().filter(|line| line.ends_with(LINE_END_MARKS)).count(),
            self.full_lines().count(),
        )
    }

    /// Share of non-empty lines of at most 30 characters.
    pub(super) fn short_lines(&self) -> f64 {
        let short = |line: &&str| line.chars().nth(SHORT_LINE_CHARACTERS).is_none();
        ratio(self.full_lines().filter(short).count(), self.full_lines().count())
    }

    /// Newlines per word or punctuation mark.
    pub(super) fn newlines_per_word(&self) -> f64 {
        ratio(self.text.matches('\n').count(), self.tokens.len())
    }

    /// Share of characters, newlines aside, in repeated non-empty lines.
    pub(super) fn duplicate_line_characters_of_lines(&self) -> f64 {
        let newlines = self.text.matches('\n').count();
        ratio(duplicates(self.full_lines()).1, self.characters - newlines)
    }

    fn full_lines(&self) -> impl Iterator<Item = &'a str> {
        self.text.split('\n').filter(|line| !line.trim().is_empty())
    }

    /// Share of lines that repeat an earlier one.
    pub(super) fn duplicate_lines(&self) -> f64 {
        ratio(duplicates(self.split_lines()).0, self.split_lines().count())
    }

    /// Share of characters in lines that repeat an earlier one.
    pub(super) fn duplicate_line_characters(&self) -> f64 {
        ratio(duplicates(self.split_lines()).1, self.characters)
    }

    fn split_lines(&self) -> impl Iterator<Item = &'a str> {
        self.text.split('\n').filter(|line| !line.is_empty())
    }

    /// Share of paragraphs that repeat an earlier one.
    pub(super) fn duplicate_paragraphs(&self) -> f64 {
        ratio(duplicates(self.paragraphs()).0, self.paragraphs().count())
    }

    /// Share of characters in paragraphs that repeat an earlier one.
    pub(super) fn duplicate_paragraph_characters(&self) -> f64 {
        ratio(duplicates(self.paragraphs()).1, self.characters)
    }

    fn paragraphs(&self) -> impl Iterator<Item = &'a str> {
        self.text
            .trim()
            .split("\n\n")
            .map(|paragraph| paragraph.trim_matches('\n'))
            .filter(|text| !text.is_empty())
    }

    /// The largest of: characters in the most frequent n-gram, as a share of the text, over `limits[n]`.
    pub(super) fn top_ngrams(&self, limits: &[(usize, f64)]) -> f64 {
        let mut worst = 0f64;
        let mut hashes = NgramHashes::new(&self.tokens);
        for &(n, limit) in limits {
            let mut counts: HashedMap<(u32, u32)> = HashedMap::default();
            for (at, hash) in hashes.of_length(n).iter().enumerate() {
                counts.entry(*hash).or_insert((0, at as u32)).0 += 1;
            }
            // Of equally frequent ones the first.
            if let Some(&(count, first)) = counts.values().max_by_key(|(count, first)| (*count, u32::MAX - first)) {
                let spelled = self.span_characters(first as usize, n) + n - 1;
                worst = worst.max(ratio(spelled * count as usize, self.characters) / limit);
            }
        }
        worst
    }

    /// The largest of: characters in n-grams that repeat an earlier one, as a share of the text, over `limits[n]`.
    pub(super) fn duplicate_ngrams(&self, limits: &[(usize, f64)]) -> f64 {
        let mut worst = 0f64;
        let mut hashes = NgramHashes::new(&self.tokens);
        for &(n, limit) in limits {
            let mut seen = HashedSet::default();
            let (mut repeated, mut at) = (0, 0);
            let ngrams = hashes.of_length(n);
            while at < ngrams.len() {
                // A repeated n-gram is counted once and stepped over.
                at += match seen.insert(ngrams[at]) {
                    true => 1,
                    false => {
                        repeated += self.span_characters(at, n);
                        n
                    }
                };
            }
            worst = worst.max(ratio(repeated, self.characters) / limit);
        }
        worst
    }

    fn span_characters(&self, start: usize, count: usize) -> usize {
        self.tokens[start..start + count]
            .iter()
            .map(|token| token.characters as usize)
            .sum()
    }
}

/// Hashes of the n-grams at every position, for growing n.
struct NgramHashes<'t> {
    tokens: &'t [Token],
    n: usize,
    hashes: Vec<u64>,
}

impl<'t> NgramHashes<'t> {
    fn new(tokens: &'t [Token]) -> Self {
        Self {
            tokens,
            n: 0,
            hashes: vec![0; tokens.len()],
        }
    }

    /// Hashes of the n-grams; `n` must not fall from call to call.
    fn of_length(&mut self, n: usize) -> &[u64] {
        while self.n < n {
            self.hashes.truncate((self.tokens.len()).saturating_sub(self.n));
            for (hash, token) in self
                .hashes
                .iter_mut()
                .zip(&self.tokens[self.n.min(self.tokens.len())..])
            {
                *hash = mix(hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ token.hash);
            }
            self.n += 1;
        }
        &self.hashes
    }
}

/// How many parts repeat an earlier one, and their characters.
fn duplicates<'a>(parts: impl Iterator<Item = &'a str>) -> (usize, usize) {
    let mut seen = HashedSet::default();
    let repeated = parts.filter(|part| !seen.insert(hash_bytes(part.as_bytes())));
    repeated.fold((0, 0), |(count, characters), part| {
        (count + 1, characters + part.chars().count())
    })
}

/// Sentences in `line`: ends of sentences, and what follows the last one.
pub(super) fn sentences(line: &str) -> usize {
    let mut count = 0;
    let mut open = false;
    let mut characters = line.chars().peekable();
    while let Some(c) = characters.next() {
        let ends = matches!(c, '.' | '!' | '?' | '…' | '。' | '！' | '？');
        if !ends {
            open |= !c.is_whitespace();
            continue;
        }
        while characters
            .next_if(|c| matches!(c, '.' | '!' | '?' | '…' | '"' | '\'' | '”' | '’' | ')'))
            .is_some()
        {}
        // "3.5" goes on, and so does "e.g. this".
        let mut ahead = characters.clone();
        let spaced = ahead.peek().is_none_or(|c| c.is_whitespace()) || matches!(c, '。' | '！' | '？');
        let goes_on = ahead.find(|c| !c.is_whitespace()).is_some_and(char::is_lowercase);
        if open && spaced && !goes_on {
            count += 1;
            open = false;
        }
    }
    count + usize::from(open)
}

fn ratio(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_marks_are_told_apart() {
        let found: Vec<_> = tokens("Don't stop -- 3 knights... \"ho!\"").collect();
        let expected = [
            ("Don't", true),
            ("stop", true),
            ("--", false),
            ("3", true),
            ("knights", true),
            ("...", false),
            ("\"", false),
            ("ho", true),
            ("!", false),
            ("\"", false),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn sentences_are_counted_by_their_ends() {
        for (line, count) in [
            ("", 0),
            ("A heading", 1),
            ("One. Two! Three?", 3),
            ("It cost 3.5 pounds, e.g. in Stratford. \"So?\" he said.", 2),
            ("One. And then", 2),
            ("...", 0),
        ] {
            assert_eq!(sentences(line), count, "{line:?}");
        }
    }

    #[test]
    fn repeated_ngrams_are_measured_as_published() {
        // Eight tokens of one letter, the 2-gram "a b" four times: 4 × "a b" = 12 of the text's 15 characters.
        let analysis = Analysis::new("a b a b a b a b");
        assert!((analysis.top_ngrams(&[(2, 0.2)]) - 12.0 / 15.0 / 0.2).abs() < 1e-9);
        // First "ab", "ba" are new; then "ab" at 2, 4 and 6 repeats: 3 × 2 characters.
        assert!((analysis.duplicate_ngrams(&[(2, 1.0)]) - 6.0 / 15.0).abs() < 1e-9);
        assert_eq!(analysis.duplicate_ngrams(&[(9, 0.1)]), 0.0);
        assert_eq!(Analysis::new("").top_ngrams(&[(2, 0.2)]), 0.0);
    }
}

//! An answer's text as it grows: whole characters only, cut at stop strings, never showing the beginning of one.

use strata_model::{ModelError, TokenText, Vocabulary};

/// The text side of one request.
#[derive(Debug)]
pub struct Answer {
    text: TokenText,
    stop: Vec<String>,
    /// Whether the stop string itself is shown.
    show_stop: bool,
    /// Text that may be the beginning of a stop string.
    held: String,
}

/// What a token added.
#[derive(Debug, PartialEq)]
pub struct Piece {
    /// Text to give out.
    pub text: String,
    /// A stop string was reached; the text ends before it.
    pub stopped: bool,
}

impl Answer {
    /// An empty answer that ends at any of `stop` (none of them empty), which are part of it only with `show_stop`. The text
    /// of special tokens is only part of it with `show_special`.
    pub fn new(stop: Vec<String>, show_stop: bool, show_special: bool) -> Self {
        Answer {
            text: TokenText::new(show_special),
            stop,
            show_stop,
            held: String::new(),
        }
    }

    /// The answer to a prompt that ends with `last`; see [`TokenText::after`].
    pub fn after(mut self, vocabulary: &Vocabulary, last: Option<u32>) -> Self {
        self.text = self.text.after(vocabulary, last);
        self
    }

    /// Takes the next token. Without `may_stop`, a stop string that it completes is text like any other.
    pub fn push(&mut self, vocabulary: &Vocabulary, token: u32, may_stop: bool) -> Result<Piece, ModelError> {
        let new = self.text.push(vocabulary, token)?;
        if !may_stop {
            return Ok(Piece {
                text: new,
                stopped: false,
            });
        }
        Ok(self.take(&new, false))
    }

    /// The rest of the text, when no more tokens come.
    pub fn finish(&mut self, vocabulary: &Vocabulary) -> Result<Piece, ModelError> {
        let new = self.text.finish(vocabulary)?;
        Ok(self.take(&new, true))
    }

    fn take(&mut self, new: &str, last: bool) -> Piece {
        self.held.push_str(new);
        let found = self
            .stop
            .iter()
            .filter_map(|stop| Some((self.held.find(stop.as_str())?, stop.len())));
        if let Some((at, length)) = found.min() {
            self.held.truncate(if self.show_stop { at + length } else { at });
            return Piece {
                text: std::mem::take(&mut self.held),
                stopped: true,
            };
        }
        let keep = if last {
            0
        } else {
            self.stop
                .iter()
                .map(|stop| overlap(&self.held, stop))
                .max()
                .unwrap_or(0)
        };
        let rest = self.held.split_off(self.held.len() - keep);
        Piece {
            text: std::mem::replace(&mut self.held, rest),
            stopped: false,
        }
    }
}

/// The length of the longest end of `text` that is a beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let lengths = stop.char_indices().map(|(at, _)| at).skip(1);
    lengths
        .filter(|length| text.ends_with(&stop[..*length]))
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use strata_model::synthetic::byte_tokenizer;

    #[test]
    fn a_stop_string_is_never_shown_not_even_its_beginning() {
        let vocabulary = Vocabulary::from_json(&byte_tokenizer()).unwrap();
        for (text, stop, shown, stopped) in [
            ("one END two", vec!["END"], "one ", true),
            ("one EN two", vec!["END"], "one EN two", false),
            ("one EN", vec!["END"], "one EN", false),
            ("aab", vec!["ab"], "a", true),
            ("x日本語y", vec!["本", "語"], "x日", true),
            ("abc", vec![], "abc", false),
        ] {
            let stop: Vec<String> = stop.into_iter().map(str::to_owned).collect();
            let mut answer = Answer::new(stop.clone(), false, false);
            let (mut seen, mut ended) = (String::new(), false);
            for token in vocabulary.encode(text, false).unwrap() {
                let piece = answer.push(&vocabulary, token, true).unwrap();
                assert!(text.starts_with(&(seen.clone() + &piece.text)), "{text:?} {stop:?}");
                seen += &piece.text;
                if piece.stopped {
                    ended = true;
                    break;
                }
            }
            if !ended {
                seen += &answer.finish(&vocabulary).unwrap().text;
            }
            assert_eq!((seen.as_str(), ended), (shown, stopped), "{text:?} {stop:?}");
        }
    }
}

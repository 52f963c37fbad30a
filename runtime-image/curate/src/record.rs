//! A record on its way through curation: a document, or a pair of conversations.

use serde::{Deserialize, Serialize};

use crate::hash::digest;
use crate::pii::{self, PiiKind};

/// A record and where it is from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Unique in the data set, and the same in every run on the same sources.
    pub(crate) id: String,
    /// Name of its source.
    pub(crate) source: String,
    /// Its address, or the file and its place in it.
    pub(crate) origin: String,
    /// Language, by code; empty if it was not identified.
    pub(crate) language: String,
    /// Confidence of the identification, from 0 to 1.
    pub(crate) language_score: f64,
    /// What it holds.
    pub(crate) body: Body,
}

/// What a record holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Body {
    /// Running text.
    Text(String),
    /// A conversation with a better and a worse answer.
    Pair(Pair),
}

/// A conversation with a better and a worse answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pair {
    /// The turns before the answer.
    pub(crate) prompt: Vec<Message>,
    /// The better answer.
    pub(crate) chosen: String,
    /// The worse answer.
    pub(crate) rejected: String,
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Message {
    /// `user` or `assistant`.
    pub(crate) role: String,
    /// What was said.
    pub(crate) content: String,
}

impl Body {
    /// All of its text, for measuring and comparing.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Pair(pair) => {
                let turns = pair.prompt.iter().map(|turn| turn.content.as_str());
                turns
                    .chain([pair.chosen.as_str(), &pair.rejected])
                    .collect::<Vec<_>>()
                    .join("\n\n")
            }
        }
    }

    /// Size of its text in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.parts().map(|part| part.len() as u64).sum()
    }

    fn parts(&self) -> Box<dyn Iterator<Item = &String> + '_> {
        match self {
            Self::Text(text) => Box::new(std::iter::once(text)),
            Self::Pair(pair) => {
                let turns = pair.prompt.iter().map(|turn| &turn.content);
                Box::new(turns.chain([&pair.chosen, &pair.rejected]))
            }
        }
    }

    /// What must not be torn apart between training and held-out: equal texts, or equal first questions.
    pub(crate) fn group(&self, words: &[u64]) -> u128 {
        match self {
            Self::Text(_) => digest(
                words
                    .iter()
                    .map(|word| word.to_le_bytes())
                    .collect::<Vec<_>>()
                    .iter()
                    .map(|b| &b[..]),
            ),
            Self::Pair(pair) => {
                let first = pair.prompt.first().map_or("", |turn| turn.content.as_str());
                let normalized = first.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
                digest([normalized.as_bytes()])
            }
        }
    }

    /// Kinds of the spans of personal data in it.
    pub(crate) fn personal_data(&self) -> Vec<PiiKind> {
        self.parts()
            .flat_map(|part| pii::find(part))
            .map(|(kind, _)| kind)
            .collect()
    }

    /// Replaces the spans of personal data by tags.
    pub(crate) fn redact(&mut self) {
        let redact = |text: &mut String| {
            let spans = pii::find(text);
            if !spans.is_empty() {
                *text = pii::redact(text, &spans);
            }
        };
        match self {
            Self::Text(text) => redact(text),
            Self::Pair(pair) => {
                pair.prompt.iter_mut().for_each(|turn| redact(&mut turn.content));
                redact(&mut pair.chosen);
                redact(&mut pair.rejected);
            }
        }
    }
}

/// Reads a pair of transcripts; they share all but the last turn. The error is the reason in the figures.
pub(crate) fn parse_pair(chosen: &str, rejected: &str) -> Result<Pair, &'static str> {
    let (prompt, chosen) = parse_transcript(chosen)?;
    let (other, rejected) = parse_transcript(rejected)?;
    if prompt != other {
        return Err("promptsDiffer");
    }
    if chosen.is_empty() || rejected.is_empty() {
        return Err("emptyAnswer");
    }
    if chosen == rejected {
        return Err("equalAnswers");
    }
    Ok(Pair {
        prompt,
        chosen,
        rejected,
    })
}

/// The turns of `\n\nHuman: …\n\nAssistant: …` before the last assistant's, and that one.
fn parse_transcript(transcript: &str) -> Result<(Vec<Message>, String), &'static str> {
    const MARKERS: [(&str, &str); 2] = [("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant")];
    let mut turns: Vec<Message> = Vec::new();
    let mut rest = transcript.trim_end();
    while !rest.is_empty() {
        let marker = MARKERS
            .iter()
            .find(|(marker, _)| rest.starts_with(marker))
            .ok_or("malformedTranscript")?;
        rest = &rest[marker.0.len()..];
        let end = MARKERS
            .iter()
            .filter_map(|(marker, _)| rest.find(marker))
            .min()
            .unwrap_or(rest.len());
        turns.push(Message {
            role: marker.1.into(),
            content: rest[..end].trim().to_owned(),
        });
        rest = &rest[end..];
    }
    match turns.pop() {
        Some(last) if last.role == "assistant" && turns.first().is_some_and(|turn| turn.role == "user") => {
            Ok((turns, last.content))
        }
        _ => Err("malformedTranscript"),
    }
}

/// Whether the record of this group is held out, under this seed.
pub(crate) fn is_held_out(group: u128, seed: u64, percent: u8) -> bool {
    let hash = digest([&group.to_le_bytes()[..], &seed.to_le_bytes()[..]]) as u64;
    (u128::from(hash) * 100) >> 64 < u128::from(percent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transcripts_are_split_at_the_last_answer() {
        let shared = "\n\nHuman: Who wrote it?\n\nAssistant: Who knows.\n\nHuman: Guess.\n\nAssistant:";
        let pair = parse_pair(
            &format!("{shared} Kyd, says he.\n"),
            &format!("{shared} Marlowe\n\nor Lyly."),
        )
        .unwrap();
        let turns: Vec<_> = pair
            .prompt
            .iter()
            .map(|turn| (turn.role.as_str(), turn.content.as_str()))
            .collect();
        assert_eq!(
            turns,
            [
                ("user", "Who wrote it?"),
                ("assistant", "Who knows."),
                ("user", "Guess.")
            ]
        );
        assert_eq!(
            (pair.chosen.as_str(), pair.rejected.as_str()),
            ("Kyd, says he.", "Marlowe\n\nor Lyly.")
        );
        for (chosen, rejected, reason) in [
            (shared.to_owned(), format!("{shared} x"), "emptyAnswer"),
            (format!("{shared} x"), format!("{shared} x "), "equalAnswers"),
            (
                format!("{shared} x"),
                "\n\nHuman: Else\n\nAssistant: y".into(),
                "promptsDiffer",
            ),
            ("Human: x".into(), "y".into(), "malformedTranscript"),
            ("\n\nHuman: x".into(), "\n\nHuman: x".into(), "malformedTranscript"),
            (String::new(), String::new(), "malformedTranscript"),
        ] {
            assert_eq!(parse_pair(&chosen, &rejected), Err(reason));
        }
    }

    #[test]
    fn the_split_keeps_groups_together_and_its_share() {
        let pair = |question: &str, answer: &str| {
            Body::Pair(
                parse_pair(
                    &format!("\n\nHuman: {question}\n\nAssistant: {answer}"),
                    "\n\nHuman: q\n\nAssistant: r",
                )
                .unwrap_or(Pair {
                    prompt: vec![Message {
                        role: "user".into(),
                        content: question.into(),
                    }],
                    chosen: answer.into(),
                    rejected: "r".into(),
                }),
            )
        };
        assert_eq!(pair("Why  so?", "a").group(&[]), pair("why so?", "b").group(&[1]));
        assert_ne!(pair("Why?", "a").group(&[]), pair("How?", "a").group(&[]));
        let held_out = (0..10_000u128).filter(|group| is_held_out(group * 7, 17, 10)).count();
        assert!((900..1100).contains(&held_out), "{held_out}");
        assert!((0..1000).all(|group| !is_held_out(group, 17, 0)));
        assert!(
            (0..100).any(|group| is_held_out(group, 1, 50) != is_held_out(group, 2, 50)),
            "the seed matters"
        );
    }
}

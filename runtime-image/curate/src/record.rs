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
    ///
    /// `text` is the digest of all of its normalized text.
    pub(crate) fn group(&self, text: u128) -> u128 {
        match self {
            Self::Text(_) => text,
            Self::Pair(pair) => {
                let first = pair.prompt.first().map_or("", |turn| turn.content.as_str());
                let normalized = first.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
                digest([normalized.as_bytes()])
            }
        }
    }

    /// Kinds of the spans of personal data in it; if asked for, they are replaced by tags.
    pub(crate) fn personal_data(&mut self, redact: bool) -> Vec<PiiKind> {
        let mut kinds = Vec::new();
        let mut look = |text: &mut String| {
            let spans = pii::find(text);
            kinds.extend(spans.iter().map(|(kind, _)| *kind));
            if redact && !spans.is_empty() {
                *text = pii::redact(text, &spans);
            }
        };
        match self {
            Self::Text(text) => look(text),
            Self::Pair(pair) => {
                pair.prompt.iter_mut().for_each(|turn| look(&mut turn.content));
                look(&mut pair.chosen);
                look(&mut pair.rejected);
            }
        }
        kinds
    }
}

/// `origin` without what an address may say of a person: user, query and fragment, and spans of personal data.
pub(crate) fn impersonal_origin(origin: &str) -> String {
    let mut origin = origin.to_owned();
    if let Some(at) = origin.find("://").map(|at| at + 3) {
        let end = origin.find(['?', '#']).unwrap_or(origin.len());
        origin.truncate(end.max(at));
        let host_end = origin[at..].find('/').map_or(origin.len(), |slash| at + slash);
        if let Some(user_end) = origin[at..host_end].rfind('@') {
            origin.replace_range(at..=at + user_end, "");
        }
    }
    pii::redact(&origin, &pii::find(&origin))
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
        assert_eq!(pair("Why  so?", "a").group(0), pair("why so?", "b").group(1));
        assert_ne!(pair("Why?", "a").group(0), pair("How?", "a").group(0));
        let held_out = (0..10_000u128).filter(|group| is_held_out(group * 7, 17, 10)).count();
        assert!((900..1100).contains(&held_out), "{held_out}");
        assert!((0..1000).all(|group| !is_held_out(group, 17, 0)));
        assert!(
            (0..100).any(|group| is_held_out(group, 1, 50) != is_held_out(group, 2, 50)),
            "the seed matters"
        );
    }
    #[test]
    fn an_origin_says_where_a_record_is_from_and_nothing_of_a_person() {
        for (origin, expected) in [
            (
                "https://bob:secret@globe.example/a/b.html?email=bob@globe.example#bob",
                "https://globe.example/a/b.html",
            ),
            ("http://globe.example?user=bob", "http://globe.example"),
            ("http://globe.example/@bob/1", "http://globe.example/@bob/1"),
            (
                "https://globe.example/of/bob@globe.example/",
                "https://globe.example/of/<EMAIL>/",
            ),
            ("sub/file#2.jsonl#17", "sub/file#2.jsonl#17"),
        ] {
            assert_eq!(impersonal_origin(origin), expected);
        }
    }
}

//! Quality rules, a row each: name, filter, published threshold, what it measures.
//!
//! Gopher: Rae et al. 2021, tables A1 and A2. C4: Raffel et al. 2020. FineWeb: Penedo et al. 2024. Definitions follow
//! datatrove, which FineWeb was made with. Words are split at white space and punctuation, so the rules fit languages that
//! write spaces.

mod text;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::LazyLock;

use regex::Regex;
use strata_contract::{Quality, QualityPreset, QualityRule};

pub(crate) use text::Analysis;

/// A published filter: rules that are applied together, in the order of [`RULES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Filter {
    GopherRepetition,
    GopherQuality,
    C4,
    FineWeb,
}

/// What a rule measures, and which side of the threshold is dropped.
#[derive(Clone, Copy)]
enum Test {
    /// The document is dropped below the threshold.
    Min(fn(&Analysis<'_>, &str) -> f64),
    /// The document is dropped above the threshold.
    Max(fn(&Analysis<'_>, &str) -> f64),
    /// A line, or the document because of it, is dropped.
    Line(fn(&str, f64) -> LineVerdict),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LineVerdict {
    Keep,
    DropLine,
    DropDocument,
}

struct Rule {
    rule: QualityRule,
    filter: Filter,
    threshold: f64,
    test: Test,
}

const fn row(rule: QualityRule, filter: Filter, threshold: f64, test: Test) -> Rule {
    Rule {
        rule,
        filter,
        threshold,
        test,
    }
}

use Filter::{C4, FineWeb, GopherQuality, GopherRepetition};
use QualityRule as Q;
use Test::{Line, Max, Min};

/// Limits of the most frequent n-grams' share of characters; `GopherTopNgrams` scales them.
const TOP_NGRAMS: [(usize, f64); 3] = [(2, 0.20), (3, 0.18), (4, 0.16)];
/// Limits of repeated n-grams' share of characters; `GopherDuplicateNgrams` scales them.
const DUPLICATE_NGRAMS: [(usize, f64); 6] = [(5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)];

const RULES: [Rule; 23] = [
    row(
        Q::GopherDuplicateParagraphs,
        GopherRepetition,
        0.30,
        Max(|a, _| a.duplicate_paragraphs()),
    ),
    row(
        Q::GopherDuplicateParagraphCharacters,
        GopherRepetition,
        0.20,
        Max(|a, _| a.duplicate_paragraph_characters()),
    ),
    row(
        Q::GopherDuplicateLines,
        GopherRepetition,
        0.30,
        Max(|a, _| a.duplicate_lines()),
    ),
    row(
        Q::GopherDuplicateLineCharacters,
        GopherRepetition,
        0.20,
        Max(|a, _| a.duplicate_line_characters()),
    ),
    row(
        Q::GopherTopNgrams,
        GopherRepetition,
        1.0,
        Max(|a, _| a.top_ngrams(&TOP_NGRAMS)),
    ),
    row(
        Q::GopherDuplicateNgrams,
        GopherRepetition,
        1.0,
        Max(|a, _| a.duplicate_ngrams(&DUPLICATE_NGRAMS)),
    ),
    row(Q::GopherMinWords, GopherQuality, 50.0, Min(|a, _| a.words() as f64)),
    row(
        Q::GopherMaxWords,
        GopherQuality,
        100_000.0,
        Max(|a, _| a.words() as f64),
    ),
    row(
        Q::GopherMinMeanWordLength,
        GopherQuality,
        3.0,
        Min(|a, _| a.mean_word_length()),
    ),
    row(
        Q::GopherMaxMeanWordLength,
        GopherQuality,
        10.0,
        Max(|a, _| a.mean_word_length()),
    ),
    row(
        Q::GopherSymbolWordRatio,
        GopherQuality,
        0.1,
        Max(|a, _| a.symbol_ratio()),
    ),
    row(Q::GopherBulletLines, GopherQuality, 0.9, Max(|a, _| a.bullet_lines())),
    row(
        Q::GopherEllipsisLines,
        GopherQuality,
        0.3,
        Max(|a, _| a.ellipsis_lines()),
    ),
    row(
        Q::GopherAlphabeticWords,
        GopherQuality,
        0.8,
        Min(|a, _| a.alphabetic_share()),
    ),
    row(Q::GopherStopWords, GopherQuality, 2.0, Min(|a, _| a.stop_words())),
    row(Q::C4LongWord, C4, 1000.0, Line(long_word)),
    row(Q::C4ShortLine, C4, 3.0, Line(short_line)),
    row(Q::C4Boilerplate, C4, 1.0, Line(boilerplate)),
    row(
        Q::C4MinSentences,
        C4,
        5.0,
        Min(|_, text| text.lines().map(text::sentences).sum::<usize>() as f64),
    ),
    row(
        Q::FineWebPunctuatedLines,
        FineWeb,
        0.12,
        Min(|a, _| a.punctuated_lines()),
    ),
    row(Q::FineWebShortLines, FineWeb, 0.67, Max(|a, _| a.short_lines())),
    row(
        Q::FineWebDuplicateLineCharacters,
        FineWeb,
        0.01,
        Max(|a, _| a.duplicate_line_characters_of_lines()),
    ),
    row(
        Q::FineWebNewlinesPerWord,
        FineWeb,
        0.3,
        Max(|a, _| a.newlines_per_word()),
    ),
];

fn long_word(line: &str, most_characters: f64) -> LineVerdict {
    let most = most_characters.max(0.0) as usize;
    match line.split_whitespace().any(|word| word.chars().nth(most).is_some()) {
        true => LineVerdict::DropLine,
        false => LineVerdict::Keep,
    }
}

fn short_line(line: &str, fewest_words: f64) -> LineVerdict {
    match (line.split_whitespace().count() as f64) < fewest_words {
        true => LineVerdict::DropLine,
        false => LineVerdict::Keep,
    }
}

fn boilerplate(line: &str, switch: f64) -> LineVerdict {
    const POLICIES: [&str; 6] = [
        "terms of use",
        "privacy policy",
        "cookie policy",
        "uses cookies",
        "use of cookies",
        "use cookies",
    ];
    let line = line.to_lowercase();
    if switch <= 0.0 {
        LineVerdict::Keep
    } else if line.contains("lorem ipsum") {
        LineVerdict::DropDocument
    } else if line.contains("javascript") {
        LineVerdict::DropLine
    } else if line.contains('{') {
        LineVerdict::DropDocument
    } else if POLICIES.iter().any(|policy| line.contains(policy)) {
        LineVerdict::DropLine
    } else {
        LineVerdict::Keep
    }
}

/// The rules of a configuration, with their thresholds.
///
/// They judge in this order: [`QualityFilter::judge_whole`], [`QualityFilter::drop_lines`], and on what that leaves
/// [`QualityFilter::judge_rest`].
pub(crate) struct QualityFilter {
    /// The rules that are on, by whether they judge a text before lines are dropped from it.
    whole: Vec<(&'static Rule, f64)>,
    rest: Vec<(&'static Rule, f64)>,
}

impl QualityFilter {
    /// The rules of `quality`: those of its preset, with its overrides; the rule that is overridden and not in the preset
    /// is the error.
    pub(crate) fn new(quality: &Quality) -> Result<Self, QualityRule> {
        let filters: &[Filter] = match quality.preset {
            QualityPreset::FineWeb => &[GopherRepetition, GopherQuality, C4, FineWeb],
            QualityPreset::Gopher => &[GopherRepetition, GopherQuality],
            QualityPreset::C4 => &[C4],
        };
        let overrides: BTreeMap<QualityRule, Option<f64>> = quality
            .overrides
            .iter()
            .map(|entry| (entry.rule, entry.threshold))
            .collect();
        let of = |filter: Filter| RULES.iter().filter(move |rule| rule.filter == filter);
        let known = |rule: &QualityRule| filters.iter().any(|filter| of(*filter).any(|row| row.rule == *rule));
        if let Some(unknown) = overrides.keys().find(|rule| !known(rule)) {
            return Err(*unknown);
        }
        let threshold = |rule: &'static Rule| {
            let threshold = overrides.get(&rule.rule).copied().unwrap_or(Some(rule.threshold));
            threshold.map(|threshold| (rule, threshold))
        };
        let before = |filter: &&Filter| matches!(filter, GopherRepetition | GopherQuality);
        let (whole, rest): (Vec<&Filter>, Vec<&Filter>) = filters.iter().partition(before);
        let rules = |filters: Vec<&Filter>| {
            let rules = filters.into_iter().flat_map(|filter| of(*filter));
            rules.filter_map(threshold).collect()
        };
        Ok(Self {
            whole: rules(whole),
            rest: rules(rest),
        })
    }

    /// The rule that drops a text as it was read.
    pub(crate) fn judge_whole(&self, text: &str, analysis: &Analysis<'_>) -> Result<(), QualityRule> {
        judge(&self.whole, text, analysis)
    }

    /// The rule that drops a text of which [`QualityFilter::drop_lines`] left this.
    pub(crate) fn judge_rest(&self, text: &str, analysis: &Analysis<'_>) -> Result<(), QualityRule> {
        judge(&self.rest, text, analysis)
    }

    /// `text` without citations and the lines that a rule drops (`None`: it keeps all), or the rule that drops the
    /// document; `counts` counts the lines by rule.
    pub(crate) fn drop_lines(
        &self,
        text: &str,
        counts: &mut BTreeMap<String, u64>,
    ) -> Result<Option<String>, QualityRule> {
        static CITATION: LazyLock<Regex> = LazyLock::new(|| {
            Regex::new(r"\[\d*\]|\[edit\]|\[citation needed\]").expect("the pattern is a constant that a test compiles")
        });
        let line_rule = |&(rule, threshold): &(&'static Rule, f64)| match rule.test {
            Line(judge) => Some((rule.rule, judge, threshold)),
            _ => None,
        };
        let rules: Vec<_> = self.rest.iter().filter_map(line_rule).collect();
        if rules.is_empty() {
            return Ok(None);
        }
        let mut kept: Vec<Cow<'_, str>> = Vec::new();
        let mut changed = false;
        'lines: for line in text.lines() {
            let line = CITATION.replace_all(line, "");
            changed |= matches!(line, Cow::Owned(_));
            for (rule, judge, threshold) in &rules {
                match judge(line.trim(), *threshold) {
                    LineVerdict::Keep => {}
                    LineVerdict::DropLine => {
                        changed = true;
                        // An empty line is a border between paragraphs; losing it is not worth a count.
                        if !line.trim().is_empty() {
                            *counts.entry(format!("{rule:?}")).or_default() += 1;
                        }
                        continue 'lines;
                    }
                    LineVerdict::DropDocument => return Err(*rule),
                }
            }
            kept.push(line);
        }
        let lines = kept.iter().map(|line| line.trim_end()).collect::<Vec<_>>();
        Ok(changed.then(|| lines.join("\n").trim().to_owned()))
    }
}

fn judge(rules: &[(&'static Rule, f64)], text: &str, analysis: &Analysis<'_>) -> Result<(), QualityRule> {
    let drops = |&&(rule, threshold): &&(&'static Rule, f64)| match rule.test {
        Min(measure) => measure(analysis, text) < threshold,
        Max(measure) => measure(analysis, text) > threshold,
        Line(_) => false,
    };
    rules.iter().find(drops).map_or(Ok(()), |(rule, _)| Err(rule.rule))
}

#[cfg(test)]
mod tests {
    use super::*;
    use strata_contract::QualityOverride;

    /// A document that every rule keeps; tests change it by one thing.
    fn good() -> String {
        let line = |n: usize| {
            format!(
                "The company number {n} of players went with a cart to the town of York, and that was year {}. \
                 They have a stage of oak that {} carpenters built in {n} days, with curtains to be drawn by hand.",
                n * 17,
                n + 40,
            )
        };
        const TAILS: [&str; 6] = [
            "Nobody in the market square had seen such costumes before, so the crowd stayed until nightfall.",
            "Rain spoiled the second scene, but the clown sang a ballad about geese and saved the afternoon.",
            "An apothecary lent them candles, which cost more than every ticket sold on that evening.",
            "Later a magistrate asked for their licence, read it twice, and let everybody go home.",
            "What happened to the painted backcloth afterwards remains unknown to historians of drama.",
            "Some letters mention it being cut up for sails, though sailors denied ever buying any.",
        ];
        TAILS
            .iter()
            .enumerate()
            .map(|(n, tail)| format!("{} {tail}", line(n)))
            .collect::<Vec<_>>()[..]
            .join("\n\n")
    }

    fn quality(preset: QualityPreset, overrides: &[(QualityRule, Option<f64>)]) -> QualityFilter {
        let overrides = overrides
            .iter()
            .map(|&(rule, threshold)| QualityOverride { rule, threshold })
            .collect();
        QualityFilter::new(&Quality { preset, overrides }).unwrap()
    }

    /// The text without lines that were dropped, if any were, or the rule that drops it.
    fn judge(filter: &QualityFilter, text: &str) -> Result<Option<String>, QualityRule> {
        filter.judge_whole(text, &Analysis::new(text))?;
        let edited = filter.drop_lines(text, &mut BTreeMap::new())?;
        let text = edited.as_deref().unwrap_or(text);
        filter.judge_rest(text, &Analysis::new(text))?;
        Ok(edited)
    }

    #[test]
    fn every_rule_drops_what_it_was_published_for() {
        let good = good();
        // Gopher's n-gram rules judge this synthetic text's parallel sentences; they have rows of their own.
        let calm = [
            (Q::GopherDuplicateNgrams, None),
            (Q::GopherTopNgrams, None),
            (Q::C4ShortLine, None),
        ];
        let lines = |line: &str, count: usize| vec![line; count].join("\n");
        let filler = |count: usize| (0..count).map(|i| format!("word{i}")).collect::<Vec<_>>().join(" ");
        let with = |tail: String| format!("{good}\n\n{tail}");
        let cases: Vec<(QualityRule, String)> = vec![
            (
                Q::GopherMinWords,
                "The end of the play. And that was it. One. Two. Three.".into(),
            ),
            (Q::GopherMaxWords, with(filler(100_001))),
            (Q::GopherMinMeanWordLength, with(lines("a b c d e f. ", 1).repeat(200))),
            (
                Q::GopherMaxMeanWordLength,
                with(filler(200).replace("word", "incomprehensibilities")),
            ),
            (Q::GopherSymbolWordRatio, with("# tag ".repeat(100))),
            (Q::GopherBulletLines, filler(400).replace(' ', " and that\n- ")),
            (Q::GopherEllipsisLines, with(filler(40).replace(' ', " and so on...\n"))),
            (
                Q::GopherAlphabeticWords,
                with((0..200).map(|i| format!("{i} ")).collect()),
            ),
            (
                Q::GopherStopWords,
                good.replace("the ", "ye ")
                    .replace("of ", "o ")
                    .replace("with", "mid")
                    .replace("that", "yt")
                    .replace("and", "et")
                    .replace("have", "hold")
                    .replace("to ", "unto ")
                    .replace("be ", "by "),
            ),
            (Q::GopherDuplicateLines, with(lines("Exit.", 40))),
            (Q::GopherDuplicateParagraphs, with(["Exit."; 12].join("\n\n"))),
            (Q::C4MinSentences, good.replace(['.', '!', '?'], ",").replace('\n', " ")),
            (Q::C4Boilerplate, with("Lorem ipsum dolor sit amet.".into())),
            (Q::C4Boilerplate, with("function draw() {".into())),
            (
                Q::FineWebPunctuatedLines,
                good.replace(". ", ".\n").replace(".\n", ",\n").replace(", ", ". "),
            ),
            (
                Q::FineWebShortLines,
                with((0..60).map(|i| format!("Enter guard number {i}.\n")).collect()),
            ),
            (
                Q::FineWebDuplicateLineCharacters,
                with(lines("Exit all, with drums.", 3)),
            ),
            (
                Q::FineWebNewlinesPerWord,
                with((0..200).map(|i| format!("Line{i} goes\n\n\n")).collect()),
            ),
        ];
        let all_but = |rule: QualityRule| {
            // Rules that would drop the case first are switched off, as the case is about `rule`.
            let others = RULES.iter().map(|row| row.rule).filter(|other| *other != rule);
            quality(
                QualityPreset::FineWeb,
                &others.map(|rule| (rule, None)).collect::<Vec<_>>(),
            )
        };
        assert_eq!(judge(&quality(QualityPreset::FineWeb, &calm), &good), Ok(None));
        for (rule, text) in cases {
            assert_eq!(judge(&all_but(rule), &text), Err(rule), "{rule:?}");
            assert_eq!(judge(&all_but(rule), &good), Ok(None), "{rule:?}");
        }
    }

    #[test]
    fn repeated_phrases_are_dropped_and_a_threshold_scales_the_limits() {
        let chorus = "Hey nonny nonny, sigh no more, ladies. ".repeat(30);
        let text = format!("{}\n\n{chorus}", good());
        let only = |rule, threshold| {
            let others = RULES
                .iter()
                .map(|row| row.rule)
                .filter(|other| *other != rule)
                .map(|rule| (rule, None));
            quality(
                QualityPreset::FineWeb,
                &others.chain([(rule, threshold)]).collect::<Vec<_>>(),
            )
        };
        for rule in [Q::GopherTopNgrams, Q::GopherDuplicateNgrams] {
            let dropped = judge(&only(rule, Some(0.5)), &text);
            assert_eq!(dropped, Err(rule));
            assert_eq!(judge(&only(rule, Some(1000.0)), &text), Ok(None), "{rule:?}");
        }
        assert_eq!(
            judge(&only(Q::GopherDuplicateNgrams, Some(1.0)), &text),
            Err(Q::GopherDuplicateNgrams)
        );
    }

    #[test]
    fn line_rules_drop_lines_and_count_them_and_citations_go() {
        let filter = quality(QualityPreset::C4, &[(Q::C4MinSentences, Some(1.0))]);
        let long = "x".repeat(1001);
        let text = format!(
            "A line[12] that stays here.[citation needed]\nShort one\nPlease enable JavaScript now.\nOur Privacy Policy is long.\n{long} a b"
        );
        let mut lines = BTreeMap::new();
        let left = filter.drop_lines(&text, &mut lines);
        assert_eq!(left, Ok(Some("A line that stays here.".into())));
        assert_eq!(judge(&filter, &text), left);
        let expected =
            [("C4Boilerplate", 2), ("C4LongWord", 1), ("C4ShortLine", 1)].map(|(name, n)| (name.to_owned(), n));
        assert_eq!(lines, BTreeMap::from(expected));
    }

    #[test]
    fn an_override_of_a_rule_that_the_preset_lacks_is_refused() {
        let overrides = vec![QualityOverride {
            rule: Q::FineWebShortLines,
            threshold: None,
        }];
        let quality = Quality {
            preset: QualityPreset::Gopher,
            overrides,
        };
        assert_eq!(QualityFilter::new(&quality).err(), Some(Q::FineWebShortLines));
    }
}

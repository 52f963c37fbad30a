//! What servers call their figures, in one table, and what is read of them.
//!
//! A figure that got another name must not stop scaling: every name that a server has had is here, and the first that is
//! found counts. A figure that is not found is absent, which is not zero.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::exposition::sample;
use super::{Histogram, Load};

/// Labels that name the model of a series.
const MODEL_LABELS: [&str; 2] = ["model_name", "model"];
/// Most names of other models that a message quotes.
const QUOTED_MODELS: usize = 3;
/// Longest part of another model's name that a message quotes, in characters.
const QUOTED_CHARS: usize = 80;

/// Something that a server says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Figure {
    /// Requests that are computed now.
    Running,
    /// Requests that wait for a place now.
    Waiting,
    /// Share of the KV-cache in use, 0 to 1.
    KvCacheUtilization,
    /// Prompt tokens so far.
    PromptTokens,
    /// Generated tokens so far.
    GenerationTokens,
    /// Finished requests so far.
    Finished,
    /// Times to the first token so far.
    TimeToFirstToken,
    /// Times between two tokens so far.
    InterTokenLatency,
}

/// How the series of one pod become one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// Added: the engines of a pod share its requests.
    Sum,
    /// The mean: the engines of a pod each have a cache.
    Mean,
    /// A histogram's buckets, each added, and its sum.
    Buckets,
}

/// What a sample is of its figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// The number, or the sum of a histogram.
    Number,
    /// A bucket of a histogram.
    Bucket,
}

/// Every figure, with all names that it has or had: ours and vLLM's, SGLang's, TGI's, TensorRT-LLM's.
const TABLE: [(Figure, Shape, &[&str]); 8] = [
    (
        Figure::Running,
        Shape::Sum,
        &[
            "vllm:num_requests_running",
            "sglang:num_running_reqs",
            "tgi_batch_current_size",
            "trtllm_num_requests_running",
        ],
    ),
    (
        Figure::Waiting,
        Shape::Sum,
        &[
            "vllm:num_requests_waiting",
            "sglang:num_queue_reqs",
            "tgi_queue_size",
            "trtllm_num_requests_waiting",
        ],
    ),
    (
        Figure::KvCacheUtilization,
        Shape::Mean,
        &[
            "vllm:kv_cache_usage_perc",
            "vllm:gpu_cache_usage_perc",
            "sglang:token_usage",
            "trtllm_kv_cache_utilization",
        ],
    ),
    (
        Figure::PromptTokens,
        Shape::Sum,
        &[
            "vllm:prompt_tokens_total",
            "sglang:prompt_tokens_total",
            "tgi_request_input_length_sum",
            "trtllm_prompt_tokens_total",
        ],
    ),
    (
        Figure::GenerationTokens,
        Shape::Sum,
        &[
            "vllm:generation_tokens_total",
            "sglang:generation_tokens_total",
            "tgi_request_generated_tokens_sum",
            "trtllm_generation_tokens_total",
        ],
    ),
    (
        Figure::Finished,
        Shape::Sum,
        &[
            "vllm:request_success_total",
            "sglang:num_requests_total",
            "tgi_request_success",
            "trtllm_request_success_total",
        ],
    ),
    (
        Figure::TimeToFirstToken,
        Shape::Buckets,
        &[
            "vllm:time_to_first_token_seconds",
            "sglang:time_to_first_token_seconds",
            "trtllm_time_to_first_token_seconds",
        ],
    ),
    (
        Figure::InterTokenLatency,
        Shape::Buckets,
        &[
            "vllm:inter_token_latency_seconds",
            "vllm:time_per_output_token_seconds",
            "sglang:inter_token_latency_seconds",
            "sglang:time_per_output_token_seconds",
            "tgi_request_mean_time_per_token_duration",
            "trtllm_time_per_output_token_seconds",
        ],
    ),
];

impl Figure {
    /// All names under which servers say it.
    pub fn names(self) -> &'static [&'static str] {
        TABLE
            .iter()
            .find(|(figure, ..)| *figure == self)
            .map_or(&[], |(_, _, names)| names)
    }
}

/// Why a text says nothing about a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unread {
    /// It has none of the names of the table.
    NoFigures,
    /// It has them, of these models.
    OtherModels(Vec<String>),
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoFigures => f.write_str("it shows none of the metrics that servers of models have"),
            Self::OtherModels(models) => write!(f, "its metrics are of the model {}", models.join(", ")),
        }
    }
}

/// What one pod says at one moment. Counters and histograms are sums since its start.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
    numbers: BTreeMap<Figure, f64>,
    histograms: BTreeMap<Figure, Histogram>,
}

/// The series of one name, added up.
#[derive(Default)]
struct Series {
    sum: f64,
    count: f64,
    buckets: Vec<(f64, f64)>,
}

impl Reading {
    /// What a text in Prometheus' format says of `model`. Series without a label for the model are of any.
    ///
    /// # Errors
    /// It says nothing of it.
    pub fn parse(text: &str, model: &str) -> Result<Self, Unread> {
        let mut series: BTreeMap<(Figure, usize), Series> = BTreeMap::new();
        let mut others = BTreeSet::new();
        for sample in text.lines().filter_map(sample) {
            let Some((figure, rank, part)) = known(sample.name) else {
                continue;
            };
            let named = MODEL_LABELS.iter().find_map(|label| sample.label(label));
            if let Some(other) = named.filter(|named| named != model) {
                others.insert(other.chars().take(QUOTED_CHARS).collect::<String>());
                continue;
            }
            let bound = match part {
                Part::Number => None,
                Part::Bucket => match sample.label("le").and_then(|le| le.parse::<f64>().ok()) {
                    Some(bound) if !bound.is_nan() => Some(bound),
                    _ => continue,
                },
            };
            let series = series.entry((figure, rank)).or_default();
            match bound {
                None => {
                    series.sum += sample.value;
                    series.count += 1.0;
                }
                Some(bound) => match series.buckets.iter_mut().find(|(known, _)| *known == bound) {
                    Some((_, count)) => *count += sample.value,
                    None => series.buckets.push((bound, sample.value)),
                },
            }
        }
        if series.is_empty() {
            return Err(match others.is_empty() {
                true => Unread::NoFigures,
                false => Unread::OtherModels(others.into_iter().take(QUOTED_MODELS).collect()),
            });
        }
        let mut reading = Reading::default();
        for (figure, shape, names) in TABLE {
            let Some(found) = (0..names.len()).find_map(|rank| series.remove(&(figure, rank))) else {
                continue;
            };
            match shape {
                Shape::Sum => drop(reading.numbers.insert(figure, found.sum)),
                Shape::Mean => drop(reading.numbers.insert(figure, found.sum / found.count)),
                Shape::Buckets => {
                    let histogram = Histogram {
                        buckets: ascending(found.buckets),
                        sum_seconds: (found.count > 0.0).then_some(found.sum),
                    };
                    reading.histograms.insert(figure, histogram);
                }
            }
        }
        Ok(reading)
    }

    /// Whether the pod says this.
    pub fn has(&self, figure: Figure) -> bool {
        self.numbers.contains_key(&figure) || self.histograms.contains_key(&figure)
    }

    /// How the pod stands, and what it did since it said `before`, `seconds` ago.
    ///
    /// What counts downwards was started anew: then what it did is all that it says, as with Prometheus' `increase`.
    pub fn load(&self, before: Option<(&Reading, f64)>) -> Load {
        let before = before.filter(|(_, seconds)| *seconds > 0.0);
        let now = |figure| self.numbers.get(&figure).copied();
        let rate = |figure| {
            let (earlier, _) = before?;
            let (is, was) = (now(figure)?, *earlier.numbers.get(&figure)?);
            Some(if is < was { is } else { is - was })
        };
        let histogram = |figure| {
            let (earlier, _) = before?;
            let (is, was) = (self.histograms.get(&figure)?, earlier.histograms.get(&figure)?);
            Some(since(is, was))
        };
        Load {
            window_seconds: before.map_or(0.0, |(_, seconds)| seconds),
            running: now(Figure::Running),
            waiting: now(Figure::Waiting),
            kv_cache_utilization: now(Figure::KvCacheUtilization),
            prompt_tokens: rate(Figure::PromptTokens),
            generation_tokens: rate(Figure::GenerationTokens),
            finished: rate(Figure::Finished),
            time_to_first_token: histogram(Figure::TimeToFirstToken),
            inter_token_latency: histogram(Figure::InterTokenLatency),
        }
    }
}

/// The figure with this name, the place of the name among its names, and what the sample is of it.
fn known(name: &str) -> Option<(Figure, usize, Part)> {
    TABLE.iter().find_map(|(figure, shape, names)| {
        let parts = match shape {
            Shape::Buckets => [
                (name.strip_suffix("_bucket"), Part::Bucket),
                (name.strip_suffix("_sum"), Part::Number),
            ],
            _ => [(Some(name), Part::Number), (None, Part::Number)],
        };
        parts.into_iter().find_map(|(name, part)| {
            let rank = names.iter().position(|known| Some(*known) == name)?;
            Some((*figure, rank, part))
        })
    })
}

/// Buckets by their bounds, the last infinite, none smaller than one before it.
fn ascending(mut buckets: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut most: f64 = 0.0;
    for (_, count) in &mut buckets {
        most = most.max(*count);
        *count = most;
    }
    if buckets.last().is_none_or(|(bound, _)| *bound != f64::INFINITY) {
        buckets.push((f64::INFINITY, most));
    }
    buckets
}

/// What was observed between two moments.
fn since(is: &Histogram, was: &Histogram) -> Histogram {
    let pairs = || is.buckets.iter().zip(&was.buckets);
    let same = is.buckets.len() == was.buckets.len() && pairs().all(|(is, was)| is.0 == was.0 && is.1 >= was.1);
    if !same {
        return is.clone();
    }
    Histogram {
        buckets: ascending(pairs().map(|(is, was)| (is.0, is.1 - was.1)).collect()),
        sum_seconds: is.sum_seconds.zip(was.sum_seconds).map(|(is, was)| is - was),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As the servers print them, shortened to what is read.
    const OURS: &str = r#"
# HELP vllm:kv_cache_usage_perc Share of the cache's blocks in use, 0 to 1.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="chat"} 0.5
vllm:gpu_cache_usage_perc{engine="0",model_name="chat"} 0.9
vllm:num_requests_running{engine="0",model_name="chat"} 3
vllm:num_requests_waiting{engine="0",model_name="chat"} 2
vllm:prompt_tokens_total{engine="0",model_name="chat"} 100
vllm:request_success_total{engine="0",finished_reason="stop",model_name="chat"} 4
vllm:request_success_total{engine="0",finished_reason="length",model_name="chat"} 1
vllm:time_to_first_token_seconds_bucket{engine="0",model_name="chat",le="0.1"} 1
vllm:time_to_first_token_seconds_bucket{engine="0",model_name="chat",le="1"} 4
vllm:time_to_first_token_seconds_bucket{engine="0",model_name="chat",le="+Inf"} 5
vllm:time_to_first_token_seconds_sum{engine="0",model_name="chat"} 3.5
vllm:time_to_first_token_seconds_count{engine="0",model_name="chat"} 5
"#;
    const OLD_VLLM: &str = r#"vllm:gpu_cache_usage_perc{model_name="chat"} 0.25
vllm:num_requests_waiting{model_name="chat"} 1.0"#;
    const SGLANG: &str = r#"sglang:token_usage{model_name="chat"} 0.28
sglang:num_queue_reqs{model_name="chat"} 7.0
sglang:num_running_reqs{model_name="chat"} 2.0"#;
    const TGI: &str = "tgi_queue_size 6\ntgi_batch_current_size 5\ntgi_request_success 12";
    const TENSORRT_LLM: &str = r#"trtllm_kv_cache_utilization{engine_type="trtllm",model_name="chat"} 0.6
trtllm_num_requests_waiting{engine_type="trtllm",model_name="chat"} 3"#;

    #[test]
    fn every_servers_names_are_read_and_what_it_does_not_say_is_absent() {
        for (text, cache, waiting, running) in [
            (OURS, Some(0.5), Some(2.0), Some(3.0)),
            (OLD_VLLM, Some(0.25), Some(1.0), None),
            (SGLANG, Some(0.28), Some(7.0), Some(2.0)),
            (TGI, None, Some(6.0), Some(5.0)),
            (TENSORRT_LLM, Some(0.6), Some(3.0), None),
        ] {
            let load = Reading::parse(text, "chat").expect("it speaks of the model").load(None);
            assert_eq!(
                (load.kv_cache_utilization, load.waiting, load.running),
                (cache, waiting, running),
                "{text}"
            );
            assert_eq!(
                (load.window_seconds, load.prompt_tokens),
                (0.0, None),
                "no rates at first"
            );
        }
    }

    #[test]
    fn a_wrong_model_name_is_found_and_told_from_a_text_without_figures() {
        let unread = |text: &str, model: &str| Reading::parse(text, model).expect_err("nothing of it");
        assert_eq!(unread(SGLANG, "other"), Unread::OtherModels(vec!["chat".into()]));
        assert_eq!(unread("up 1\n{}", "chat"), Unread::NoFigures);
        assert_eq!(unread("[]", "chat"), Unread::NoFigures);
        let both = format!("{OLD_VLLM}\nvllm:num_requests_waiting{{model_name=\"other\"}} 40");
        let reading = Reading::parse(&both, "chat").expect("it speaks of the model");
        assert_eq!(
            reading.load(None).waiting,
            Some(1.0),
            "another model's requests are not ours"
        );
    }

    #[test]
    fn rates_are_of_the_time_between_two_readings_also_over_a_restart() {
        let reading = |text: &str| Reading::parse(text, "chat").expect("it speaks of the model");
        let first = reading(OURS);
        let replaced = |pairs: &[(&str, &str)]| {
            let text = pairs
                .iter()
                .fold(OURS.to_owned(), |text, (from, to)| text.replace(from, to));
            reading(&text)
        };
        let later = replaced(&[
            ("} 100", "} 130"),
            ("le=\"1\"} 4", "le=\"1\"} 6"),
            ("le=\"+Inf\"} 5", "le=\"+Inf\"} 8"),
            (
                "_sum{engine=\"0\",model_name=\"chat\"} 3.5",
                "_sum{engine=\"0\",model_name=\"chat\"} 5",
            ),
        ]);
        let load = later.load(Some((&first, 5.0)));
        assert_eq!((load.window_seconds, load.prompt_tokens), (5.0, Some(30.0)));
        assert_eq!((load.finished, load.generation_tokens), (Some(0.0), None));
        let expected = Histogram {
            buckets: vec![(0.1, 0.0), (1.0, 2.0), (f64::INFINITY, 3.0)],
            sum_seconds: Some(1.5),
        };
        assert_eq!(load.time_to_first_token, Some(expected));
        let restarted = replaced(&[
            ("} 100", "} 10"),
            ("le=\"0.1\"} 1", "le=\"0.1\"} 0"),
            ("le=\"1\"} 4", "le=\"1\"} 1"),
            ("le=\"+Inf\"} 5", "le=\"+Inf\"} 1"),
        ]);
        let load = restarted.load(Some((&first, 5.0)));
        assert_eq!(load.prompt_tokens, Some(10.0));
        let buckets = load.time_to_first_token.expect("a histogram").buckets;
        assert_eq!(buckets, [(0.1, 0.0), (1.0, 1.0), (f64::INFINITY, 1.0)]);
    }

    #[test]
    fn labels_are_read_whatever_is_in_them() {
        let text = "vllm:num_requests_waiting{a=\"}\\\"\",model_name=\"ch\\\\at\", b=\"x\"} 3 1700000000 # {} 1";
        let load = Reading::parse(text, "ch\\at")
            .expect("it speaks of the model")
            .load(None);
        assert_eq!(load.waiting, Some(3.0));
        for odd in ["NaN", "+Inf", "-1", "", "x"] {
            let text = format!("vllm:num_requests_waiting {odd}");
            assert_eq!(Reading::parse(&text, "chat"), Err(Unread::NoFigures), "{odd}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(
            text in prop_oneof![
                any::<String>(),
                "(vllm:num_requests_waiting|vllm:time_to_first_token_seconds_bucket)[{}\"\\\\a-z=,. 0-9\u{e9}\n]{0,60}",
            ],
            again in any::<String>(),
        ) {
            let first = Reading::parse(&text, "chat").unwrap_or_default();
            let second = Reading::parse(&again, "chat").unwrap_or_default();
            let load = second.load(Some((&first, 1.0)));
            prop_assert!(load.prompt_tokens.is_none_or(|tokens| tokens >= 0.0));
        }

        #[test]
        fn what_was_observed_between_two_readings_never_counts_downwards(
            counts in proptest::collection::vec((0.0f64..100.0, 0u32..1000, 0u32..1000), 0..8),
        ) {
            let buckets = |pick: fn(&(f64, u32, u32)) -> u32| {
                let buckets = ascending(counts.iter().map(|one| (one.0, f64::from(pick(one)))).collect());
                Histogram { buckets, sum_seconds: None }
            };
            let histogram = since(&buckets(|one| one.1), &buckets(|one| one.2));
            prop_assert!(histogram.buckets.windows(2).all(|pair| pair[0].1 <= pair[1].1));
            prop_assert_eq!(histogram.buckets.last().map(|last| last.0), Some(f64::INFINITY));
        }
    }
}

//! Request traces: read, and made larger or longer without losing their shape.

use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;

use crate::engine::Request;

/// Most bytes of a trace, unpacked.
const MOST_BYTES: u64 = 1 << 30;
/// Most requests of a trace.
const MOST_REQUESTS: usize = 20_000_000;
/// Longest prompt or answer that is read, in tokens.
const MOST_TOKENS: u32 = 4_194_304;

/// Why a trace cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file.
    #[error("cannot read {path}: {source}")]
    File {
        /// Which.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// It is larger than what is read.
    #[error("{path} has more than {MOST_REQUESTS} requests or 1 GiB: cut it")]
    TooLarge {
        /// Which.
        path: String,
    },
    /// The head names not what is needed.
    #[error(
        "the first line of {path} is \"{head}\": write one that names the columns TIMESTAMP, ContextTokens and GeneratedTokens, as \
         Azure's traces have it"
    )]
    Head {
        /// Which.
        path: String,
        /// What it is.
        head: String,
    },
    /// A line.
    #[error(
        "line {line} of {path} is \"{text}\": write a time (seconds, or a date as 2023-11-16 18:15:46.68), and tokens as whole \
         numbers"
    )]
    Line {
        /// Which file.
        path: String,
        /// Which line.
        line: usize,
        /// What it is.
        text: String,
    },
    /// It has no requests.
    #[error("{path} has no requests")]
    Empty {
        /// Which.
        path: String,
    },
}

/// Requests in the order of their coming, the first one at 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// The requests.
    pub requests: Vec<Request>,
    /// Its length in seconds.
    pub seconds: f64,
}

impl Trace {
    /// Sorts requests, and begins with the first one.
    pub fn new(mut requests: Vec<Request>) -> Self {
        requests.sort_by(|a, b| a.at.total_cmp(&b.at));
        let first = requests.first().map_or(0.0, |request| request.at);
        for request in &mut requests {
            request.at -= first;
        }
        let seconds = requests.last().map_or(0.0, |request| request.at) + 1.0;
        Self { requests, seconds }
    }

    /// Reads a file in the format of Azure's public traces, gzip or not.
    ///
    /// # Errors
    /// It cannot be read, or is none; the message says where and what to write.
    pub fn read(path: &Path) -> Result<Self, TraceError> {
        let shown = path.display().to_string();
        let file = |source| TraceError::File {
            path: shown.clone(),
            source,
        };
        let mut text = String::new();
        let open = std::fs::File::open(path).map_err(file)?;
        let is_packed = path.extension().is_some_and(|end| end == "gz");
        let reader: Box<dyn Read> = match is_packed {
            true => Box::new(GzDecoder::new(open)),
            false => Box::new(open),
        };
        let size = reader.take(MOST_BYTES + 1).read_to_string(&mut text).map_err(file)?;
        if size as u64 > MOST_BYTES {
            return Err(TraceError::TooLarge { path: shown });
        }
        Self::parse(&text, &shown)
    }

    /// Reads such a file's text; `path` is for messages.
    ///
    /// # Errors
    /// As [`Trace::read`].
    pub fn parse(text: &str, path: &str) -> Result<Self, TraceError> {
        let path = path.to_owned();
        let mut lines = text.lines();
        let head = lines.next().unwrap_or_default();
        let column = |names: &[&str]| {
            let named = |column: &str| names.iter().any(|name| column.trim().eq_ignore_ascii_case(name));
            head.split(',').position(named)
        };
        let columns = (
            column(&["TIMESTAMP", "arrived_at"]),
            column(&["ContextTokens", "num_prefill_tokens"]),
            column(&["GeneratedTokens", "num_decode_tokens"]),
        );
        let (Some(at), Some(prompt), Some(output)) = columns else {
            let head = head.chars().take(80).collect();
            return Err(TraceError::Head { path, head });
        };
        let mut requests = Vec::new();
        for (index, line) in lines.enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let cells: Vec<&str> = line.split(',').map(str::trim).collect();
            let tokens = |column: usize| cells.get(column)?.parse().ok().filter(|tokens| *tokens <= MOST_TOKENS);
            let request = || {
                Some(Request {
                    at: seconds(cells.get(at)?)?,
                    prompt: tokens(prompt)?,
                    output: tokens(output)?,
                })
            };
            let Some(request) = request() else {
                let text = line.chars().take(80).collect();
                return Err(TraceError::Line {
                    path,
                    line: index + 2,
                    text,
                });
            };
            if requests.len() == MOST_REQUESTS {
                return Err(TraceError::TooLarge { path });
            }
            requests.push(request);
        }
        if requests.is_empty() {
            return Err(TraceError::Empty { path });
        }
        Ok(Self::new(requests))
    }

    /// The requests that come in a part of the time.
    pub fn part(&self, from_seconds: f64, to_seconds: f64) -> Self {
        let inside = |request: &&Request| (from_seconds..to_seconds).contains(&request.at);
        Self::new(self.requests.iter().filter(inside).copied().collect())
    }

    /// As many times the load with the same shape: each request comes `times` times within 20 seconds around its time, each
    /// with the lengths of one of its 200 neighbours.
    pub fn louder(&self, times: f64, seed: u64) -> Self {
        let mut random = Random(seed);
        let mut requests = Vec::with_capacity((self.requests.len() as f64 * times) as usize + 1);
        let mut owed = 0.0;
        for (index, request) in self.requests.iter().enumerate() {
            owed += times;
            while owed >= 1.0 {
                owed -= 1.0;
                let neighbour = index + (random.share() * 200.0) as usize;
                let lengths = self.requests[neighbour.saturating_sub(100).min(self.requests.len() - 1)];
                requests.push(Request {
                    at: (request.at + 20.0 * (random.share() - 0.5)).clamp(0.0, self.seconds),
                    ..lengths
                });
            }
        }
        Self::new(requests)
    }

    /// The trace over and over for some hours, with a day's rise and fall: at `low` of its load in the night, at all of it in the
    /// afternoon. Which requests stay is drawn.
    pub fn daily(&self, hours: f64, low: f64, seed: u64) -> Self {
        let mut random = Random(seed);
        let end = hours * 3600.0;
        let mut requests = Vec::new();
        let mut start = 0.0;
        while start < end {
            for request in &self.requests {
                let at = start + request.at;
                let hour = at / 3600.0 % 24.0;
                // Lowest at 3, highest at 15 o'clock.
                let high = 0.5 - 0.5 * ((hour - 3.0) / 24.0 * std::f64::consts::TAU).cos();
                if at < end && random.share() < low + (1.0 - low) * high {
                    requests.push(Request { at, ..*request });
                }
            }
            start += self.seconds;
        }
        Self::new(requests)
    }
}

/// Seconds, of a number or of a date without a zone.
fn seconds(text: &str) -> Option<f64> {
    if let Ok(number) = text.parse::<f64>() {
        return Some(number).filter(|number| number.is_finite());
    }
    let (date, time) = text.split_once([' ', 'T'])?;
    let time = time.split(['Z', '+']).next()?;
    let date: Vec<i64> = date.split('-').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    let clock: Vec<f64> = time.split(':').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    let (&[year, month, day], &[hour, minute, second]) = (&date[..], &clock[..]) else {
        return None;
    };
    let right = (1970..=9999).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day);
    right.then_some(())?;
    // Days since the epoch in the Gregorian calendar, years beginning in March (Howard Hinnant's days_from_civil).
    let year = if month <= 2 { year - 1 } else { year };
    let era_year = year % 400;
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = year / 400 * 146_097 + era_year * 365 + era_year / 4 - era_year / 100 + day_of_year - 719_468;
    let seconds = days as f64 * 86_400.0 + hour * 3600.0 + minute * 60.0 + second;
    Some(seconds).filter(|seconds| seconds.is_finite())
}

/// A small generator (SplitMix64), so that a seed gives the same trace everywhere and always.
pub(crate) struct Random(pub u64);

impl Random {
    /// At least 0 and below 1.
    pub(crate) fn share(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((bits ^ (bits >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

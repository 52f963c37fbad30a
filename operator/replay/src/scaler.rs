//! Who decides: the operator's policy, or one that it is compared with.

use strata_operator::autoscale::Fleet;
use strata_operator::autoscale::policy::{Memory, decide};
use strata_operator::autoscale::settings::Settings;

use crate::fleet::WINDOW_SECONDS;

/// A scaling policy, asked at a steady pace.
pub trait Scaler {
    /// How many replicas there should be.
    fn replicas(&mut self, fleet: &Fleet, wanted: u32, now_seconds: f64) -> Answer;
}

/// What a scaler says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// The replicas.
    pub replicas: u32,
    /// Why, if it says so.
    pub why: String,
}

/// The operator's own policy, the same code.
#[derive(Clone, Debug)]
pub struct Ours {
    settings: Settings,
    memory: Memory,
}

impl Ours {
    /// With these settings, and nothing learned yet.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            memory: Memory::default(),
        }
    }
}

impl Scaler for Ours {
    fn replicas(&mut self, fleet: &Fleet, _wanted: u32, now_seconds: f64) -> Answer {
        let decision = decide(&self.settings, &self.memory, fleet, now_seconds as i64);
        self.memory = decision.memory;
        Answer {
            replicas: decision.replicas,
            why: format!("{}: {}", decision.cause.name(), decision.message),
        }
    }
}

/// A number for each minute, known beforehand.
#[derive(Clone, Debug)]
pub struct Schedule(pub Vec<u32>);

impl Scaler for Schedule {
    fn replicas(&mut self, _fleet: &Fleet, wanted: u32, now_seconds: f64) -> Answer {
        let minute = (now_seconds / WINDOW_SECONDS) as usize;
        Answer {
            replicas: self.0.get(minute).copied().unwrap_or(wanted),
            why: "it was known".into(),
        }
    }
}

/// Always the same number.
#[derive(Clone, Copy, Debug)]
pub struct Fixed(pub u32);

impl Scaler for Fixed {
    fn replicas(&mut self, _fleet: &Fleet, _wanted: u32, _now_seconds: f64) -> Answer {
        Answer {
            replicas: self.0,
            why: String::new(),
        }
    }
}

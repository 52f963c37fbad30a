//! Engine × accelerator: what computes on what, as a table.

use super::table::Family;

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Strata's own, for training and serving.
    Candle,
    /// Strata's own stages that have no GPU code: curation, quantization.
    Embedded,
    /// An image that the user brings.
    Container,
}

/// A row of the table.
struct Row {
    engine: Engine,
    name: &'static str,
    families: &'static [Family],
    /// Most accelerators of one pod, and most nodes of one run; absent: as many as there are.
    accelerators: Option<u32>,
    nodes: Option<u32>,
    /// What it computes with.
    profile: Profile,
}

/// What an engine computes with, and how well: what hours are estimated from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profile {
    /// Format of numbers, as the accelerator table names it.
    pub precision: &'static str,
    /// Share of the accelerator's dense FLOP/s that is reached.
    pub efficiency_percent: u32,
}

/// Strata's own: never measured on a GPU (ADR 0014: weights are copied for each step), so a careful guess.
const OWN: Profile = Profile {
    precision: "f32",
    efficiency_percent: 10,
};
/// What published large runs reach: 38 to 43 % in Llama 3's report (arXiv 2407.21783, table 4).
const MEGATRON: Profile = Profile {
    precision: "bf16",
    efficiency_percent: 40,
};

/// The engines that a spec can name.
pub const OFFERED: &[Engine] = &[Engine::Container];

const ALL: &[Family] = &[Family::Cpu, Family::Cuda, Family::Rocm, Family::Tpu];

const ENGINES: [Row; 3] = [
    Row {
        engine: Engine::Candle,
        name: "candle",
        families: &[Family::Cpu, Family::Cuda],
        accelerators: Some(1),
        nodes: Some(1),
        profile: OWN,
    },
    Row {
        engine: Engine::Embedded,
        name: "embedded",
        families: &[Family::Cpu],
        accelerators: Some(0),
        nodes: Some(1),
        profile: OWN,
    },
    Row {
        engine: Engine::Container,
        name: "container",
        families: ALL,
        accelerators: None,
        nodes: None,
        profile: MEGATRON,
    },
];

impl Engine {
    /// What a spec's engine is here. What the spec says wrong is said elsewhere.
    pub fn of(engine: Result<crate::run::Engine<'_>, String>) -> Self {
        match engine {
            Ok(crate::run::Engine::Container(_)) => Self::Container,
            Ok(crate::run::Engine::Own("embedded")) => Self::Embedded,
            Ok(crate::run::Engine::Own(_)) | Err(_) => Self::Candle,
        }
    }

    /// What it computes with.
    pub fn profile(self) -> Profile {
        self.row().profile
    }

    fn row(self) -> &'static Row {
        ENGINES
            .iter()
            .find(|row| row.engine == self)
            .expect("every engine has a row")
    }

    /// Judges whether the engine computes on that hardware; `others` are the engines that the resource could name.
    ///
    /// # Errors
    /// A sentence that says which engine and which hardware would do.
    pub fn supports(self, family: Family, per_node: u32, nodes: u32, others: &[Engine]) -> Result<(), String> {
        let row = self.row();
        let fits = |row: &Row| {
            row.families.contains(&family)
                && row.accelerators.is_none_or(|most| per_node <= most)
                && row.nodes.is_none_or(|most| nodes <= most)
        };
        if fits(row) {
            return Ok(());
        }
        let what = match row.families.contains(&family) {
            false => {
                let can: Vec<&str> = row.families.iter().map(|family| family.name()).collect();
                format!(
                    "engine {} computes on {}, not on {}",
                    row.name,
                    can.join(" and "),
                    family.name()
                )
            }
            true => format!(
                "engine {} computes on one node with at most {} accelerator, not on {nodes} with {per_node} each",
                row.name,
                row.accelerators.unwrap_or(1)
            ),
        };
        let do_: Vec<&str> = ENGINES
            .iter()
            .filter(|row| others.contains(&row.engine) && fits(row))
            .map(|row| row.name)
            .collect();
        let instead = match do_.is_empty() {
            true => "change spec.hardware".to_owned(),
            false => format!(
                "write spec.engine: {{{}: …}}, or change spec.hardware",
                do_.join(": …} or {")
            ),
        };
        Err(format!("{what}: {instead}"))
    }
}

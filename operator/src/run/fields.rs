//! Fields of a spec as a stage reads them; each error names the field and says what to write.

use strata_api::Decimal;
use strata_contract::{Checkpoint, Gate};

/// A decimal field's value.
///
/// # Errors
/// A sentence that names the field.
pub fn decimal(field: &str, value: &Decimal) -> Result<f64, String> {
    value.value().ok_or_else(|| {
        format!(
            "{field} must be a finite decimal number, such as \"0.1\"; got {:?}",
            value.0
        )
    })
}

/// An integer field as an unsigned one.
///
/// # Errors
/// A sentence that names the field.
pub fn unsigned<A: Copy + std::fmt::Display, B: TryFrom<A>>(field: &str, value: A) -> Result<B, String> {
    B::try_from(value).map_err(|_| format!("{field} is out of range: {value}"))
}

/// Gates as the stage reads them.
///
/// # Errors
/// A sentence that names the field.
pub fn gates(gates: &[strata_api::Gate]) -> Result<Vec<Gate>, String> {
    gates
        .iter()
        .map(|gate| {
            let bound = |side: &str, bound: &Option<Decimal>| {
                let field = format!("gates[{}].{side}", gate.metric);
                bound.as_ref().map(|value| decimal(&field, value)).transpose()
            };
            Ok(Gate {
                metric: gate.metric.clone(),
                min: bound("min", &gate.min)?,
                max: bound("max", &gate.max)?,
            })
        })
        .collect()
}

/// Checkpoints as the stage reads them.
///
/// # Errors
/// A sentence that names the field.
pub fn checkpoint(checkpoint: Option<&strata_api::Checkpoint>) -> Result<Checkpoint, String> {
    let every = checkpoint.and_then(|checkpoint| checkpoint.every.as_ref());
    let keep = checkpoint.and_then(|checkpoint| checkpoint.keep).unwrap_or(2);
    let every_seconds = match every {
        None => 600,
        Some(text) => text
            .seconds()
            .filter(|seconds| *seconds > 0)
            .ok_or("spec.checkpoint.every must be a duration above 0, such as 10m")?,
    };
    Ok(Checkpoint {
        every_seconds,
        keep: unsigned("spec.checkpoint.keep", keep)?,
    })
}

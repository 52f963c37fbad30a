//! The figures of an artifact, which must read back as they were written: its digest covers them.

use std::collections::BTreeMap;

use strata_contract::Content;

use crate::{ArtifactError, Result};

/// Refuses figures that are not finite: JSON has no others, and no gate can judge them. Stages that go on to gates ask
/// before; publishing asks in any case.
///
/// # Errors
/// [`ArtifactError::NotFinite`], with the figure's name.
pub fn check_figures(metrics: &BTreeMap<String, f64>) -> Result<()> {
    match metrics.iter().find(|(_, value)| !value.is_finite()) {
        Some((metric, &value)) => {
            let metric = metric.clone();
            Err(ArtifactError::NotFinite { metric, value })
        }
        None => Ok(()),
    }
}

/// `content` with figures that read back as they were written, so that its digest holds.
///
/// JSON readers, the one used here among them, may miss the last bit of a long decimal. What has at most 12 significant
/// digits, 22 decimal places and a size of at most 1e30 is read exactly; figures are rounded to that.
pub(super) fn settle(content: Content) -> Content {
    let mut value = serde_json::to_value(&content).expect("content serializes to JSON");
    round_figures(&mut value);
    serde_json::from_value(value).expect("content reads back from its own JSON")
}

fn round_figures(value: &mut serde_json::Value) {
    const LARGEST: f64 = 1e30;
    /// Below it, 12 significant digits reach beyond 22 decimal places.
    const SMALL: f64 = 1e-10;
    use serde_json::Value;
    match value {
        Value::Number(number) if number.is_f64() => {
            let figure = number.as_f64().unwrap_or_default().clamp(-LARGEST, LARGEST);
            let text = if figure.abs() < SMALL {
                format!("{figure:.22}")
            } else {
                format!("{figure:.11e}")
            };
            *value = Value::from(text.parse::<f64>().expect("a float that was just written reads back"));
        }
        Value::Array(items) => items.iter_mut().for_each(round_figures),
        Value::Object(map) => map.values_mut().for_each(round_figures),
        _ => {}
    }
}

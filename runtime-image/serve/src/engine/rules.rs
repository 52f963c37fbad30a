//! What a model's configuration says of attention, for whatever computes it.

use strata_kernels::infer::Scoring;
use strata_model::{ModelConfig, RopeScaling};

/// How a layer scores, and which of [`rotations`] turns its queries and keys.
pub(super) fn scoring(config: &ModelConfig, layer: usize) -> (Scoring, usize) {
    let (variant, window) = (&config.variant, config.window_of(layer));
    let scoring = Scoring {
        scale: 1.0 / variant.query_scale.unwrap_or(config.head_dim as f32).sqrt(),
        soft_cap: variant.attention_soft_cap,
        window,
    };
    (scoring, usize::from(window.and(variant.local_rope_theta).is_some()))
}

/// Angles per position and the factor of their cosines and sines; local layers perhaps have a second kind.
pub(super) fn rotations(config: &ModelConfig, positions: usize) -> impl Iterator<Item = (Vec<f64>, f32)> {
    let kinds = [
        (&config.variant.rope, Some(config.rope_theta)),
        (&RopeScaling::None, config.variant.local_rope_theta),
    ];
    let turned = move |(scaling, theta): (&RopeScaling, Option<f32>)| {
        Some(scaling.frequencies(theta?, config.rotary_dim(), positions))
    };
    kinds.into_iter().filter_map(turned)
}

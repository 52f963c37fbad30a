//! The optimizer: a learning rate that warms up and decays, gradients clipped by their norm, AdamW on the flat buffer.

use std::f64::consts::PI;
use std::ops::Range;

use strata_contract::Schedule;
use strata_kernels::ops::optimizer::{AdamW, adamw_step, sum_of_squares};

/// The gradient norm at which gradients are scaled down.
const CLIP_NORM: f64 = 1.0;

/// Share of the peak at which a cosine ends.
const COSINE_FLOOR: f64 = 0.1;

/// The learning rate over a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Course {
    /// Highest learning rate.
    pub peak: f64,
    /// Steps of the linear warm-up.
    pub warmup_steps: u64,
    /// Steps of the run.
    pub steps: u64,
    /// What follows the warm-up.
    pub schedule: Schedule,
}

impl Course {
    /// A run of `steps`, of which `warmup_percent` (rounded up) warm up.
    pub fn new(peak: f64, warmup_percent: u8, steps: u64, schedule: Schedule) -> Self {
        Self {
            peak,
            warmup_steps: (steps * u64::from(warmup_percent)).div_ceil(100),
            steps,
            schedule,
        }
    }

    /// Learning rate of `step`, counted from 1.
    pub fn rate(&self, step: u64) -> f64 {
        if step <= self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        match self.schedule {
            Schedule::Constant => self.peak,
            Schedule::Cosine => {
                let done = (step - self.warmup_steps) as f64 / (self.steps - self.warmup_steps).max(1) as f64;
                self.peak * (COSINE_FLOOR + (1.0 - COSINE_FLOOR) * 0.5 * (1.0 + (PI * done.min(1.0)).cos()))
            }
        }
    }
}

/// AdamW with its moments and the step it is at.
#[derive(Clone, Debug)]
pub struct Optimizer {
    course: Course,
    weight_decay: f32,
    /// Ranges of the buffer and whether they decay.
    groups: Vec<(Range<usize>, bool)>,
    pub(crate) step: u64,
    pub(crate) first: Vec<f32>,
    pub(crate) second: Vec<f32>,
}

impl Optimizer {
    /// A fresh optimizer; `groups` cover the buffer and say which ranges decay.
    pub fn new(course: Course, weight_decay: f64, groups: Vec<(Range<usize>, bool)>) -> Self {
        let len = groups.last().map_or(0, |(range, _)| range.end);
        Self {
            course,
            weight_decay: weight_decay as f32,
            groups,
            step: 0,
            first: vec![0.0; len],
            second: vec![0.0; len],
        }
    }

    /// Steps made.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Updates `parameters` and clears `gradients`; returns the gradients' norm before clipping.
    pub fn update(&mut self, parameters: &mut [f32], gradients: &mut [f32]) -> f64 {
        self.step += 1;
        let norm = sum_of_squares(gradients).sqrt();
        let gradient_scale = (CLIP_NORM / norm.max(CLIP_NORM)) as f32;
        for (range, decays) in &self.groups {
            let range = range.clone();
            let adam = AdamW {
                learning_rate: self.course.rate(self.step) as f32,
                beta1: 0.9,
                beta2: 0.95,
                epsilon: 1e-8,
                weight_decay: if *decays { self.weight_decay } else { 0.0 },
            };
            let moments = (&mut self.first[range.clone()], &mut self.second[range.clone()]);
            adamw_step(
                &mut parameters[range.clone()],
                moments,
                &gradients[range],
                adam,
                self.step,
                gradient_scale,
            );
        }
        gradients.fill(0.0);
        norm
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_warms_up_then_follows_its_schedule() {
        let cosine = Course::new(1.0, 10, 100, Schedule::Cosine);
        let constant = Course {
            schedule: Schedule::Constant,
            ..cosine
        };
        for (step, cosine_rate, constant_rate) in [(1, 0.1, 0.1), (10, 1.0, 1.0), (55, 0.55, 1.0), (100, 0.1, 1.0)] {
            assert!(
                (cosine.rate(step) - cosine_rate).abs() < 1e-9,
                "step {step}: {}",
                cosine.rate(step)
            );
            assert_eq!(constant.rate(step), constant_rate);
        }
        assert_eq!(Course::new(1.0, 0, 3, Schedule::Constant).rate(1), 1.0);
        assert!(Course::new(1.0, 100, 3, Schedule::Cosine).rate(3) == 1.0);
    }

    #[test]
    fn large_gradients_are_clipped_and_only_the_groups_that_decay_do() {
        let course = Course::new(0.1, 0, 10, Schedule::Constant);
        let mut optimizer = Optimizer::new(course, 0.5, vec![(0..1, true), (1..2, false)]);
        let (mut parameters, mut gradients) = (vec![1.0, 1.0], vec![0.0, 0.0]);
        assert_eq!(optimizer.update(&mut parameters, &mut gradients), 0.0);
        assert!(
            (parameters[0] - 0.95).abs() < 1e-6 && parameters[1] == 1.0,
            "{parameters:?}"
        );
        let mut gradients = vec![30.0, 40.0];
        assert_eq!(optimizer.update(&mut parameters, &mut gradients), 50.0);
        assert!(
            (optimizer.first[0] - 0.06).abs() < 1e-6,
            "the clipped gradient is 0.6: {:?}",
            optimizer.first
        );
        assert_eq!(gradients, [0.0, 0.0]);
    }
}

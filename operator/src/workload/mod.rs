//! Builders of Kubernetes objects, shared by the kinds: pure, from checked values to whole objects.

pub mod budget;
pub mod claim;
pub mod container;
pub mod deployment;
pub mod job;
pub mod jobset;
pub mod labels;
pub mod pod;
pub mod quantity;
pub mod service;
pub mod volume;

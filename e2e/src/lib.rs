//! A real cluster, the demo and the tests that run on it.

pub mod bed;
pub mod image;
pub mod wait;

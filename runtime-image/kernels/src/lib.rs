//! Forward and backward on raw slices; instruction set chosen at run time.

pub mod arena;
pub mod cgroup;
pub mod cpu;
pub mod infer;
pub mod ops;
pub mod pool;

//! A real cluster, the demo and the tests that run on it.

//! The operator: one loop, four pure kinds.

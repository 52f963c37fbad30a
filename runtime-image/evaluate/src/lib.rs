//! Metrics and gates on a model.

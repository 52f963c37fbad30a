//! The curate stage: sources to a published data set.

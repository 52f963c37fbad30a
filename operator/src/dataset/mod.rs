//! Dataset: raw sources to a published data set, by the stage `curate`. All else about its run is in [`crate::run`].

mod check;
#[cfg(test)]
mod tests;

//! PretrainJob: token files to a model, by the stage `pretrain`. All else about its run is in [`crate::run`].

pub(crate) mod check;
#[cfg(test)]
mod tests;

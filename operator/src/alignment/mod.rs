//! AlignmentJob: a model and preferences to an aligned model, by the stage `align`. All else about its run is in
//! [`crate::run`].

mod check;
#[cfg(test)]
mod tests;

//! One binary, one subcommand per stage.
fn main() {}

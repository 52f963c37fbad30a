//! The pretrain stage.

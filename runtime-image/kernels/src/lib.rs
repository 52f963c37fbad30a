//! Forward and backward on raw slices; instruction set chosen at run time.

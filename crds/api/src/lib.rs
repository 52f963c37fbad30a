//! The four kinds of strata.dev/v1alpha1: types, validation rules, generated CRDs.

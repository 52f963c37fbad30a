//! Judges manifests offline as the API server would.

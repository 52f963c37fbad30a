//! The artifact store: atomic, hashed, manifest last.

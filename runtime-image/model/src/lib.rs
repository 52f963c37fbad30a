//! Models as data: families, shapes, names; HF and GGUF readers; chat templates.

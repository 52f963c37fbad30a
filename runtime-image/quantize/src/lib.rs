//! The quantize stage: weights to Q8_0 GGUF, judged again.

//! The serving engine: scheduler, paged KV-cache, OpenAI API.

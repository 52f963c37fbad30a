//! What the engine says about given tokens, for comparison with others: `logits MODEL TOKENS [OUT] [--float]`. TOKENS has a
//! sequence of ids on each line. Prints one JSON line; OUT gets every position's logits, as 32-bit floats.

use std::fs::{File, read_to_string};
use std::io::{BufWriter, Write};

use strata_kernels::infer::{KvDtype, log_prob};
use strata_model::LoadedModel;
use strata_serve::{Precision, Scorer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (flags, files): (Vec<String>, Vec<String>) = std::env::args().skip(1).partition(|word| word.starts_with("--"));
    let [model, tokens, out @ ..] = files.as_slice() else {
        return Err("give a model and a file with a line of token ids for each sequence".into());
    };
    let (precision, cache) = match flags.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => (Precision::Stored, KvDtype::F16),
        ["--float"] => (Precision::Float, KvDtype::F32),
        other => return Err(format!("{other:?}: only --float is known").into()),
    };
    let sequences = read_to_string(tokens)?
        .lines()
        .map(|line| line.split_whitespace().map(str::parse).collect())
        .collect::<Result<Vec<Vec<u32>>, _>>()?;
    let mut out = out
        .first()
        .map(|path| File::create(path).map(|file| BufWriter::with_capacity(1 << 20, file)))
        .transpose()?;
    let model = LoadedModel::open(model.as_ref())?;
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(1);
    let mut scorer = Scorer::new(&model, precision, cache, longest)?;
    let (mut nll, mut count, mut written) = (0f64, 0usize, Ok(()));
    for sequence in &sequences {
        scorer.visit_logits(sequence, 0, |position, logits| {
            if let Some(next) = sequence.get(position + 1) {
                nll -= f64::from(log_prob(logits, *next as usize));
                count += 1;
            }
            if let (Some(out), Ok(())) = (&mut out, &written) {
                written = logits.iter().try_for_each(|logit| out.write_all(&logit.to_le_bytes()));
            }
        })?;
    }
    written?;
    out.map(|mut out| out.flush()).transpose()?;
    let perplexity = (nll / count as f64).exp();
    writeln!(
        std::io::stdout(),
        "{{\"perplexity\":{perplexity:.5},\"scored\":{count}}}"
    )?;
    Ok(())
}

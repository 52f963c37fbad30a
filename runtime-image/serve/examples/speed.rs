//! How fast the forward pass is: `cargo run -p strata-serve --example speed -- MODEL`. One JSON line.

use std::io::Write;
use std::time::Instant;

use strata_kernels::infer::KvDtype;
use strata_model::{LoadedModel, Role, tensors};
use strata_serve::Precision;
use strata_serve::engine::executor::{Batch, Executor, Row};

const BLOCK_TOKENS: usize = 16;
const PROMPT: usize = 512;
const TOKENS: usize = 64;
const CLIENTS: usize = 8;

/// A token id that looks random, the same on every machine.
fn token(position: usize, table: usize, vocabulary: usize) -> u32 {
    let mixed = ((position + 1) as u64 * 0x9E37_79B9_7F4A_7C15) ^ ((table + 1) as u64 * 0xBF58_476D_1CE4_E5B9);
    ((mixed >> 32) % vocabulary as u64) as u32
}

/// Rows of `count` tokens from `start` on, in the blocks of sequence `table`.
fn rows(start: usize, count: usize, table: usize, vocabulary: usize) -> Vec<Row> {
    let last = start + count - 1;
    (start..=last)
        .map(|position| Row {
            token: token(position, table, vocabulary),
            position: position as u32,
            table,
            logits: position == last,
        })
        .collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("give the path of a model")?;
    let begin = Instant::now();
    let model = LoadedModel::open(path.as_ref())?;
    let per_sequence = (PROMPT + TOKENS).div_ceil(BLOCK_TOKENS);
    let (config, weights) = (&model.config, &*model.weights);
    let blocks = per_sequence * CLIENTS;
    let mut executor = Executor::new(
        config,
        weights,
        Precision::Stored,
        KvDtype::F16,
        BLOCK_TOKENS,
        blocks,
        per_sequence * BLOCK_TOKENS,
    )?;
    let load_seconds = begin.elapsed().as_secs_f64();
    let table = |sequence: usize| {
        ((sequence * per_sequence) as u32..((sequence + 1) * per_sequence) as u32).collect::<Vec<_>>()
    };
    let tables: Vec<Vec<u32>> = (0..CLIENTS).map(table).collect();
    let mut timed = |batches: Vec<Vec<Row>>| {
        let begin = Instant::now();
        let tokens: usize = batches.iter().map(Vec::len).sum();
        for rows in batches {
            executor.forward(
                &Batch {
                    rows,
                    tables: tables.clone(),
                    ..Batch::default()
                },
                |_, _| (),
            );
        }
        tokens as f64 / begin.elapsed().as_secs_f64()
    };
    let decode = |start: usize, clients: usize| -> Vec<Vec<Row>> {
        let step = |t: usize| {
            (0..clients)
                .flat_map(|client| rows(start + t, 1, client, config.vocab_size))
                .collect()
        };
        (0..TOKENS).map(step).collect()
    };
    timed(decode(0, 1));
    let decode_0 = timed(decode(0, 1));
    let prefill = timed(vec![rows(0, PROMPT, 0, config.vocab_size)]);
    let decode_512 = timed(decode(PROMPT, 1));
    let clients = timed(decode(0, CLIENTS));
    let weight_bytes = executor.weight_bytes();
    // Products that each token of a prompt costs; the head is computed for its last token alone.
    let linear = tensors(config).into_iter().filter(|tensor| tensor.role == Role::Linear);
    let products: usize = linear.map(|tensor| tensor.elements()).sum();
    writeln!(
        std::io::stdout(),
        "{{\"load_seconds\":{load_seconds:.2},\"decode\":{decode_0:.2},\"decode_depth_512\":{decode_512:.2},\
         \"prefill_512\":{prefill:.2},\"decode_8_clients\":{clients:.2},\"weight_bytes\":{weight_bytes},\
         \"decode_gigabytes_per_second\":{:.2},\"prefill_gigamacs_per_second\":{:.1},\"isa\":\"{}\",\"threads\":{}}}",
        decode_0 * weight_bytes as f64 / 1e9,
        prefill * products as f64 / 1e9,
        strata_kernels::cpu::isa().name(),
        strata_kernels::pool::global().threads(),
    )?;
    Ok(())
}

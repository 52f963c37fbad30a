//! The forward pass against the plainest possible one, and the promise that a request's bits depend on nothing but itself.

#![allow(
    clippy::unwrap_used,
    reason = "in a test an unwrap is an assertion, also in its helpers"
)]

use strata_kernels::infer::KvDtype;
use strata_model::synthetic::{tiny_config, weights};
use strata_model::{ModelConfig, Weights, layer_name};
use strata_serve::Precision;
use strata_serve::engine::executor::{Batch, Executor, Row};

/// Llama as its paper has it: one token after the other, no cache, double precision.
fn reference(config: &ModelConfig, weights: &dyn Weights, tokens: &[u32]) -> Vec<Vec<f64>> {
    let load = |name: &str| -> Vec<f64> { weights.f32(name).unwrap().into_iter().map(f64::from).collect() };
    let product = |w: &[f64], x: &[f64]| -> Vec<f64> {
        w.chunks_exact(x.len())
            .map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum())
            .collect()
    };
    let norm = |x: &[f64], gain: &[f64]| -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        x.iter()
            .zip(gain)
            .map(|(x, gain)| x / (mean + f64::from(config.norm_eps)).sqrt() * gain)
            .collect()
    };
    let dim = config.head_dim;
    let turn = |x: &mut [f64], position: usize| {
        for head in x.chunks_exact_mut(dim) {
            for i in 0..dim / 2 {
                let angle = position as f64 / f64::from(config.rope_theta).powf(2.0 * i as f64 / dim as f64);
                let (a, b) = (head[i], head[i + dim / 2]);
                head[i] = a * angle.cos() - b * angle.sin();
                head[i + dim / 2] = b * angle.cos() + a * angle.sin();
            }
        }
    };
    let embedding = load("model.embed_tokens.weight");
    let mut hidden: Vec<Vec<f64>> = tokens
        .iter()
        .map(|token| embedding[*token as usize * config.hidden_size..][..config.hidden_size].to_vec())
        .collect();
    for layer in 0..config.layers {
        let load = |part: &str| load(&layer_name(layer, part));
        let (wq, wk, wv, wo) = (
            load("self_attn.q_proj"),
            load("self_attn.k_proj"),
            load("self_attn.v_proj"),
            load("self_attn.o_proj"),
        );
        let (gate, up, down) = (load("mlp.gate_proj"), load("mlp.up_proj"), load("mlp.down_proj"));
        let (norm1, norm2) = (load("input_layernorm"), load("post_attention_layernorm"));
        let normed: Vec<Vec<f64>> = hidden.iter().map(|x| norm(x, &norm1)).collect();
        let turned = |w: &[f64]| -> Vec<Vec<f64>> {
            let rows = normed.iter().enumerate().map(|(position, x)| {
                let mut row = product(w, x);
                turn(&mut row, position);
                row
            });
            rows.collect()
        };
        let (q, k) = (turned(&wq), turned(&wk));
        let v: Vec<Vec<f64>> = normed.iter().map(|x| product(&wv, x)).collect();
        for (t, x) in hidden.iter_mut().enumerate() {
            let mut mixed = Vec::new();
            for head in 0..config.heads {
                let (at, kv) = (head * dim, head / (config.heads / config.kv_heads) * dim);
                let scores: Vec<f64> = (0..=t)
                    .map(|s| (0..dim).map(|d| q[t][at + d] * k[s][kv + d]).sum::<f64>() / (dim as f64).sqrt())
                    .collect();
                let total: f64 = scores.iter().map(|score| score.exp()).sum();
                mixed.extend((0..dim).map(|d| (0..=t).map(|s| scores[s].exp() / total * v[s][kv + d]).sum::<f64>()));
            }
            x.iter_mut().zip(product(&wo, &mixed)).for_each(|(x, y)| *x += y);
            let normed = norm(x, &norm2);
            let inner: Vec<f64> = product(&gate, &normed)
                .iter()
                .zip(product(&up, &normed))
                .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                .collect();
            x.iter_mut().zip(product(&down, &inner)).for_each(|(x, y)| *x += y);
        }
    }
    let head = load(if config.tie_embeddings {
        "model.embed_tokens.weight"
    } else {
        "lm_head.weight"
    });
    let last = load("model.norm.weight");
    hidden.iter().map(|x| product(&head, &norm(x, &last))).collect()
}

fn executor(config: &ModelConfig, precision: Precision, dtype: KvDtype) -> Executor {
    Executor::new(config, &weights(config, 5), precision, dtype, 4, 64, 128).unwrap()
}

fn tokens(count: usize, seed: u32, config: &ModelConfig) -> Vec<u32> {
    (0..count as u32)
        .map(|i| (i * 37 + seed * 11) % config.vocab_size as u32)
        .collect()
}

/// Computes `tokens` in pieces of the given sizes; returns the logits of every position.
fn run(executor: &mut Executor, tokens: &[u32], pieces: &[usize], table: &[u32]) -> Vec<Vec<f32>> {
    run_from(executor, tokens, 0, pieces, table)
}

/// The same of those from `start` on: the blocks have the others.
fn run_from(
    executor: &mut Executor,
    tokens: &[u32],
    mut start: usize,
    pieces: &[usize],
    table: &[u32],
) -> Vec<Vec<f32>> {
    let mut out = Vec::new();
    for size in pieces.iter().chain(std::iter::repeat(&tokens.len())) {
        let end = (start + size).min(tokens.len());
        let rows = (start..end)
            .map(|at| Row {
                token: tokens[at],
                position: at as u32,
                table: 0,
                logits: true,
            })
            .collect();
        executor.forward(
            &Batch {
                rows,
                tables: vec![table.to_vec()],
                ..Batch::default()
            },
            |_, logits| out.push(logits.to_vec()),
        );
        start = end;
        if start == tokens.len() {
            return out;
        }
    }
    unreachable!("the pieces go on for ever")
}

#[test]
fn logits_agree_with_a_plain_forward_pass() {
    for config in [
        tiny_config(),
        ModelConfig {
            tie_embeddings: true,
            heads: 6,
            kv_heads: 2,
            ..tiny_config()
        },
    ] {
        let tokens = tokens(40, 1, &config);
        let expected = reference(&config, &weights(&config, 5), &tokens);
        let spread = expected.iter().flatten().fold(0f64, |most, x| most.max(x.abs()));
        for (precision, dtype, most) in [
            (Precision::Float, KvDtype::F32, 1e-4),
            (Precision::Float, KvDtype::F16, 1e-2),
            (Precision::Float, KvDtype::Q8, 2e-1),
        ] {
            let got = run(
                &mut executor(&config, precision, dtype),
                &tokens,
                &[],
                &(0..10).collect::<Vec<_>>(),
            );
            let worst = got
                .iter()
                .flatten()
                .zip(expected.iter().flatten())
                .fold(0f64, |worst, (a, b)| worst.max((f64::from(*a) - b).abs()));
            assert!(
                worst <= most && spread > 1.0,
                "{precision:?} {dtype:?}: off by {worst}, logits up to {spread}"
            );
        }
    }
}

#[test]
fn chunks_neighbours_and_the_place_of_blocks_change_no_bit() {
    let config = tiny_config();
    let (mine, other) = (tokens(30, 1, &config), tokens(25, 2, &config));
    for (precision, dtype) in [
        (Precision::Float, KvDtype::F32),
        (Precision::Float, KvDtype::F16),
        (Precision::Stored, KvDtype::F16),
        (Precision::Stored, KvDtype::Q8),
    ] {
        let alone = run(
            &mut executor(&config, precision, dtype),
            &mine,
            &[],
            &(0..8).collect::<Vec<_>>(),
        );
        let scattered: Vec<u32> = [33, 4, 60, 17, 2, 41, 9, 28].to_vec();
        for pieces in [&[1usize; 30][..], &[7, 1, 1, 13], &[16, 16]] {
            assert_eq!(
                run(&mut executor(&config, precision, dtype), &mine, pieces, &scattered),
                alone,
                "{pieces:?}"
            );
        }
        // The first blocks leave the cache, another sequence is written over them, and they come back to other places.
        let mut away = executor(&config, precision, dtype);
        run(&mut away, &mine[..16], &[5], &[0, 1, 2, 3]);
        let mut saved = vec![vec![0; away.block_bytes()]; 4];
        saved
            .iter_mut()
            .zip(0..)
            .for_each(|(bytes, block)| away.save_block(block, bytes));
        run(&mut away, &other, &[], &(0..7).collect::<Vec<_>>());
        saved
            .iter()
            .zip(&scattered)
            .for_each(|(bytes, block)| away.load_block(*block, bytes));
        assert_eq!(run_from(&mut away, &mine, 16, &[3], &scattered), alone[16..]);
        // Two sequences in one batch, the other one in the middle of its prompt.
        let mut both = executor(&config, precision, dtype);
        let tables = vec![
            scattered.clone(),
            (10..17)
                .filter(|block| !scattered.contains(block))
                .chain([50])
                .collect::<Vec<_>>(),
        ];
        let mut got = vec![Vec::new(); mine.len()];
        for step in 0..mine.len() {
            let mut rows = vec![Row {
                token: mine[step],
                position: step as u32,
                table: 0,
                logits: true,
            }];
            if step < other.len() {
                rows.insert(
                    step % 2,
                    Row {
                        token: other[step],
                        position: step as u32,
                        table: 1,
                        logits: step % 3 == 0,
                    },
                );
            }
            let own = rows.iter().position(|row| row.table == 0).unwrap();
            both.forward(
                &Batch {
                    rows,
                    tables: tables.clone(),
                    ..Batch::default()
                },
                |row, logits| {
                    if row == own {
                        got[step] = logits.to_vec();
                    }
                },
            );
        }
        assert_eq!(got, alone);
    }
}

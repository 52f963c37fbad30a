use std::collections::BTreeMap;

use strata_model::bert::synthetic;

use super::*;

/// The same in plain loops of 64-bit floats, after the paper (Devlin et al. 2019) and Hugging Face's names.
fn reference(tensors: &BTreeMap<String, Vec<f32>>, tokens: &[u32]) -> Vec<f64> {
    let hidden = 24;
    let get = |name: &str| -> Vec<f64> { tensors[name].iter().map(|x| f64::from(*x)).collect() };
    let norm = |x: &[f64], name: &str| -> Vec<f64> {
        let (gain, bias) = (get(&format!("{name}.weight")), get(&format!("{name}.bias")));
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
        let scaled = x.iter().map(|x| (x - mean) / (variance + 1e-12).sqrt());
        scaled
            .zip(gain)
            .zip(bias)
            .map(|((x, gain), bias)| x * gain + bias)
            .collect()
    };
    let linear = |x: &[f64], name: &str| -> Vec<f64> {
        let (weight, bias) = (get(&format!("{name}.weight")), get(&format!("{name}.bias")));
        let dot = |row: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
        weight
            .chunks(x.len())
            .zip(bias)
            .map(|(row, bias)| dot(row) + bias)
            .collect()
    };
    let plus = |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a + b).collect() };
    // Φ by Simpson's rule: no table, no approximation in common with the kernel.
    let gelu = |x: f64| {
        let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let (steps, width) = (400, x / 400.0);
        let weight = |i: usize| {
            if i == 0 || i == steps {
                1.0
            } else {
                2.0 + 2.0 * (i % 2) as f64
            }
        };
        let area: f64 = (0..=steps).map(|i| weight(i) * density(i as f64 * width)).sum();
        x * (0.5 + area * width / 3.0)
    };
    let [words, positions, segments] =
        ["word", "position", "token_type"].map(|kind| get(&format!("embeddings.{kind}_embeddings.weight")));
    let mut rows: Vec<Vec<f64>> = tokens
        .iter()
        .enumerate()
        .map(|(at, token)| {
            let row = |table: &[f64], at: usize| table[at * hidden..(at + 1) * hidden].to_vec();
            let sum = plus(
                &plus(&row(&words, *token as usize), &row(&segments, 0)),
                &row(&positions, at),
            );
            norm(&sum, "embeddings.LayerNorm")
        })
        .collect();
    for layer in 0..2 {
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        let [q, k, v] = ["query", "key", "value"].map(|part| -> Vec<Vec<f64>> {
            rows.iter()
                .map(|x| linear(x, &name(&format!("attention.self.{part}"))))
                .collect()
        });
        let mixed: Vec<Vec<f64>> = (0..rows.len())
            .map(|row| {
                (0..hidden)
                    .map(|at| {
                        let head = at / 8 * 8..at / 8 * 8 + 8;
                        let score =
                            |key: usize| (head.clone().map(|i| q[row][i] * k[key][i]).sum::<f64>() / 8f64.sqrt()).exp();
                        let sum: f64 = (0..rows.len()).map(score).sum();
                        (0..rows.len()).map(|key| score(key) / sum * v[key][at]).sum()
                    })
                    .collect()
            })
            .collect();
        for (x, mixed) in rows.iter_mut().zip(mixed) {
            let attended = norm(
                &plus(x, &linear(&mixed, &name("attention.output.dense"))),
                &name("attention.output.LayerNorm"),
            );
            let inner: Vec<f64> = linear(&attended, &name("intermediate.dense"))
                .into_iter()
                .map(gelu)
                .collect();
            *x = norm(
                &plus(&attended, &linear(&inner, &name("output.dense"))),
                &name("output.LayerNorm"),
            );
        }
    }
    let mean: Vec<f64> = (0..hidden)
        .map(|at| rows.iter().map(|row| row[at]).sum::<f64>() / rows.len() as f64)
        .collect();
    let length = mean.iter().map(|x| x * x).sum::<f64>().sqrt();
    mean.iter().map(|x| x / length).collect()
}

#[test]
fn vectors_are_those_of_a_plain_reference_and_the_same_bits_alone_and_among_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let tensors = synthetic::write(folder.path()).expect("a model");
    assert!(Bert::is_at(folder.path()));
    let bert = Bert::open(folder.path()).expect("a model");
    let mut encoder = Encoder::new(&bert).expect("an encoder");
    let texts: Vec<Vec<u32>> = [1usize, 7, 32, 2]
        .iter()
        .map(|length| (0..*length as u32).map(|i| (i * 37 + *length as u32) % 300).collect())
        .collect();
    let all: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
    let together = encoder.encode(&all);
    for (text, vector) in all.iter().zip(&together) {
        assert_eq!(&encoder.encode(&[text])[0], vector, "alone");
        for (got, expected) in vector.iter().zip(reference(&tensors, text)) {
            assert!((f64::from(*got) - expected).abs() < 1e-5, "{got} {expected}");
        }
    }
}

//! Embedding: rows of a table by token id, and the gradient back into the table.

use crate::pool::{self, Disjoint};

/// `y[i] = table[tokens[i]]` (`width` floats a row). Panics if a token is outside of the table.
pub fn embed(y: &mut [f32], table: &[f32], tokens: &[u32], width: usize) {
    assert_eq!(y.len(), tokens.len() * width, "embed: shapes differ");
    for (y, &token) in y.chunks_exact_mut(width).zip(tokens) {
        y.copy_from_slice(&table[token as usize * width..(token as usize + 1) * width]);
    }
}

/// `dtable[tokens[i]] += dy[i]`. A token may repeat; its rows are added in order.
pub fn embed_backward(dtable: &mut [f32], dy: &[f32], tokens: &[u32], width: usize) {
    assert_eq!(dy.len(), tokens.len() * width, "embed: shapes differ");
    let dtable = Disjoint::new(dtable);
    pool::parallel_for_min(width, 32, |columns| {
        for (row, &token) in tokens.iter().enumerate() {
            let start = token as usize * width;
            // SAFETY: each column is given to one chunk.
            let sum = unsafe { dtable.slice_mut(start + columns.start..start + columns.end) };
            let dy = &dy[row * width + columns.start..row * width + columns.end];
            sum.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_tokens_gather_the_same_row_and_sum_their_gradients() {
        let table: Vec<f32> = (0..40 * 3).map(|i| i as f32).collect();
        let mut y = vec![0.0; 3 * 40];
        embed(&mut y, &table, &[2, 0, 2], 40);
        assert_eq!((y[0], y[40], y[119]), (80.0, 0.0, 119.0));
        let mut dtable = vec![1.0; 40 * 3];
        embed_backward(&mut dtable, &y, &[2, 0, 2], 40);
        assert_eq!(
            (dtable[0], dtable[41], dtable[80], dtable[119]),
            (1.0, 1.0, 1.0 + 160.0, 1.0 + 238.0)
        );
    }
}

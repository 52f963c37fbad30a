//! Operators of training in f32, forward and backward, on raw row-major slices.
//!
//! A transformer's activations are matrices of `rows × width`, a row per token. Every backward takes what its forward read
//! (and the small statistics that it saved) and either sets or adds to the gradients, as it says. Parallel loops give each
//! index to exactly one chunk and sum in an order that does not depend on the threads, so a run repeats bit for bit.

pub mod activation;
pub mod attention;
pub mod embedding;
pub mod encoder;
pub mod log_prob;
pub mod matmul;
pub mod optimizer;
pub mod rms_norm;
pub mod rope;

/// Compiles a function twice, for any processor and for AVX2 with FMA, and chooses at run time. The loops inside are written
/// so that the compiler vectorizes them; they hold no intrinsics.
macro_rules! vectorized {
    ($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                if $crate::cpu::isa() >= $crate::cpu::Isa::Avx2 {
                    // SAFETY: the processor has AVX2 and FMA, as was just asked.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use vectorized;

/// Lanes of a sum: independent partial sums let the compiler vectorize, in an order that is the same everywhere.
const LANES: usize = 16;

/// Sum of `a[i] · b[i]`.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_chunks
        .remainder()
        .iter()
        .zip(b_chunks.remainder())
        .map(|(a, b)| a * b)
        .sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// The largest of `values`, or negative infinity.
#[inline(always)]
fn maximum(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    let tail = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for chunk in chunks {
        for lane in 0..LANES {
            // Not `f32::max`: this form is one instruction.
            lanes[lane] = if chunk[lane] > lanes[lane] {
                chunk[lane]
            } else {
                lanes[lane]
            };
        }
    }
    lanes.iter().copied().fold(tail, f32::max)
}

/// e^x to about 2 units in the last place; below -87.3 the smallest normal number, above 88.3 about 2e38.
///
/// Range reduction by powers of two and a polynomial of degree 6 (the coefficients of Cephes' `expf`), without branches
/// or calls, so that loops over it vectorize.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23: adding it rounds to an integer, which its low bits then hold
    let x = x.clamp(-87.3, 88.3);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_2e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let mantissa = p * r * r + r + 1.0;
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    mantissa * f32::from_bits((exponent.wrapping_add(127) << 23) as u32)
}

/// Pointer to a matrix of which several threads write disjoint places that are not contiguous (one head's columns).
#[derive(Clone, Copy)]
struct SharedMut(*mut f32);

// SAFETY: a plain address; each use states why its places are disjoint.
unsafe impl Send for SharedMut {}
// SAFETY: as above.
unsafe impl Sync for SharedMut {}

impl SharedMut {
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Numbers and the finite-difference check that every backward is tested with.

    /// `len` reproducible numbers in [-scale, scale].
    pub(crate) fn numbers(seed: u64, len: usize, scale: f32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                ((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * scale
            })
            .collect()
    }

    /// Compares `gradient` of the scalar `f` at `x` with central differences, at every element.
    pub(crate) fn check_gradient(name: &str, x: &[f32], gradient: &[f32], f: impl Fn(&[f32]) -> f64) {
        assert_eq!(x.len(), gradient.len());
        let step = 1e-2f32;
        let mut at = x.to_vec();
        for i in 0..x.len() {
            at[i] = x[i] + step;
            let (high, above) = (f(&at), at[i]);
            at[i] = x[i] - step;
            let (low, below) = (f(&at), at[i]);
            at[i] = x[i];
            let expected = (high - low) / f64::from(above - below);
            let error = (expected - f64::from(gradient[i])).abs();
            assert!(
                error < 2e-3 * (1.0 + expected.abs()),
                "{name}[{i}]: gradient {} but finite difference {expected}",
                gradient[i]
            );
        }
    }

    /// Sum of `a[i] · b[i]` in f64: the scalar that tests differentiate.
    pub(crate) fn weigh(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn exp_is_accurate_over_its_range() {
        let mut x = -87.0f32;
        while x < 88.0 {
            let (got, expected) = (f64::from(super::exp(x)), f64::from(x).exp());
            assert!(
                ((got - expected) / expected).abs() < 3e-7,
                "exp({x}) = {got}, not {expected}"
            );
            x += 0.0137;
        }
        assert!(super::exp(f32::NAN).is_nan());
        assert!(super::exp(f32::NEG_INFINITY) < 1.3e-38);
    }
}

//! Element types of stored tensors, and the plain conversion of each to `f32`.

use half::{bf16, f16};

use crate::blocks;

/// How the elements of a tensor are stored. Little endian throughout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit floats.
    F32,
    /// IEEE half floats.
    F16,
    /// The upper half of an `f32`.
    BF16,
    /// Blocks of 32: F16 scale, 32 × i8. `x = d·q`.
    Q8_0,
    /// Blocks of 32: F16 scale, 32 × 4 bits (16 low nibbles first). `x = d·(q − 8)`.
    Q4_0,
    /// Blocks of 32: F16 scale, F16 minimum, 32 × 4 bits. `x = d·q + m`.
    Q4_1,
    /// Blocks of 8 × 32: F16 `d` and `dmin`, 8 scales and 8 minimums of 6 bits, 256 × 4 bits. `x = d·scale·q − dmin·minimum`.
    Q4K,
    /// Blocks of 16 × 16: 256 × 6 bits, 16 × i8 scales, F16 `d`. `x = d·scale·(q − 32)`.
    Q6K,
}

/// Elements in a block of Q8_0, Q4_0 and Q4_1.
pub const BLOCK: usize = 32;
/// Elements in a block of the K types.
pub const SUPER_BLOCK: usize = 256;

impl Dtype {
    /// All types.
    pub const ALL: [Dtype; 8] = [
        Dtype::F32,
        Dtype::F16,
        Dtype::BF16,
        Dtype::Q8_0,
        Dtype::Q4_0,
        Dtype::Q4_1,
        Dtype::Q4K,
        Dtype::Q6K,
    ];

    /// The type's name as GGUF tools print it.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::Q8_0 => "Q8_0",
            Dtype::Q4_0 => "Q4_0",
            Dtype::Q4_1 => "Q4_1",
            Dtype::Q4K => "Q4_K",
            Dtype::Q6K => "Q6_K",
        }
    }

    /// `(elements, bytes)` of the smallest unit.
    pub fn block(self) -> (usize, usize) {
        match self {
            Dtype::F32 => (1, 4),
            Dtype::F16 | Dtype::BF16 => (1, 2),
            Dtype::Q8_0 => (BLOCK, 34),
            Dtype::Q4_0 => (BLOCK, 18),
            Dtype::Q4_1 => (BLOCK, 20),
            Dtype::Q4K => (SUPER_BLOCK, 144),
            Dtype::Q6K => (SUPER_BLOCK, 210),
        }
    }

    /// The largest value that stays finite whatever stands beside it in its block.
    pub fn largest(self) -> f32 {
        match self {
            Dtype::F32 => f32::MAX,
            Dtype::F16 | Dtype::Q4_0 | Dtype::Q4_1 | Dtype::Q4K | Dtype::Q6K => f16::MAX.to_f32(),
            Dtype::BF16 => bf16::MAX.to_f32(),
            Dtype::Q8_0 => f16::MAX.to_f32() * 127.0,
        }
    }

    /// Bytes of `elements` elements; `None` if they are no whole number of blocks or the product overflows.
    pub fn size_bytes(self, elements: usize) -> Option<usize> {
        let (count, bytes) = self.block();
        elements
            .is_multiple_of(count)
            .then_some(elements / count)?
            .checked_mul(bytes)
    }

    /// Converts `bytes` to floats. `out` must have exactly as many elements as `bytes` holds.
    pub fn to_f32(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(
            self.size_bytes(out.len()),
            Some(bytes.len()),
            "{} elements of {}",
            out.len(),
            self.name()
        );
        match self {
            Dtype::F32 => each::<4, 1>(bytes, out, |b, x| x[0] = f32::from_le_bytes(*b)),
            Dtype::F16 => each::<2, 1>(bytes, out, |b, x| x[0] = f16::from_le_bytes(*b).to_f32()),
            Dtype::BF16 => each::<2, 1>(bytes, out, |b, x| x[0] = bf16::from_le_bytes(*b).to_f32()),
            Dtype::Q8_0 => each::<34, BLOCK>(bytes, out, |b, x| {
                let d = scale(b, 0);
                for (x, q) in x.iter_mut().zip(&b[2..]) {
                    *x = d * f32::from(*q as i8);
                }
            }),
            Dtype::Q4_0 => each::<18, BLOCK>(bytes, out, |b, x| {
                let d = scale(b, 0);
                for (i, q) in b[2..].iter().enumerate() {
                    x[i] = d * (f32::from(q & 15) - 8.0);
                    x[i + 16] = d * (f32::from(q >> 4) - 8.0);
                }
            }),
            Dtype::Q4_1 => each::<20, BLOCK>(bytes, out, |b, x| {
                let (d, m) = (scale(b, 0), scale(b, 2));
                for (i, q) in b[4..].iter().enumerate() {
                    x[i] = d * f32::from(q & 15) + m;
                    x[i + 16] = d * f32::from(q >> 4) + m;
                }
            }),
            Dtype::Q4K => each::<144, SUPER_BLOCK>(bytes, out, |b, x| {
                let (d, dmin, six) = (scale(b, 0), scale(b, 2), &b[4..16]);
                for (i, x) in x.chunks_exact_mut(BLOCK).enumerate() {
                    let (s, m) = match i {
                        0..4 => (six[i] & 63, six[i + 4] & 63),
                        _ => (
                            (six[i + 4] & 15) | (six[i - 4] >> 6 << 4),
                            (six[i + 4] >> 4) | (six[i] >> 6 << 4),
                        ),
                    };
                    let (d, m) = (d * f32::from(s), dmin * f32::from(m));
                    for (x, q) in x.iter_mut().zip(&b[16 + i / 2 * BLOCK..]) {
                        *x = d * f32::from((q >> (i % 2 * 4)) & 15) - m;
                    }
                }
            }),
            Dtype::Q6K => each::<210, SUPER_BLOCK>(bytes, out, |b, x| {
                let (low, high, scales, d) = (&b[..128], &b[128..192], &b[192..208], scale(b, 208));
                for (at, x) in x.iter_mut().enumerate() {
                    let (part, quarter, l) = (at / 128, at % 128 / 32, at % 32);
                    let four = (low[part * 64 + quarter % 2 * 32 + l] >> (quarter / 2 * 4)) & 15;
                    let two = (high[part * 32 + l] >> (quarter * 2)) & 3;
                    let q = i32::from(four | (two << 4)) - 32;
                    *x = d * f32::from(scales[at / 16] as i8) * q as f32;
                }
            }),
        }
    }

    /// Converts floats to this type's bytes, appended to `out`. Rounds to nearest.
    ///
    /// Only the types that this project writes, which are all but Q4_1; `None` for that one, and for values that are no whole
    /// number of blocks.
    pub fn from_f32(self, values: &[f32], out: &mut Vec<u8>) -> Option<()> {
        out.reserve(self.size_bytes(values.len())?);
        match self {
            Dtype::F32 => values.iter().for_each(|x| out.extend(x.to_le_bytes())),
            Dtype::F16 => values.iter().for_each(|x| out.extend(f16::from_f32(*x).to_le_bytes())),
            Dtype::BF16 => values.iter().for_each(|x| out.extend(bf16::from_f32(*x).to_le_bytes())),
            Dtype::Q8_0 => values.chunks_exact(BLOCK).for_each(|block| {
                let largest = block.iter().fold(0f32, |largest, x| largest.max(x.abs()));
                let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
                out.extend(f16::from_f32(largest / 127.0).to_le_bytes());
                out.extend(block.iter().map(|x| (x * inverse).round() as i8 as u8));
            }),
            Dtype::Q4_0 => values.as_chunks().0.iter().for_each(|block| blocks::q4_0(block, out)),
            Dtype::Q4K => values.as_chunks().0.iter().for_each(|block| blocks::q4_k(block, out)),
            Dtype::Q6K => values.as_chunks().0.iter().for_each(|block| blocks::q6_k(block, out)),
            Dtype::Q4_1 => return None,
        }
        Some(())
    }
}

fn scale(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn each<const BYTES: usize, const ELEMENTS: usize>(
    bytes: &[u8],
    out: &mut [f32],
    convert: impl Fn(&[u8; BYTES], &mut [f32; ELEMENTS]),
) {
    let (blocks, _) = bytes.as_chunks::<BYTES>();
    let (outs, _) = out.as_chunks_mut::<ELEMENTS>();
    blocks.iter().zip(outs).for_each(|(block, out)| convert(block, out));
}

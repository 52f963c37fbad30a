//! How matrices lie in memory: panels of 16 rows, side by side in the lanes of a register.
//!
//! A panel begins with its scales and ends with its quants. In a register of quants, lane `r` has four consecutive columns
//! of row `r`, so one instruction multiplies 64 weights and no sum ever crosses lanes. Quants are unsigned (Q8_0's are
//! shifted by 128), because the instruction wants an unsigned and a signed operand, and the activations are the signed one.
//!
//! | format | scales of a panel | quants of a block of 32 columns × 16 rows |
//! |---|---|---|
//! | Q8_0 | per block: 16 × F16 | 8 × 64 bytes, register `j` has columns `4j..4j + 4` |
//! | Q4_0 | per block: 16 × F16 | 4 × 64 bytes, register `j` is the low half, `j + 4` the high half of each byte |
//! | Q4_1 | per block: 16 × F16 scale, 16 × F16 minimum | as Q4_0 |
//! | Q4_K | per 8 blocks: 16 × F16 `d`, 16 × F16 `dmin`, then per block 16 × u8 scale, 16 × u8 minimum | as Q4_0 |
//! | Q6_K | per 8 blocks: 16 × F16 `d`, 32 bytes unused, then per half block 16 × i8 scale | as Q4_0, then 2 × 64 bytes: two bits each of registers `4k..4k + 4` |
//! | F32, F16, BF16 | none | per column: 16 numbers |

use half::{bf16, f16};

/// Rows in a panel.
pub const PANEL: usize = 16;
/// Columns in a block of the quantized formats.
pub const BLOCK: usize = 32;
/// Blocks in a block of the K formats.
pub(super) const SUPER: usize = 8;

/// Bytes of the scales of 8 blocks in a Q4_K panel.
pub(super) const Q4_K_SCALES: usize = 64 + SUPER * 32;
/// Bytes of the scales of 8 blocks in a Q6_K panel.
pub(super) const Q6_K_SCALES: usize = 64 + SUPER * 32;

/// How a matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// 32-bit floats.
    F32,
    /// Half floats.
    F16,
    /// The upper halves of 32-bit floats.
    BF16,
    /// Blocks of 32 signed bytes with a scale.
    Q8_0,
    /// Blocks of 32 numbers of 4 bits with a scale, around zero.
    Q4_0,
    /// Blocks of 32 numbers of 4 bits with a scale and a minimum.
    Q4_1,
    /// 8 blocks of 32 numbers of 4 bits; scales and minimums have 6 bits and a scale of their own.
    Q4K,
    /// 16 half blocks of 16 numbers of 6 bits; scales have 8 bits and a scale of their own.
    Q6K,
}

impl Format {
    /// All formats.
    pub const ALL: [Format; 8] = [
        Format::F32,
        Format::F16,
        Format::BF16,
        Format::Q8_0,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q4K,
        Format::Q6K,
    ];

    /// `(columns, bytes)` of the smallest unit of a row as GGUF stores it.
    pub fn stored(self) -> (usize, usize) {
        match self {
            Format::F32 => (1, 4),
            Format::F16 | Format::BF16 => (1, 2),
            Format::Q8_0 => (BLOCK, 34),
            Format::Q4_0 => (BLOCK, 18),
            Format::Q4_1 => (BLOCK, 20),
            Format::Q4K => (SUPER * BLOCK, 144),
            Format::Q6K => (SUPER * BLOCK, 210),
        }
    }

    /// Whether activations are multiplied as 8-bit blocks; otherwise as floats.
    pub fn is_quantized(self) -> bool {
        !matches!(self, Format::F32 | Format::F16 | Format::BF16)
    }

    /// Bytes of the scales of a panel.
    pub(super) fn scale_bytes(self, columns: usize) -> usize {
        let blocks = columns / BLOCK;
        let bytes = match self {
            Format::F32 | Format::F16 | Format::BF16 => 0,
            Format::Q8_0 | Format::Q4_0 => blocks * 2 * PANEL,
            Format::Q4_1 => blocks * 4 * PANEL,
            Format::Q4K => blocks / SUPER * Q4_K_SCALES,
            Format::Q6K => blocks / SUPER * Q6_K_SCALES,
        };
        bytes.next_multiple_of(64)
    }

    /// Bytes of the quants of one block in a panel; for floats, of one column.
    pub(super) fn quant_bytes(self) -> usize {
        match self {
            Format::F32 => 4 * PANEL,
            Format::F16 | Format::BF16 => 2 * PANEL,
            Format::Q8_0 => BLOCK * PANEL,
            Format::Q4_0 | Format::Q4_1 | Format::Q4K => BLOCK * PANEL / 2,
            Format::Q6K => BLOCK * PANEL * 3 / 4,
        }
    }

    /// Bytes of a panel.
    pub(super) fn panel_bytes(self, columns: usize) -> usize {
        let units = if self.is_quantized() { columns / BLOCK } else { columns };
        self.scale_bytes(columns) + units * self.quant_bytes()
    }

    /// Writes one stored row into lane `lane` of a panel that was zeroed.
    pub(super) fn pack_row(self, panel: &mut [u8], lane: usize, columns: usize, stored: &[u8]) {
        let (scales, quants) = panel.split_at_mut(self.scale_bytes(columns));
        let unit = self.quant_bytes();
        let (_, size) = self.stored();
        match self {
            Format::F32 | Format::F16 | Format::BF16 => {
                for (column, number) in stored.chunks_exact(size).enumerate() {
                    quants[column * unit + lane * size..][..size].copy_from_slice(number);
                }
            }
            Format::Q8_0 => {
                for ((block, to), scales) in stored
                    .chunks_exact(size)
                    .zip(quants.chunks_exact_mut(unit))
                    .zip(scales.chunks_exact_mut(2 * PANEL))
                {
                    scales[2 * lane..2 * lane + 2].copy_from_slice(&block[..2]);
                    for (j, four) in block[2..].chunks_exact(4).enumerate() {
                        let to = &mut to[j * 64 + lane * 4..][..4];
                        to.iter_mut().zip(four).for_each(|(to, q)| *to = q ^ 0x80);
                    }
                }
            }
            Format::Q4_0 | Format::Q4_1 => {
                let head = size - 16;
                for ((block, to), scales) in stored
                    .chunks_exact(size)
                    .zip(quants.chunks_exact_mut(unit))
                    .zip(scales.chunks_exact_mut(head * PANEL))
                {
                    for (i, scale) in block[..head].chunks_exact(2).enumerate() {
                        scales[i * 2 * PANEL + 2 * lane..][..2].copy_from_slice(scale);
                    }
                    // GGUF has the first 16 columns in the low halves and the others in the high ones, as we do.
                    for (j, four) in block[head..].chunks_exact(4).enumerate() {
                        to[j * 64 + lane * 4..][..4].copy_from_slice(four);
                    }
                }
            }
            Format::Q4K => {
                for ((stored, quants), scales) in stored
                    .chunks_exact(size)
                    .zip(quants.chunks_exact_mut(unit * SUPER))
                    .zip(scales.chunks_exact_mut(Q4_K_SCALES))
                {
                    pack_q4_k(quants, scales, lane, stored);
                }
            }
            Format::Q6K => {
                for ((stored, quants), scales) in stored
                    .chunks_exact(size)
                    .zip(quants.chunks_exact_mut(unit * SUPER))
                    .zip(scales.chunks_exact_mut(Q6_K_SCALES))
                {
                    pack_q6_k(quants, scales, lane, stored);
                }
            }
        }
    }

    /// Lane `lane` of a panel as floats, computed as from the stored row: bit-equal.
    pub(super) fn unpack_row(self, panel: &[u8], lane: usize, columns: usize, out: &mut [f32]) {
        let number = |at: usize| [panel[at], panel[at + 1]];
        match self {
            Format::F32 => out.iter_mut().enumerate().for_each(|(column, x)| {
                let at = column * 64 + lane * 4;
                *x = f32::from_le_bytes([panel[at], panel[at + 1], panel[at + 2], panel[at + 3]]);
            }),
            Format::F16 => out
                .iter_mut()
                .enumerate()
                .for_each(|(column, x)| *x = f16::from_le_bytes(number(column * 32 + lane * 2)).to_f32()),
            Format::BF16 => out
                .iter_mut()
                .enumerate()
                .for_each(|(column, x)| *x = bf16::from_le_bytes(number(column * 32 + lane * 2)).to_f32()),
            _ => {
                for (b, out) in out.chunks_exact_mut(BLOCK).enumerate() {
                    let [first, second] = self.scales(panel, columns, b, lane);
                    let quants = &panel[self.scale_bytes(columns) + b * self.quant_bytes()..][..self.quant_bytes()];
                    for (i, x) in out.iter_mut().enumerate() {
                        let q = i32::from(self.quant(quants, i / 4, lane * 4 + i % 4)) - self.offset();
                        *x = if i < BLOCK / 2 { first } else { second } * q as f32;
                    }
                    if let Some(minimum) = self.minimum(panel, columns, b, lane) {
                        out.iter_mut().for_each(|x| *x += minimum);
                    }
                }
            }
        }
    }

    /// What is added to a quant so that it is unsigned.
    pub(super) fn offset(self) -> i32 {
        match self {
            Format::Q8_0 => 128,
            Format::Q4_0 => 8,
            Format::Q6K => 32,
            _ => 0,
        }
    }

    /// The scales of the first and the last 16 columns of block `b` in row `lane`.
    #[inline]
    pub(super) fn scales(self, panel: &[u8], columns: usize, b: usize, lane: usize) -> [f32; 2] {
        debug_assert!(self.is_quantized() && b < columns / BLOCK);
        match self {
            Format::Q4_1 => [half(panel, b * 4 * PANEL + 2 * lane); 2],
            Format::Q4K => {
                let (at, inner) = (b / SUPER * Q4_K_SCALES, 64 + b % SUPER * 32);
                [half(panel, at + 2 * lane) * f32::from(panel[at + inner + lane]); 2]
            }
            Format::Q6K => {
                let (at, inner) = (b / SUPER * Q6_K_SCALES, 64 + b % SUPER * 32);
                let scale = |i: usize| f32::from(panel[at + inner + i * PANEL + lane] as i8);
                [0, 1].map(|i| half(panel, at + 2 * lane) * scale(i))
            }
            _ => [half(panel, b * 2 * PANEL + 2 * lane); 2],
        }
    }

    /// The minimum of block `b` in row `lane`, for formats that have one.
    #[inline]
    pub(super) fn minimum(self, panel: &[u8], columns: usize, b: usize, lane: usize) -> Option<f32> {
        debug_assert!(b < columns / BLOCK);
        match self {
            Format::Q4_1 => Some(half(panel, b * 4 * PANEL + 2 * PANEL + 2 * lane)),
            Format::Q4K => {
                let (at, inner) = (b / SUPER * Q4_K_SCALES, 64 + b % SUPER * 32 + PANEL);
                Some(-(half(panel, at + 32 + 2 * lane) * f32::from(panel[at + inner + lane])))
            }
            _ => None,
        }
    }

    /// Byte `i` of register `j` of a block's quants, shifted by [`Format::offset`].
    #[inline]
    pub(super) fn quant(self, quants: &[u8], j: usize, i: usize) -> u8 {
        match self {
            Format::Q8_0 => quants[j * 64 + i],
            _ => {
                let four = (quants[j % 4 * 64 + i] >> (j / 4 * 4)) & 15;
                match self {
                    Format::Q6K => four | (((quants[256 + j / 4 * 64 + i] >> (j % 4 * 2)) & 3) << 4),
                    _ => four,
                }
            }
        }
    }
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// GGUF's Q4_K: F16 `d` and `dmin`, 12 bytes with 8 scales and 8 minimums of 6 bits, then for each pair of blocks 32 bytes, the
/// first block in the low halves. `x = d·scale·q − dmin·minimum`.
fn pack_q4_k(quants: &mut [u8], scales: &mut [u8], lane: usize, stored: &[u8]) {
    let (six, nibbles) = (&stored[4..16], &stored[16..]);
    scales[2 * lane..2 * lane + 2].copy_from_slice(&stored[..2]);
    scales[32 + 2 * lane..32 + 2 * lane + 2].copy_from_slice(&stored[2..4]);
    for b in 0..SUPER {
        let (scale, minimum) = match b {
            0..4 => (six[b] & 63, six[b + 4] & 63),
            _ => (
                (six[b + 4] & 15) | (six[b - 4] >> 6 << 4),
                (six[b + 4] >> 4) | (six[b] >> 6 << 4),
            ),
        };
        let inner = &mut scales[64 + b * 32..][..32];
        (inner[lane], inner[PANEL + lane]) = (scale, minimum);
        for column in 0..BLOCK {
            let q = (nibbles[b / 2 * BLOCK + column] >> (b % 2 * 4)) & 15;
            put_nibble(&mut quants[b * 256..], lane, column, q);
        }
    }
}

/// GGUF's Q6_K: 128 bytes of low halves, 64 bytes of two high bits, 16 scales (i8), F16 `d`. Each half of 128 columns: columns
/// `l`, `l + 32`, `l + 64`, `l + 96` share the high byte `l`. `x = d·scale·(q − 32)`.
fn pack_q6_k(quants: &mut [u8], scales: &mut [u8], lane: usize, stored: &[u8]) {
    let (low, high, inner) = (&stored[..128], &stored[128..192], &stored[192..208]);
    scales[2 * lane..2 * lane + 2].copy_from_slice(&stored[208..]);
    for (i, scale) in inner.iter().enumerate() {
        scales[64 + i * PANEL + lane] = *scale;
    }
    for at in 0..SUPER * BLOCK {
        let (part, quarter, l) = (at / 128, at % 128 / 32, at % 32);
        let four = (low[part * 64 + quarter % 2 * 32 + l] >> (quarter / 2 * 4)) & 15;
        let two = (high[part * 32 + l] >> (quarter * 2)) & 3;
        let (quants, column) = (&mut quants[at / BLOCK * 384..], at % BLOCK);
        put_nibble(quants, lane, column, four);
        let (j, i) = (column / 4, column % 4);
        quants[256 + j / 4 * 64 + lane * 4 + i] |= two << (j % 4 * 2);
    }
}

/// Puts 4 bits of a block's column where [`Format::block`] finds them.
fn put_nibble(block: &mut [u8], lane: usize, column: usize, q: u8) {
    let (j, i) = (column / 4, column % 4);
    block[j % 4 * 64 + lane * 4 + i] |= q << (j / 4 * 4);
}

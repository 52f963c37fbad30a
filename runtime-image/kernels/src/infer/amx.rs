//! The path for AMX: a tile of 16 activation rows with a panel, block by block. Fewer rows go the way of VNNI.
//!
//! A block of a panel has the layout of AMX's second operand as it is: four columns of 16 weight rows beside each other. A tile
//! product gives the exact integer sums of a block for 16 × 16 outputs; scaling them is what takes the time. It is done as in
//! the other paths, operation by operation, so the bits are the same too.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;

use super::avx512::{Kind, Q4_0, Q4_1, Q4K, Q8_0, load, unroll};
use super::format::{BLOCK, Format, PANEL};
use super::multiply::Sums;
use super::rows::{FACTS, SCALE, SCALED_SUM, TILE};

/// What `ldtilecfg` reads: of each tile the bytes of a row, and the rows.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Tiles 0 and 1: blocks of weights; 2 and 3: blocks of activations; 4 and 5: their products.
static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 32, 32, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [8, 8, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Quants of a block, signed: `[register][lane · 4 + column]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Quants([i8; BLOCK * PANEL]);

/// A panel taken apart, once for all activations.
#[derive(Default)]
struct Panel {
    quants: Vec<Quants>,
    scales: Vec<[f32; PANEL]>,
    /// Empty for formats that have none.
    minimums: Vec<[f32; PANEL]>,
}

/// Integer sums of a block: `[activation row][lane]`.
#[repr(C, align(64))]
struct Products([i32; TILE * PANEL]);

thread_local! {
    static TAKEN_APART: RefCell<Panel> = RefCell::default();
}

/// Whether the format goes this way. Q6_K has a scale for each half of a block.
pub(super) fn takes(format: Format) -> bool {
    matches!(format, Format::Q8_0 | Format::Q4_0 | Format::Q4_1 | Format::Q4K)
}

/// Multiplies a quantized panel with the whole tiles among `rows` activation rows; `give` gets the first row of each tile and its
/// sums. `tile` gives the quants and facts of the tile that begins at a row.
///
/// # Safety
/// The processor has AMX's 8-bit products beside AVX-512 with VNNI, and the process may use them; the panel and the tiles are of
/// `columns` columns.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn tiles<'a>(
    format: Format,
    panel: &[u8],
    columns: usize,
    rows: usize,
    tile: impl Fn(usize) -> (&'a [i8], &'a [u32], usize),
    mut give: impl FnMut(usize, &Sums),
) {
    TAKEN_APART.with_borrow_mut(|apart| {
        // SAFETY: as the function demands.
        unsafe {
            match format {
                Format::Q8_0 => take_apart::<Q8_0>(panel, columns, apart),
                Format::Q4_0 => take_apart::<Q4_0>(panel, columns, apart),
                Format::Q4_1 => take_apart::<Q4_1>(panel, columns, apart),
                Format::Q4K => take_apart::<Q4K>(panel, columns, apart),
                _ => unreachable!("see `takes`"),
            }
            // SAFETY: the configuration is one that AMX accepts.
            asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly));
            for first in (0..rows / TILE).map(|index| index * TILE) {
                let (quants, facts, _) = tile(first);
                let mut sums = [[0f32; PANEL]; TILE];
                match apart.minimums.is_empty() {
                    true => one::<false>(apart, quants, facts, &mut sums),
                    false => one::<true>(apart, quants, facts, &mut sums),
                }
                give(first, &sums);
            }
            asm!("tilerelease", options(nostack, nomem));
        }
    });
}

/// # Safety
/// As [`tiles`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn take_apart<K: Kind>(panel: &[u8], columns: usize, out: &mut Panel) {
    let blocks = columns / BLOCK;
    let has_minimum = matches!(K::FORMAT, Format::Q4_1 | Format::Q4K);
    out.quants.resize(blocks, Quants([0; BLOCK * PANEL]));
    out.scales.resize(blocks, [0.0; PANEL]);
    out.minimums.resize(if has_minimum { blocks } else { 0 }, [0.0; PANEL]);
    let scales = panel.as_ptr();
    let offset = _mm512_set1_epi8(match K::FORMAT {
        Format::Q8_0 => -128,
        Format::Q4_0 => 8,
        _ => 0,
    });
    for b in 0..blocks {
        // SAFETY: block `b` lies in the panel; registers go into arrays of their size.
        unsafe {
            let block = load::<K>(scales, scales.add(K::FORMAT.scale_bytes(columns)), b);
            for (j, quants) in block.quants.into_iter().enumerate() {
                let signed = _mm512_sub_epi8(quants, offset);
                _mm512_storeu_si512(out.quants[b].0.as_mut_ptr().add(64 * j).cast(), signed);
            }
            _mm512_storeu_ps(out.scales[b].as_mut_ptr(), block.scales[0]);
            if has_minimum {
                _mm512_storeu_ps(out.minimums[b].as_mut_ptr(), block.minimum);
            }
        }
    }
}

/// The integer sums of a block; `SECOND` takes the other set of tiles, so that two products are under way at once.
///
/// # Safety
/// The tiles are configured; `x` has 16 rows of 32 bytes.
#[inline(always)]
unsafe fn product<const SECOND: bool>(w: &Quants, x: *const i8, out: &mut Products) {
    // SAFETY: as the function demands; the operands have the sizes of the configuration.
    unsafe {
        if SECOND {
            asm!(
                "tileloadd tmm1, [{w} + {wide}]", "tileloadd tmm3, [{x} + {narrow}]", "tilezero tmm5",
                "tdpbssd tmm5, tmm3, tmm1", "tilestored [{out} + {wide}], tmm5",
                w = in(reg) w, x = in(reg) x, out = in(reg) out, wide = in(reg) 64usize, narrow = in(reg) 32usize,
                out("tmm1") _, out("tmm3") _, out("tmm5") _, options(nostack),
            );
        } else {
            asm!(
                "tileloadd tmm0, [{w} + {wide}]", "tileloadd tmm2, [{x} + {narrow}]", "tilezero tmm4",
                "tdpbssd tmm4, tmm2, tmm0", "tilestored [{out} + {wide}], tmm4",
                w = in(reg) w, x = in(reg) x, out = in(reg) out, wide = in(reg) 64usize, narrow = in(reg) 32usize,
                out("tmm0") _, out("tmm2") _, out("tmm4") _, options(nostack),
            );
        }
    }
}

/// One tile with the whole panel.
///
/// # Safety
/// As [`tiles`]; the tile is [`TILE`] wide.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn one<const MINIMUM: bool>(panel: &Panel, x: &[i8], facts: &[u32], out: &mut Sums) {
    const ROWS: usize = TILE;
    let blocks = panel.quants.len();
    debug_assert!(x.len() == blocks * BLOCK * TILE && facts.len() == blocks * FACTS * TILE);
    let mut products = [const { Products([0; TILE * PANEL]) }; 2];
    let mut sums = [_mm512_setzero_ps(); TILE];
    // SAFETY: the first block exists, as a matrix has columns.
    unsafe { product::<false>(&panel.quants[0], x.as_ptr(), &mut products[0]) };
    for b in 0..blocks {
        // SAFETY: block `b`, and the one after it if there is one, lie in panel and tile.
        unsafe {
            if b + 1 < blocks {
                let (w, x) = (&panel.quants[b + 1], x.as_ptr().add((b + 1) * BLOCK * TILE));
                match b % 2 == 0 {
                    true => product::<true>(w, x, &mut products[1]),
                    false => product::<false>(w, x, &mut products[0]),
                }
            }
            let integers = products[b % 2].0.as_ptr();
            let facts = facts.as_ptr().add(b * FACTS * TILE);
            let w_scale = _mm512_loadu_ps(panel.scales[b].as_ptr());
            let minimum = match MINIMUM {
                true => _mm512_loadu_ps(panel.minimums[b].as_ptr()),
                false => _mm512_setzero_ps(),
            };
            unroll!(r < ROWS, {
                let fact = |fact: usize| _mm512_set1_ps(facts.add(fact * TILE + r).cast::<f32>().read());
                let sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(integers.add(r * PANEL).cast()));
                sums[r] = _mm512_fmadd_ps(sum, _mm512_mul_ps(w_scale, fact(SCALE)), sums[r]);
                if MINIMUM {
                    sums[r] = _mm512_fmadd_ps(minimum, fact(SCALED_SUM), sums[r]);
                }
            });
        }
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        // SAFETY: 16 floats are written to an array of 16.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sums) };
    }
}

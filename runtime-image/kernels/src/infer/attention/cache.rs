//! Where keys and values lie.
//!
//! A block holds `block_tokens` tokens of every head. Keys lie dimension by dimension, the tokens side by side, so that the
//! scores of 16 tokens are sums in the lanes of one register; values lie token by token, so that what is mixed are the
//! dimensions in the lanes. Neither needs a sum across lanes.

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use crate::pool::{Disjoint, Pool};

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    /// 32-bit floats: exact.
    F32,
    /// Half floats: half the memory and reads.
    F16,
    /// Signed bytes, a half float as scale for up to 32 numbers of a token: a quarter.
    Q8,
}

/// Numbers that share a scale in [`KvDtype::Q8`], if the width of a head is a multiple of it; else the whole head does.
const GROUP: usize = 32;

/// Sizes of a cache of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens in a block.
    pub block_tokens: usize,
    /// Number type.
    pub dtype: KvDtype,
}

impl KvLayout {
    /// Bytes that a block takes in one layer, keys and values together.
    pub fn block_bytes(&self) -> usize {
        let numbers = 2 * self.kv_heads * self.block_tokens * self.head_dim;
        match self.dtype {
            KvDtype::F32 => 4 * numbers,
            KvDtype::F16 => 2 * numbers,
            KvDtype::Q8 => numbers + numbers / self.group() * 2,
        }
    }

    /// Numbers that share a scale.
    pub(super) fn group(&self) -> usize {
        if self.head_dim.is_multiple_of(GROUP) {
            GROUP
        } else {
            self.head_dim
        }
    }

    /// Numbers of one head in a block.
    fn head_numbers(&self) -> usize {
        self.block_tokens * self.head_dim
    }
}

/// Numbers in one of the types. Zeroed integers come from the system untouched, so memory is taken when a block is first written.
#[derive(Debug)]
pub(super) enum Store {
    F32(Vec<f32>),
    /// The bits of half floats.
    F16(Vec<u16>),
    Q8 {
        quants: Vec<i8>,
        /// The bits of half floats, one for each group of each token.
        scales: Vec<u16>,
    },
}

impl Store {
    fn new(dtype: KvDtype, numbers: usize, group: usize) -> Self {
        match dtype {
            KvDtype::F32 => Store::F32(vec![0.0; numbers]),
            KvDtype::F16 => Store::F16(vec![0; numbers]),
            KvDtype::Q8 => Store::Q8 {
                quants: vec![0; numbers],
                scales: vec![0; numbers / group],
            },
        }
    }

    /// Copies a block of `numbers` numbers.
    fn copy(&mut self, from: usize, to: usize, numbers: usize, group: usize) {
        match self {
            Store::F32(store) => store.copy_within(from..from + numbers, to),
            Store::F16(store) => store.copy_within(from..from + numbers, to),
            Store::Q8 { quants, scales } => {
                quants.copy_within(from..from + numbers, to);
                scales.copy_within(from / group..(from + numbers) / group, to / group);
            }
        }
    }
}

/// Keys and values of one layer.
#[derive(Debug)]
pub struct KvLayer {
    pub(super) layout: KvLayout,
    blocks: usize,
    /// `[block][head][dimension][token]`, scales `[block][head][group][token]`.
    pub(super) keys: Store,
    /// `[block][head][token][dimension]`, scales `[block][head][token][group]`.
    pub(super) values: Store,
}

impl KvLayer {
    /// A cache of `blocks` blocks.
    pub fn new(layout: KvLayout, blocks: usize) -> Self {
        let numbers = blocks * layout.kv_heads * layout.head_numbers();
        KvLayer {
            layout,
            blocks,
            keys: Store::new(layout.dtype, numbers, layout.group()),
            values: Store::new(layout.dtype, numbers, layout.group()),
        }
    }

    /// Blocks that it has.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Copies all of block `from` over block `to`.
    pub fn copy_block(&mut self, from: u32, to: u32) {
        let numbers = self.layout.kv_heads * self.layout.head_numbers();
        let (from, to) = (from as usize * numbers, to as usize * numbers);
        self.keys.copy(from, to, numbers, self.layout.group());
        self.values.copy(from, to, numbers, self.layout.group());
    }

    /// Stores the keys and values of several tokens (`kv_heads · head_dim` numbers each), token `i` at `slots[i]`: a block and a
    /// place in it.
    ///
    /// Panics when the sizes do not fit together.
    pub fn write(&mut self, pool: &Pool, slots: &[(u32, usize)], keys: &[f32], values: &[f32]) {
        let layout = self.layout;
        let width = layout.kv_heads * layout.head_dim;
        assert!(
            keys.len() == slots.len() * width && values.len() == keys.len(),
            "keys and values of {} tokens",
            slots.len()
        );
        assert!(
            slots
                .iter()
                .all(|(block, slot)| (*block as usize) < self.blocks && *slot < layout.block_tokens),
            "a place outside of the cache"
        );
        let stores = [Target::new(&mut self.keys), Target::new(&mut self.values)];
        // By head and not by token: then nothing depends on the places being different.
        let parts = 2 * layout.kv_heads;
        pool.parallel_for_min(parts, if slots.len() < 16 { parts } else { 1 }, |range| {
            let mut numbers = vec![0u16; layout.head_dim];
            for part in range {
                let (transposed, head) = (part % 2 == 0, part / 2);
                let (store, source) = if transposed {
                    (&stores[0], keys)
                } else {
                    (&stores[1], values)
                };
                for ((block, slot), row) in slots.iter().zip(source.chunks_exact(width)) {
                    let place = Place::new(&layout, *block, head, *slot, transposed);
                    let row = &row[head * layout.head_dim..][..layout.head_dim];
                    // SAFETY: each head of keys or values is written by one chunk.
                    unsafe { store.write(&place, row, &mut numbers) };
                }
            }
        });
    }

    /// Where the numbers of `head` begin in `block`.
    pub(super) fn at(&self, block: u32, head: usize) -> usize {
        (block as usize * self.layout.kv_heads + head) * self.layout.head_numbers()
    }

    /// Number `at` of the keys or the values; its scale is `scale`.
    pub(super) fn read(store: &Store, at: usize, scale: usize) -> f32 {
        match store {
            Store::F32(store) => store[at],
            Store::F16(store) => f16::from_bits(store[at]).to_f32(),
            Store::Q8 { quants, scales } => f32::from(quants[at]) * f16::from_bits(scales[scale]).to_f32(),
        }
    }
}

/// Where one token's numbers of one head go: the first place and the distance, for numbers and for scales.
struct Place {
    first: usize,
    step: usize,
    first_scale: usize,
    step_scale: usize,
    group: usize,
}

impl Place {
    fn new(layout: &KvLayout, block: u32, head: usize, slot: usize, transposed: bool) -> Self {
        let KvLayout {
            kv_heads,
            head_dim,
            block_tokens,
            ..
        } = *layout;
        let group = layout.group();
        let at = (block as usize * kv_heads + head) * layout.head_numbers();
        let (step, offset) = if transposed { (block_tokens, 1) } else { (1, head_dim) };
        let (step_scale, scale_offset) = if transposed {
            (block_tokens, 1)
        } else {
            (1, head_dim / group)
        };
        Place {
            first: at + slot * offset,
            step,
            first_scale: at / group + slot * scale_offset,
            step_scale,
            group,
        }
    }
}

/// A store that several threads write at different heads.
enum Target<'a> {
    F32(Disjoint<'a, f32>),
    F16(Disjoint<'a, u16>),
    Q8(Disjoint<'a, i8>, Disjoint<'a, u16>),
}

impl<'a> Target<'a> {
    fn new(store: &'a mut Store) -> Self {
        match store {
            Store::F32(store) => Target::F32(Disjoint::new(store)),
            Store::F16(store) => Target::F16(Disjoint::new(store)),
            Store::Q8 { quants, scales } => Target::Q8(Disjoint::new(quants), Disjoint::new(scales)),
        }
    }

    /// # Safety
    /// No other thread writes the same head of the same store.
    unsafe fn write(&self, place: &Place, row: &[f32], numbers: &mut [u16]) {
        let last = place.first + (row.len() - 1) * place.step;
        // SAFETY: as the function demands, and the range stays within the head's part of the block.
        unsafe {
            match self {
                Target::F32(store) => {
                    let store = store.slice_mut(place.first..last + 1);
                    row.iter().enumerate().for_each(|(i, x)| store[i * place.step] = *x);
                }
                Target::F16(store) => {
                    let store = store.slice_mut(place.first..last + 1);
                    numbers.reinterpret_cast_mut::<f16>().convert_from_f32_slice(row);
                    numbers.iter().enumerate().for_each(|(i, x)| store[i * place.step] = *x);
                }
                Target::Q8(quants, scales) => {
                    let store = quants.slice_mut(place.first..last + 1);
                    for (g, row) in row.chunks_exact(place.group).enumerate() {
                        let largest = row
                            .iter()
                            .fold(0f32, |largest, x| if x.abs() > largest { x.abs() } else { largest });
                        let scale = f16::from_f32(largest / 127.0);
                        // By the scale that is kept: rounding it must not push a number over 127.
                        let inverse = if scale.to_f32() > 0.0 {
                            1.0 / scale.to_f32()
                        } else {
                            0.0
                        };
                        for (i, x) in row.iter().enumerate() {
                            store[(g * place.group + i) * place.step] =
                                (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
                        }
                        let at = place.first_scale + g * place.step_scale;
                        scales.slice_mut(at..at + 1)[0] = scale.to_bits();
                    }
                }
            }
        }
    }
}

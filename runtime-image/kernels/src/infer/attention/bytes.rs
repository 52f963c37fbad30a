//! A block as bytes, for who keeps it outside of the cache: what comes back is what left, bit for bit.

use super::cache::{KvLayer, Store};

impl KvLayer {
    /// Bytes of a block, keys and values together.
    pub fn block_bytes(&self) -> usize {
        self.layout.block_bytes()
    }

    /// Copies what a block holds, keys and then values, to `bytes`.
    ///
    /// Panics unless they are [`KvLayer::block_bytes`].
    pub fn save_block(&self, block: u32, bytes: &mut [u8]) {
        let (first, numbers) = self.range(block, bytes.len());
        let group = self.layout.group();
        let (keys, values) = bytes.split_at_mut(bytes.len() / 2);
        for (store, bytes) in [(&self.keys, keys), (&self.values, values)] {
            match store {
                Store::F32(store) => save(&store[first..][..numbers], bytes, |x| x.to_le_bytes()),
                Store::F16(store) => save(&store[first..][..numbers], bytes, |x| x.to_le_bytes()),
                Store::Q8 { quants, scales } => {
                    let (of_quants, of_scales) = bytes.split_at_mut(numbers);
                    save(&quants[first..][..numbers], of_quants, |x| x.to_le_bytes());
                    save(&scales[first / group..][..numbers / group], of_scales, |x| {
                        x.to_le_bytes()
                    });
                }
            }
        }
    }

    /// Makes a block what [`KvLayer::save_block`] gave.
    ///
    /// Panics as that does.
    pub fn load_block(&mut self, block: u32, bytes: &[u8]) {
        let (first, numbers) = self.range(block, bytes.len());
        let group = self.layout.group();
        let (keys, values) = bytes.split_at(bytes.len() / 2);
        for (store, bytes) in [(&mut self.keys, keys), (&mut self.values, values)] {
            match store {
                Store::F32(store) => load(&mut store[first..][..numbers], bytes, f32::from_le_bytes),
                Store::F16(store) => load(&mut store[first..][..numbers], bytes, u16::from_le_bytes),
                Store::Q8 { quants, scales } => {
                    let (of_quants, of_scales) = bytes.split_at(numbers);
                    load(&mut quants[first..][..numbers], of_quants, i8::from_le_bytes);
                    let scales = &mut scales[first / group..][..numbers / group];
                    load(scales, of_scales, u16::from_le_bytes);
                }
            }
        }
    }

    /// Where a block's numbers of keys, or of values, begin, and how many they are.
    fn range(&self, block: u32, bytes: usize) -> (usize, usize) {
        assert_eq!(bytes, self.block_bytes(), "the bytes of one block");
        let numbers = self.layout.kv_heads * self.layout.block_tokens * self.layout.head_dim;
        (block as usize * numbers, numbers)
    }
}

fn save<T: Copy, const N: usize>(from: &[T], to: &mut [u8], bytes: impl Fn(T) -> [u8; N]) {
    for (to, number) in to.as_chunks_mut::<N>().0.iter_mut().zip(from) {
        *to = bytes(*number);
    }
}

fn load<T, const N: usize>(to: &mut [T], from: &[u8], number: impl Fn([u8; N]) -> T) {
    for (to, bytes) in to.iter_mut().zip(from.as_chunks::<N>().0) {
        *to = number(*bytes);
    }
}

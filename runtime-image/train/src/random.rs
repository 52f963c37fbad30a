//! Random numbers that are the same in every release: initialization and the order of the data are functions of the seed.

/// SplitMix64 (Steele, Lea and Flood 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream `stream` of `seed`; streams do not overlap in practice.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut mixed = Self(seed);
        let start = mixed.next() ^ stream.wrapping_mul(0xD6E8_FEB8_6659_FD93);
        Self(start)
    }

    /// 64 random bits.
    #[allow(
        clippy::should_implement_trait,
        reason = "the usual name; there is no end to iterate to"
    )]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal (Box and Muller 1958).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Uniform below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        // The high half of the product; its bias is below 2^-32 for bounds below 2^32.
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// Shuffles `items` (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_fixed_and_differ() {
        // SplitMix64 from state 0 gives 0xE220A8397B1DCDAF first (the reference implementation).
        assert_eq!(Random(0).next(), 0xE220_A839_7B1D_CDAF);
        assert_ne!(Random::new(17, 0).next(), Random::new(17, 1).next());
        let mut items: Vec<u32> = (0..100).collect();
        Random::new(17, 3).shuffle(&mut items);
        let mut sorted = items.clone();
        sorted.sort_unstable();
        assert!(items != sorted && sorted == (0..100).collect::<Vec<_>>());
        let normals: Vec<f64> = {
            let mut r = Random::new(1, 1);
            (0..20_000).map(|_| r.normal()).collect()
        };
        let mean = normals.iter().sum::<f64>() / 2e4;
        let variance = normals.iter().map(|x| x * x).sum::<f64>() / 2e4;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }
}

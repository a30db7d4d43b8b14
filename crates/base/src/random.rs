//! Counter-based randomness: every number is a hash of what it is for, so it is the same on every rank,
//! device and run, whatever was drawn before it.

/// A small seeded generator over the SplitMix64 sequence (Steele, Lea, Flood, OOPSLA 2014).
#[derive(Clone, Debug)]
pub struct Mix(u64);

impl Mix {
    /// A generator whose numbers depend on `seed` alone.
    pub fn new(seed: u64) -> Self {
        Mix(seed)
    }

    /// A generator for one named purpose under a seed.
    pub fn keyed(seed: u64, key: &[u64]) -> Self {
        Mix(key.iter().fold(scramble(seed), |state, &word| scramble(state ^ scramble(word))))
    }

    /// What its numbers follow from, for another implementation of [`at`](Mix::at).
    pub fn key(&self) -> u64 {
        self.0
    }

    /// The `index`-th number of this generator, without drawing the ones before it.
    pub fn at(&self, index: u64) -> u64 {
        scramble(self.0.wrapping_add(GOLDEN.wrapping_mul(index)))
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let value = scramble(self.0);
        self.0 = self.0.wrapping_add(GOLDEN);
        value
    }

    /// A number in `0..bound`; 0 when `bound` is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next_u64()) * bound as u128) >> 64) as usize
    }

    /// A number in [0, 1) with 24 random bits.
    pub fn unit(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1u32 << 24) as f32
    }

    /// A number in [-1, 1) with 24 random bits.
    pub fn signed(&mut self) -> f32 {
        self.unit() * 2.0 - 1.0
    }
}

/// A 64-bit hash of bytes (FNV-1a, then scrambled), stable over releases: synthetic weights depend on it.
pub fn hash_bytes(bytes: &[u8]) -> u64 {
    scramble(bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    }))
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

fn scramble(value: u64) -> u64 {
    let mut z = value.wrapping_add(GOLDEN);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_numbers_of_seed_zero_are_the_published_ones() {
        let mut mix = Mix::new(0);
        assert_eq!(mix.next_u64(), 0xe220_a839_7b1d_cdaf);
        assert_eq!(mix.next_u64(), 0x6e78_9e6a_a1b9_65f4);
    }

    #[test]
    fn counting_and_drawing_agree() {
        let generator = Mix::keyed(7, &[1, 2]);
        let mut drawn = generator.clone();
        for index in 0..10 {
            assert_eq!(drawn.next_u64(), generator.at(index));
        }
    }

    #[test]
    fn ranges_hold() {
        let mut mix = Mix::new(3);
        for _ in 0..1000 {
            assert!(mix.below(5) < 5);
            assert!((-1.0..1.0).contains(&mix.signed()));
        }
        assert_eq!(mix.below(0), 0);
    }
}

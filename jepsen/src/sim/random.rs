//! All chance of a run comes from its seed. One generator serves the simulator, another the code under test, so that a
//! fault that is left out while a failure is minimised does not change who wins an election by itself.

use std::cell::RefCell;
use std::convert::Infallible;
use std::ops::Range;

use consensus::platform::Entropy;
use rand::Rng;
use rand::RngExt;
use rand::SeedableRng;
use rand::TryRng;
use rand::rngs::Xoshiro256PlusPlus;

/// The simulator's own dice.
pub struct Dice(Xoshiro256PlusPlus);

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice(Xoshiro256PlusPlus::seed_from_u64(seed))
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.0.random_range(0..end.max(1))
    }

    pub fn range(&mut self, range: Range<u64>) -> u64 {
        self.0.random_range(range)
    }

    /// One in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        if of.is_empty() { None } else { of.get(self.below(of.len() as u64) as usize) }
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for end in (1..items.len()).rev() {
            items.swap(end, self.below(end as u64 + 1) as usize);
        }
    }
}

thread_local! {
    static PRODUCT: RefCell<Xoshiro256PlusPlus> = RefCell::new(Xoshiro256PlusPlus::seed_from_u64(0));
}

/// Seeds what the code under test draws from, on this thread: a run stays on one.
pub fn seed_product(seed: u64) {
    PRODUCT.with_borrow_mut(|random| *random = Xoshiro256PlusPlus::seed_from_u64(seed ^ 0x9e37_79b9_7f4a_7c15));
}

/// The generator of the code under test.
#[derive(Debug, Clone, Copy)]
pub struct Seeded;

impl TryRng for Seeded {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(PRODUCT.with_borrow_mut(|random| random.next_u32()))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(PRODUCT.with_borrow_mut(|random| random.next_u64()))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        PRODUCT.with_borrow_mut(|random| random.fill_bytes(bytes));
        Ok(())
    }
}

impl Entropy for Seeded {
    fn fill(&self, bytes: &mut [u8]) {
        PRODUCT.with_borrow_mut(|random| random.fill_bytes(bytes));
    }
}

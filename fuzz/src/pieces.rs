//! An input as a list of pieces, and how libFuzzer changes one.

use libfuzzer_sys::fuzzer_mutate;
use statemachine::codec;

/// An input as pieces: `tag u8 | length u16 LE | bytes`. The last one takes what is there.
#[derive(Clone, Copy)]
pub struct Pieces<'a>(pub &'a [u8]);

impl<'a> Iterator for Pieces<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let ([tag, low, high], rest) = self.0.split_first_chunk::<3>()?;
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (piece, rest) = rest.split_at(len);
        self.0 = rest;
        Some((*tag, piece))
    }
}

/// The input that [`Pieces`] takes apart into these.
pub fn joined<'a>(pieces: impl IntoIterator<Item = (u8, &'a [u8])>) -> Vec<u8> {
    let mut input = Vec::new();
    for (tag, piece) in pieces {
        let len = u16::try_from(piece.len()).unwrap_or(u16::MAX);
        input.push(tag);
        input.extend_from_slice(&len.to_le_bytes());
        input.extend_from_slice(piece);
    }
    input
}

/// Where arithmetic ends. As the codec writes them they take nine bytes, where there was one.
const EXTREMES: [u64; 4] = [u64::MAX, u64::MAX - 1, 1 << 63, u32::MAX as u64];

/// Changes one piece and leaves the others whole: what libFuzzer inserts by itself moves every length behind it.
pub fn mutate(data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    let mut pieces = owned(&data[..size]);
    let (choice, at) = (seed % 16, (seed / 16) as usize % pieces.len().max(1));
    if pieces.is_empty() || choice < 4 {
        return fuzzer_mutate(data, size, max_size);
    }
    match choice {
        4 => pieces.insert(at, pieces[at].clone()),
        5 => drop(pieces.remove(at)),
        6 => pieces.swap(at, 0),
        7 => pieces[at].0 = (seed >> 24) as u8,
        8 if !pieces[at].1.is_empty() => {
            let piece = &mut pieces[at].1;
            let byte = (seed >> 16) as usize % piece.len();
            piece.splice(byte..=byte, codec::encode(&EXTREMES[seed as usize >> 8 & 3]));
        }
        _ => {
            let piece = &mut pieces[at].1;
            let most = piece.len() + max_size.saturating_sub(size).max(1);
            let len = piece.len();
            piece.resize(most, 0);
            let len = fuzzer_mutate(piece, len, most);
            piece.truncate(len);
        }
    }
    put(&pieces, &mut data[..max_size])
}

/// The first pieces of one input, then the last ones of another: two things that happen one after the other.
pub fn cross_over(first: &[u8], second: &[u8], out: &mut [u8], seed: u32) -> usize {
    let (mut pieces, mut others) = (owned(first), owned(second));
    pieces.truncate(1 + (seed >> 16) as usize % pieces.len().max(1));
    let from = seed as usize % (others.len() + 1);
    pieces.extend(others.split_off(from));
    put(&pieces, out)
}

fn owned(input: &[u8]) -> Vec<(u8, Vec<u8>)> {
    Pieces(input).map(|(tag, piece)| (tag, piece.to_vec())).collect()
}

/// Writes as much of the pieces as there is room for, and says how much.
fn put(pieces: &[(u8, Vec<u8>)], out: &mut [u8]) -> usize {
    let input = joined(pieces.iter().map(|(tag, piece)| (*tag, piece.as_slice())));
    let len = input.len().min(out.len());
    out[..len].copy_from_slice(&input[..len]);
    len
}

/// Has libFuzzer change an input piece by piece.
#[macro_export]
macro_rules! mutate_pieces {
    () => {
        libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
            $crate::pieces::mutate(data, size, max_size, seed)
        });
        libfuzzer_sys::fuzz_crossover!(|first: &[u8], second: &[u8], out: &mut [u8], seed: u32| {
            $crate::pieces::cross_over(first, second, out, seed)
        });
    };
}

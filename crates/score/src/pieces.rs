//! Work in pieces that get smaller where memory runs out: prefill chunks, and packs of repeats.
//!
//! Results do not depend on the pieces but for rounding. What a piece is, its caller knows.

use std::ops::Range;

use anyhow::{Result, bail};
use pkv_core::hinted;
use pkv_gpu::unless_exhausted;
use pkv_lm::prefill_chunk;

/// Below so many tokens a prefill chunk saves no memory that matters.
const LEAST_PREFILL_TOKENS: usize = 512;

/// Run `read` over `0..tokens` in chunks of at most `size`, in order.
///
/// A chunk that memory has no room for is read again, half as long; `read` must then have left
/// nothing behind.
///
/// # Errors
/// Those of `read`; memory has no room for 512 tokens either.
pub(crate) fn prefill(
    tokens: usize,
    size: usize,
    mut read: impl FnMut(Range<usize>) -> Result<()>,
) -> Result<()> {
    let (mut done, mut size, mut short) = (0, size.max(1), false);
    while done < tokens {
        // Where memory is short, the last chunk is not stretched.
        let chunk = if short { done..tokens.min(done + size) } else { prefill_chunk(done, tokens, size) };
        let tried = chunk.len();
        if unless_exhausted(|| read(chunk.clone()))?.is_some() {
            done = chunk.end;
            continue;
        }
        if tried <= LEAST_PREFILL_TOKENS {
            bail!(no_room(format!("memory ran out in a prefill chunk of {tried} tokens")));
        }
        (size, short) = ((tried / 2).max(LEAST_PREFILL_TOKENS), true);
        tracing::warn!("memory ran out in a prefill chunk of {tried} tokens; going on with {size}");
    }
    Ok(())
}

/// Run `read` over `items` in packs, in order: as many items as have at most `limit` tokens together,
/// and at least one.
///
/// A pack that memory has no room for is read again, half of its items at a time; what the first
/// attempt wrote is written again.
///
/// # Errors
/// Those of `read`; memory has no room for a single item either.
pub(crate) fn packs<T>(
    items: &[T],
    tokens: impl Fn(&T) -> usize,
    limit: usize,
    mut read: impl FnMut(&[T]) -> Result<()>,
) -> Result<()> {
    let total = |items: &[T]| items.iter().map(&tokens).sum::<usize>();
    let (mut rest, mut limit) = (items, limit);
    while !rest.is_empty() {
        let fitting = (1..=rest.len()).take_while(|n| total(&rest[..*n]) <= limit).count();
        let pack = &rest[..fitting.max(1)];
        if unless_exhausted(|| read(pack))?.is_some() {
            rest = &rest[pack.len()..];
            continue;
        }
        let tried = total(pack);
        if pack.len() == 1 {
            bail!(no_room(format!("memory ran out while one scoring chunk was repeated ({tried} tokens)")));
        }
        limit = total(&pack[..pack.len() / 2]);
        tracing::warn!("memory ran out in a pack of {tried} tokens; going on with {limit}");
    }
    Ok(())
}

fn no_room(what: String) -> pkv_core::Hinted {
    hinted(
        what,
        "free the device of other work, or use shorter contexts or a smaller model; `plan` tells what is needed",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// tch's words where libtorch finds no room.
    fn exhaust() -> Result<()> {
        panic!(
            "called `Result::unwrap()` on an `Err` value: Torch(\"CUDA out of memory. Tried to allocate 2.00 GiB\")"
        )
    }

    #[test]
    fn prefill_chunks_are_halved_until_they_fit() {
        let mut read = Vec::new();
        prefill(10_000, 8000, |chunk| {
            if chunk.len() > 2500 {
                return exhaust();
            }
            read.push(chunk);
            Ok(())
        })
        .unwrap();
        assert_eq!(read, [0..2500, 2500..5000, 5000..7500, 7500..10_000]);
        let mut tried = Vec::new();
        let error = prefill(5000, 3000, |chunk| {
            tried.push(chunk.len());
            exhaust()
        })
        .unwrap_err();
        assert_eq!(tried, [3000, 1500, 750, 512]);
        assert!(error.to_string().contains("512 tokens"), "{error}");
        assert!(error.downcast_ref::<pkv_core::Hinted>().is_some());
        assert_eq!(prefill(9, 4, |_| bail!("no such file")).unwrap_err().to_string(), "no such file");
    }

    #[test]
    fn packs_hold_what_fits_and_shrink() {
        let run = |items: &[usize], limit: usize, room: usize| {
            let mut read = Vec::new();
            let outcome = packs(
                items,
                |n| *n,
                limit,
                |pack| {
                    if pack.iter().sum::<usize>() > room {
                        return exhaust();
                    }
                    read.push(pack.to_vec());
                    Ok(())
                },
            );
            outcome.map(|()| read)
        };
        let all = usize::MAX;
        assert_eq!(run(&[5, 5, 5, 2], 10, all).unwrap(), [vec![5, 5], vec![5, 2]]);
        assert_eq!(run(&[5, 5, 5], 1, all).unwrap(), [[5], [5], [5]], "one at least");
        assert_eq!(run(&[5, 5, 5], all, all).unwrap(), [[5, 5, 5]]);
        assert_eq!(run(&[5, 5, 5, 5, 5], all, 11).unwrap(), [vec![5, 5], vec![5, 5], vec![5]]);
        assert_eq!(run(&[5, 5, 5], all, 5).unwrap(), [[5], [5], [5]]);
        let error = run(&[5, 5], all, 4).unwrap_err();
        assert!(error.to_string().contains("one scoring chunk"), "{error}");
    }
}

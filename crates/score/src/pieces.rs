//! Groups of repeats for one forward, made smaller when memory runs out, as prefill chunks are
//! ([`pkv_lm::Chunks`]).
//!
//! Results depend on the groups only by rounding.

use anyhow::{Result, bail};
use pkv_core::hinted;
use pkv_gpu::unless_exhausted;

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
            bail!(
                hinted(
                    format!("memory ran out while one scoring chunk was repeated ({tried} tokens)"),
                    "free the device of other work, or use shorter contexts or a smaller model; `plan` tells what is \
                     needed",
                )
                .environment()
            );
        }
        limit = total(&pack[..pack.len() / 2]);
        tracing::warn!("memory ran out in a pack of {tried} tokens; going on with {limit}");
    }
    Ok(())
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

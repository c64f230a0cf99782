//! Tokenizing a batch of texts on all cores.

use std::thread;

use anyhow::Result;

/// Text to token ids, without special tokens.
pub(crate) type Encode<'a> = dyn Fn(&str) -> Result<Vec<u32>> + Sync + 'a;

/// The tokens of every text, in order; the same whatever the number of threads.
pub(crate) fn encode_all(encode: &Encode, texts: &[&str]) -> Result<Vec<Vec<u32>>> {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(texts.len());
    if threads <= 1 {
        return texts.iter().map(|t| encode(t)).collect();
    }
    // Dealt round robin: long documents often stand together.
    let mut out = vec![Vec::new(); texts.len()];
    let shares = thread::scope(|scope| {
        let share = |first: usize| texts.iter().skip(first).step_by(threads).map(|t| encode(t)).collect();
        let workers: Vec<_> = (0..threads).map(|first| scope.spawn(move || share(first))).collect();
        let join =
            |w: thread::ScopedJoinHandle<'_, _>| w.join().unwrap_or_else(|e| std::panic::resume_unwind(e));
        workers.into_iter().map(join).collect::<Result<Vec<Vec<Vec<u32>>>>>()
    })?;
    for (first, share) in shares.into_iter().enumerate() {
        for (i, tokens) in share.into_iter().enumerate() {
            out[first + i * threads] = tokens;
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use anyhow::ensure;

    use super::*;

    #[test]
    fn order_is_kept_and_errors_come_through() {
        let texts: Vec<_> = (0..37).map(|i| "x".repeat(i)).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let lengths = encode_all(&|t| Ok(vec![t.len() as u32]), &texts).unwrap();
        assert_eq!(lengths, (0..37).map(|i| vec![i]).collect::<Vec<_>>());
        assert!(
            encode_all(
                &|t| {
                    ensure!(t.len() < 30, "long");
                    Ok(Vec::new())
                },
                &texts
            )
            .is_err()
        );
        assert!(encode_all(&|_| unreachable!("there is no text"), &[]).unwrap().is_empty());
    }
}

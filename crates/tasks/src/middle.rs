//! Truncation of a prompt that is too long: its beginning and end are kept.

/// Cut the middle out of `context`, so that it and the `after` tokens that follow it are `most` at most.
///
/// Of the whole prompt the first `most / 2` tokens stay and as many of the last, since both ends may hold
/// instructions (LongBench `pred.py`; SCBench `truncate_input`). What is cut is cut out of the context; where
/// the last half is too short for what follows, the first half makes room.
///
/// Returns whether anything was cut. Differs: the references decode the two halves and tokenize them again.
pub fn cut_middle(context: &mut Vec<u32>, after: usize, most: usize) -> bool {
    if context.len() + after <= most {
        return false;
    }
    let room = most.saturating_sub(after);
    let half = most / 2;
    let tail = half.saturating_sub(after).min(room);
    let head = (if tail > 0 { half } else { room }).min(room - tail);
    context.drain(head..context.len() - tail);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_stay() {
        let tokens: Vec<u32> = (0..100).collect();
        let cut = |after, most| {
            let mut t = tokens.clone();
            let was_cut = cut_middle(&mut t, after, most);
            (was_cut, t)
        };
        assert_eq!(cut(20, 120), (false, tokens.clone()));
        // 60 of 120: the first 30, and the last 30, of which 20 come after the context.
        assert_eq!(cut(20, 60).1, (0..30).chain(90..100).collect::<Vec<_>>());
        assert_eq!(cut(0, 11).1, (0..5).chain(95..100).collect::<Vec<_>>());
        // What follows takes more than its half.
        assert_eq!(cut(40, 60).1, (0..20).collect::<Vec<_>>());
        assert_eq!(cut(80, 60).1, Vec::<u32>::new());
        for (after, most) in [(0, 10), (3, 51), (25, 52), (26, 51)] {
            assert!(cut(after, most).1.len() + after <= most);
        }
    }
}

//! Labels beside the ends of lines, moved apart so that none covers another.

/// Heights near `wanted`, at least `gap` apart and inside `[low, high]`, in the order of `wanted`.
///
/// Labels that touch form a block, which settles at the mean of what its members want: the pool
/// adjacent violators way, which gives the least squared displacement.
pub fn spread(wanted: &[f64], gap: f64, low: f64, high: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    // Of equal preferred heights the later one, which is drawn on top, gets the higher place.
    order.sort_by(|&a, &b| wanted[a].total_cmp(&wanted[b]).then(b.cmp(&a)));
    // A block: where its first label wants to be (mean of wanted - offset), and its members.
    let mut blocks: Vec<(f64, Vec<usize>)> = Vec::new();
    let last_start = |n: usize| high - gap * (n as f64 - 1.0);
    for &i in &order {
        let mut block = (wanted[i], vec![i]);
        while let Some(before) = blocks.pop() {
            if before.0 + gap * before.1.len() as f64 <= block.0 {
                blocks.push(before);
                break;
            }
            block = merge(before, block, gap);
        }
        block.0 = block.0.min(last_start(block.1.len())).max(low);
        blocks.push(block);
        // Clamping may have pushed the block into the one before it.
        while let [.., before, after] = blocks.as_slice()
            && before.0 + gap * before.1.len() as f64 > after.0
        {
            let (after, before) = (blocks.pop().expect("two"), blocks.pop().expect("two"));
            let mut block = merge(before, after, gap);
            block.0 = block.0.min(last_start(block.1.len())).max(low);
            blocks.push(block);
        }
    }
    let mut out = vec![0.0; wanted.len()];
    for (start, members) in blocks {
        for (k, i) in members.into_iter().enumerate() {
            out[i] = start + gap * k as f64;
        }
    }
    out
}

fn merge(a: (f64, Vec<usize>), b: (f64, Vec<usize>), gap: f64) -> (f64, Vec<usize>) {
    let (n, m) = (a.1.len() as f64, b.1.len() as f64);
    let start = (a.0 * n + (b.0 - gap * n) * m) / (n + m);
    (start, a.1.into_iter().chain(b.1).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(wanted: &[f64], low: f64, high: f64) -> Vec<f64> {
        let out = spread(wanted, 10.0, low, high);
        let mut sorted = out.clone();
        sorted.sort_by(f64::total_cmp);
        for pair in sorted.windows(2) {
            assert!(pair[1] - pair[0] >= 10.0 - 1e-9, "{wanted:?} -> {out:?}");
        }
        assert!(sorted.first().is_none_or(|&y| y >= low - 1e-9), "{out:?}");
        assert!(sorted.last().is_none_or(|&y| y <= high + 1e-9), "{out:?}");
        out
    }

    #[test]
    fn labels_stay_where_there_is_room_and_part_where_there_is_none() {
        assert_eq!(check(&[50.0, 10.0, 90.0], 0.0, 100.0), [50.0, 10.0, 90.0]);
        assert_eq!(check(&[50.0, 52.0], 0.0, 100.0), [46.0, 56.0]);
        assert_eq!(check(&[50.0, 50.0], 0.0, 100.0), [55.0, 45.0]);
        assert_eq!(check(&[99.0, 98.0, 97.0], 0.0, 100.0), [100.0, 90.0, 80.0]);
        assert_eq!(check(&[0.0, 1.0, 2.0], 0.0, 100.0), [0.0, 10.0, 20.0]);
        check(&[5.0, 5.0, 5.0, 30.0, 31.0, 29.0, 95.0, 96.0, 97.0, 98.0], 0.0, 100.0);
        check(&[100.0, 100.0, 84.0, 80.0], 0.0, 100.0);
        check(&[], 0.0, 100.0);
    }
}

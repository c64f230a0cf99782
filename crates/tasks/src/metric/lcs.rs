//! Longest common subsequences.

/// Positions in `a` of a longest common subsequence of `a` and `b`, ascending.
///
/// Of several longest ones it takes the one that the references take: read from the end, where neither
/// item can be left out for free, `prefer_a` leaves out the item of `a` first.
pub fn positions<T: Eq>(a: &[T], b: &[T], prefer_a: bool) -> Vec<usize> {
    let width = b.len() + 1;
    let mut table = vec![0u32; (a.len() + 1) * width];
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            table[i * width + j] = if a[i - 1] == b[j - 1] {
                table[(i - 1) * width + j - 1] + 1
            } else {
                table[(i - 1) * width + j].max(table[i * width + j - 1])
            };
        }
    }
    let (mut i, mut j) = (a.len(), b.len());
    let mut found = Vec::new();
    while i > 0 && j > 0 {
        let (without_a, without_b) = (table[(i - 1) * width + j], table[i * width + j - 1]);
        if a[i - 1] == b[j - 1] {
            found.push(i - 1);
            (i, j) = (i - 1, j - 1);
        } else if without_a > without_b || (prefer_a && without_a == without_b) {
            i -= 1;
        } else {
            j -= 1;
        }
    }
    found.reverse();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subsequences_are_common_and_longest() {
        let a: Vec<char> = "ABCBDAB".chars().collect();
        let b: Vec<char> = "BDCABA".chars().collect();
        for prefer_a in [false, true] {
            let found: String = positions(&a, &b, prefer_a).iter().map(|&i| a[i]).collect();
            assert_eq!(found.len(), 4);
            let mut rest = b.iter();
            assert!(found.chars().all(|c| rest.any(|x| *x == c)), "{found}");
        }
        assert!(positions::<char>(&[], &b, true).is_empty());
    }
}

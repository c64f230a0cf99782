//! The largest text that fits a length.

/// The largest size up to `most` for which `length(size) <= limit`; `None` if even `least` is too long.
///
/// `length` should grow with the size; where it wavers (random words differ in tokens) the result still
/// fits, though a slightly larger size might too.
pub fn largest(least: usize, most: usize, limit: usize, length: impl Fn(usize) -> usize) -> Option<usize> {
    if length(least) > limit {
        return None;
    }
    // Doubling first: most sizes that are tried are then far shorter than `most`.
    let (mut fits, mut step) = (least, least.max(1));
    let mut too_long = loop {
        let next = fits + step;
        if next > most {
            break most + 1;
        }
        if length(next) > limit {
            break next;
        }
        (fits, step) = (next, 2 * step);
    };
    while too_long - fits > 1 {
        let middle = fits + (too_long - fits) / 2;
        if length(middle) <= limit { fits = middle } else { too_long = middle }
    }
    Some(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_largest_that_fits() {
        for limit in 3..200 {
            assert_eq!(largest(1, 1000, limit, |n| 2 + n), Some(limit - 2));
            assert_eq!(largest(1, 50, limit, |n| 2 + n), Some((limit - 2).min(50)));
        }
        assert_eq!(largest(1, 1000, 2, |n| 2 + n), None);
        assert_eq!(largest(0, 7, 5, |_| 5), Some(7));
    }
}

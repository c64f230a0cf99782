//! Plain loops in f64, for references that share no code with what they hold.

/// Softmax weights of a query over `keys`, whose products with it are scaled by `scale`.
pub fn attention_weights<'a>(
    query: &[f64],
    keys: impl IntoIterator<Item = &'a [f64]>,
    scale: f64,
) -> Vec<f64> {
    let logits: Vec<f64> = keys.into_iter().map(|key| dot(query, key) * scale).collect();
    let top = logits.iter().copied().fold(f64::MIN, f64::max);
    let total: f64 = logits.iter().map(|x| (x - top).exp()).sum();
    logits.iter().map(|x| (x - top).exp() / total).collect()
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The largest absolute difference; NaN anywhere counts as infinite.
pub fn difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let apart = a.iter().zip(b).map(|(x, y)| (x - y).abs());
    apart.map(|d| if d.is_nan() { f64::INFINITY } else { d }).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_add_up_and_nan_is_far_away() {
        let keys = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]];
        let weights = attention_weights(&[2.0, 0.0], keys.iter().map(|k| &k[..]), 0.5);
        let e = 1f64.exp();
        assert!(difference(&weights, &[e, 1.0, e].map(|x| x / (2.0 * e + 1.0))) < 1e-15);
        assert_eq!(difference(&[1.0, f64::NAN], &[1.0, 1.0]), f64::INFINITY);
    }
}

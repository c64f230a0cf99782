//! The attention channels by their definition: plain loops in f64 over a full matrix of weights.

use pkv_core::Channel;
use pkv_test_support::loops::attention_weights;

/// Sizes of one layer's attention over prefix and context, and which queries the channels read.
pub struct Reference {
    pub heads: usize,
    pub group: usize,
    pub head_dim: usize,
    /// Scale of products of queries and keys.
    pub scale: f64,
    pub prefix: usize,
    pub context: usize,
    pub min_distance: usize,
    pub window: usize,
    pub last: usize,
    pub stride: usize,
}

impl Reference {
    pub fn positions(&self) -> usize {
        self.prefix + self.context
    }

    /// Softmax weights of query head `q`, query `i` (cache positions), over its causal row.
    fn weights(&self, qs: &[f64], ks: &[f64], q: usize, i: usize) -> Vec<f64> {
        let (d, n) = (self.head_dim, self.positions());
        let query = &qs[(q * n + i) * d..][..d];
        let key = |k: usize| &ks[(q / self.group * n + k) * d..][..d];
        attention_weights(query, (0..=i).map(key), self.scale)
    }

    /// Attention channels `[heads, channels, context]` of queries `[query_heads, positions, head_dim]`
    /// and keys `[heads, positions, head_dim]`; other channels are 0.
    pub fn channels(&self, channels: &[Channel], qs: &[f64], ks: &[f64]) -> Vec<f64> {
        let mut out = vec![0.0; self.heads * channels.len() * self.context];
        let query_heads = self.heads * self.group;
        let of_layer: Vec<Vec<Vec<f64>>> = (0..query_heads)
            .map(|q| (self.prefix..self.positions()).map(|i| self.weights(qs, ks, q, i)).collect())
            .collect();
        for h in 0..self.heads {
            for (c, channel) in channels.iter().enumerate() {
                for t in 0..self.context {
                    let counts = |i: usize| {
                        i >= t + self.min_distance
                            && match channel {
                                Channel::MaxAll | Channel::MeanAll => i.is_multiple_of(self.stride),
                                Channel::MaxWindow | Channel::MeanWindow => i <= t + self.window,
                                _ => i + self.last >= self.context,
                            }
                    };
                    let rows = match channel {
                        Channel::MeanLastLayer => &of_layer[..],
                        _ => &of_layer[h * self.group..(h + 1) * self.group],
                    };
                    let queries: Vec<usize> = (t..self.context).filter(|i| counts(*i)).collect();
                    let weights =
                        || queries.iter().flat_map(|&i| rows.iter().map(move |r| r[i][self.prefix + t]));
                    out[(h * channels.len() + c) * self.context + t] = match channel {
                        Channel::MaxAll | Channel::MaxWindow | Channel::MaxLast => {
                            weights().map(f64::ln).fold(-16.0, f64::max)
                        }
                        Channel::MeanAll | Channel::MeanWindow | Channel::MeanLast => {
                            let mean = weights().sum::<f64>() / (queries.len() * self.group).max(1) as f64;
                            (mean + 1e-7).ln().max(-16.0)
                        }
                        Channel::MeanLastLayer => {
                            let mean = weights().sum::<f64>() / (queries.len() * query_heads).max(1) as f64;
                            (mean + 1e-7).ln().max(-16.0)
                        }
                        _ => 0.0,
                    };
                }
            }
        }
        out
    }
}

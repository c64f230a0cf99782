//! Choice of the attention kernel for each part on CUDA in bf16 and f16: tunable numbers, no tensors.
//!
//! cuDNN is the faster kernel on Hopper, but it needs about 50 ms to plan for every shape that is new to its
//! thread. So it gets whole blocks of rows and keys, whose shapes recur in other chunks and contexts, and
//! flash attention gets the rest.

/// Who computes the rectangle of many rows over a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rectangle {
    /// Raw flash attention over everything, one kernel with a bottom-right causal mask; no plans.
    Flash,
    /// cuDNN over whole blocks, flash attention over the rest, merged by log-sum-exp.
    Cudnn,
}

/// How attention is split between kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionPolicy {
    pub rectangle: Rectangle,
    /// cuDNN gets a multiple of this many rows, or none.
    pub row_block: usize,
    /// cuDNN gets a multiple of this many keys, or none.
    pub key_block: usize,
}

impl Default for AttentionPolicy {
    fn default() -> Self {
        Self { rectangle: Rectangle::Cudnn, row_block: 1024, key_block: 2048 }
    }
}

impl AttentionPolicy {
    /// Number of first rows and first keys that cuDNN takes; `None` if flash takes all.
    pub(super) fn cudnn_share(&self, rows: i64, keys: i64) -> Option<(i64, i64)> {
        let whole = |n: i64, block: usize| n - n % block.max(1) as i64;
        let share = (whole(rows, self.row_block), whole(keys, self.key_block));
        (self.rectangle == Rectangle::Cudnn && share.0 > 0 && share.1 > 0).then_some(share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cudnn_takes_whole_blocks_only() {
        let policy = AttentionPolicy { rectangle: Rectangle::Cudnn, row_block: 100, key_block: 30 };
        assert_eq!(policy.cudnn_share(250, 95), Some((200, 90)));
        assert_eq!(policy.cudnn_share(100, 30), Some((100, 30)));
        assert_eq!(policy.cudnn_share(99, 95), None);
        assert_eq!(policy.cudnn_share(250, 29), None);
        let flash = AttentionPolicy { rectangle: Rectangle::Flash, ..policy };
        assert_eq!(flash.cudnn_share(250, 95), None);
    }
}

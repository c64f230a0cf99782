//! Which kernel takes which part of attention on CUDA in bf16 and f16: numbers to be tuned, no tensors.
//!
//! cuDNN is the faster kernel on Hopper, but it plans anew, about 50 ms, for every shape that its
//! thread has not shown it yet. So it gets whole blocks of rows and keys, whose shapes come back in
//! other chunks and contexts, and flash attention gets what remains.

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
    /// cuDNN takes a multiple of so many rows, and none of fewer.
    pub row_block: usize,
    /// cuDNN takes a multiple of so many keys, and none of fewer.
    pub key_block: usize,
}

impl Default for AttentionPolicy {
    fn default() -> Self {
        Self { rectangle: Rectangle::Cudnn, row_block: 1024, key_block: 2048 }
    }
}

impl AttentionPolicy {
    /// How many of the first rows and of the first keys cuDNN takes; `None` if flash takes all.
    pub(crate) fn cudnn_share(&self, rows: i64, keys: i64) -> Option<(i64, i64)> {
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

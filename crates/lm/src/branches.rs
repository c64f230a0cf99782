//! Several continuations of one prefilled context, each with its own keep mask.
//!
//! One forward is enough for all methods, retention ratios and questions of a context. Where CUDA has kernels
//! for KV heads of different lengths, every row gets its own copy of the pairs it keeps ([`RaggedCache`]):
//! attention then costs what is kept, and a layer of a decoding step is a dozen launches. Elsewhere, and
//! where copies find no room, the context is stored once and masked (`shared`). Finished rows leave the
//! batch.
//!
//! Dimension key: n keep mask, r row (mask x question, mask-major), s new token, l layer, h KV head,
//! t context position, d head_dim.

mod shared;

use anyhow::{Result, ensure};
use pkv_core::hinted;
use pkv_gpu::{cuda_memory, packs};
use tch::{Device, Kind, Tensor};

use crate::cache::KvCache;
use crate::model::LanguageModel;
use crate::placement::Part;
use crate::ragged::{RaggedCache, room_for};
use shared::SharedBranches;

/// How branches store their context; results differ only by rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// Once, each row's mask hiding pairs.
    Shared,
    /// A copy of the kept pairs for each row.
    Packed,
}

/// Continuations of one context, one per keep mask and question.
pub struct Branches {
    rows: Rows,
    /// Each row's room for own tokens.
    capacity: usize,
}

enum Rows {
    Shared(SharedBranches),
    Packed(RaggedCache),
}

impl Branches {
    /// Branch off `cache`, which must not be written or truncated and written again while the branches are in
    /// use.
    ///
    /// # Shapes
    /// - `keep`: bool `[n_masks, layers, kv_heads, cache.len()]`, true where the pair is seen; `None`
    ///   is one mask that sees all
    /// - rows: `n_masks * questions`, mask-major; `capacity` is each row's room for own tokens
    ///
    /// # Errors
    /// The mask is of another shape or not bool; no question; no memory.
    pub fn new(cache: &KvCache, keep: Option<&Tensor>, questions: usize, capacity: usize) -> Result<Self> {
        let storage = match packs(&cache.keys(0)) {
            true => fitting(cache, keep, questions, capacity)?,
            false => Storage::Shared,
        };
        Self::with_storage(cache, keep, questions, capacity, storage)
    }

    /// As [`Branches::new`], the context held in one way or the other.
    ///
    /// # Errors
    /// As [`Branches::new`].
    pub fn with_storage(
        cache: &KvCache,
        keep: Option<&Tensor>,
        questions: usize,
        capacity: usize,
        storage: Storage,
    ) -> Result<Self> {
        ensure!(questions > 0 && capacity > 0, "branches need a question and room for a token");
        let rows = match storage {
            Storage::Shared => Rows::Shared(SharedBranches::new(cache, keep, questions, capacity)?),
            Storage::Packed => {
                let all = || {
                    let size = [1, cache.layers() as i64, cache.keys(0).size()[0], cache.len() as i64];
                    Tensor::ones(size, (Kind::Bool, cache.placement().home()))
                };
                let keep = keep.map_or_else(all, Tensor::shallow_clone);
                Rows::Packed(RaggedCache::branch(cache, &keep, questions, capacity)?)
            }
        };
        Ok(Self { rows, capacity })
    }

    /// Number of branches: masks times questions, less those that left.
    pub fn rows(&self) -> usize {
        match &self.rows {
            Rows::Shared(shared) => shared.lengths.len(),
            Rows::Packed(cache) => cache.sequences(),
        }
    }

    /// Own tokens of each row.
    pub fn lengths(&self) -> Vec<usize> {
        match &self.rows {
            Rows::Shared(shared) => shared.lengths.clone(),
            Rows::Packed(cache) => cache.lengths(),
        }
    }

    /// Drop each row's own tokens from `lengths[row]` on: padding, or an answer that was tried.
    ///
    /// # Errors
    /// Another number of rows, or a length beyond what the row holds.
    pub fn truncate(&mut self, lengths: &[usize]) -> Result<()> {
        let held = self.lengths();
        ensure!(lengths.len() == held.len(), "expected {} lengths, found {}", held.len(), lengths.len());
        for (row, (new, old)) in lengths.iter().zip(&held).enumerate() {
            ensure!(new <= old, "row {row} holds {old} tokens, it cannot be cut to {new}");
        }
        match &mut self.rows {
            Rows::Shared(shared) => shared.lengths.copy_from_slice(lengths),
            Rows::Packed(cache) => cache.truncate(lengths),
        }
        Ok(())
    }

    /// Keep these rows alone: the others are done. `rows` ascends.
    ///
    /// # Errors
    /// There is none, one is beyond the last, they do not ascend, or there is no memory for a second copy of
    /// one layer; the branches are then of no more use.
    pub fn retain(&mut self, rows: &[usize]) -> Result<()> {
        let ascends = rows.windows(2).all(|pair| pair[0] < pair[1]);
        ensure!(
            ascends && rows.last().is_some_and(|last| *last < self.rows()),
            "cannot keep rows {rows:?} of {}",
            self.rows()
        );
        if rows.len() == self.rows() {
            return Ok(());
        }
        match &mut self.rows {
            Rows::Shared(shared) => {
                shared.retain(rows);
                Ok(())
            }
            Rows::Packed(cache) => cache.retain(rows),
        }
    }
}

impl LanguageModel {
    /// Read new tokens in every branch and append them to it.
    ///
    /// # Shapes
    /// - `ids`: i64 `[rows, s]`, mask-major. Shorter rows are padded on the right with any id: no
    ///   token sees a later one, so padding changes only its own hidden states;
    ///   [`Branches::truncate`] drops it before the row continues
    /// - returns hidden states after the final norm, `[rows, s, hidden]`
    ///
    /// # Errors
    /// Another number of rows, no room, or an id outside the vocabulary.
    pub fn forward_branches(&self, ids: &Tensor, branches: &mut Branches) -> Result<Tensor> {
        let size = ids.size();
        ensure!(
            size.len() == 2 && size[0] == branches.rows() as i64,
            "expected ids of shape [{}, tokens], found {size:?}",
            branches.rows()
        );
        let longest = branches.lengths().into_iter().max().unwrap_or(0);
        ensure!(
            longest + size[1] as usize <= branches.capacity,
            hinted(
                format!(
                    "a branch holds {longest} of {} own tokens; {} more do not fit",
                    branches.capacity, size[1]
                ),
                "make the branches with a larger capacity"
            )
        );
        match &mut branches.rows {
            Rows::Shared(shared) => self.forward_shared(ids, shared),
            Rows::Packed(cache) => self.forward_ragged(ids, cache),
        }
    }

    /// Bytes of the copies that [`Branches`] make of a mask's kept KV pairs, `kept` of all heads, for this
    /// many questions; an upper bound where they share the context.
    pub fn branch_bytes(&self, kept: usize, questions: usize, capacity: usize) -> usize {
        let shape = self.shape();
        let per_pair = 2 * shape.head_dim * self.kind().elt_size_in_bytes();
        let keys = Tensor::empty([0, shape.head_dim as i64], (self.kind(), self.device()));
        match packs(&keys) {
            true => per_pair * packed_pairs(kept * questions, questions * shape.total_kv_heads(), capacity),
            // Gathered once for all questions.
            false => per_pair * kept,
        }
    }
}

/// Packed, if the copies fit beside what else a forward needs.
fn fitting(cache: &KvCache, keep: Option<&Tensor>, questions: usize, capacity: usize) -> Result<Storage> {
    let keys_htd = cache.keys(0);
    let (heads, len, head_dim) = keys_htd.size3()?;
    let heads = cache.layers() * heads as usize;
    let (masks, kept) = match keep {
        Some(keep) => (keep.size()[0] as usize, keep.sum(Kind::Int64).int64_value(&[]) as usize),
        None => (1, heads * len as usize),
    };
    let per_pair = 2 * head_dim as usize * keys_htd.kind().elt_size_in_bytes();
    let bytes = per_pair * packed_pairs(kept * questions, masks * questions * heads, capacity);
    // Each device has the copies of its own layers.
    let fits = |part: &Part| {
        let share = bytes / cache.layers().max(1) * part.layers.len();
        Ok(share <= spare_bytes(part.device)?)
    };
    let all_fit = cache.placement().each(fits)?.iter().all(|(_, fits)| *fits);
    Ok(if all_fit { Storage::Packed } else { Storage::Shared })
}

/// Kept pairs and rooms of as many segments.
fn packed_pairs(kept: usize, segments: usize, capacity: usize) -> usize {
    kept + segments * room_for(capacity)
}

/// Memory that copies of KV pairs may take: half of what is free; on a CPU 512 MiB.
///
/// # Errors
/// The driver refuses.
pub fn spare_bytes(device: Device) -> Result<usize> {
    let Device::Cuda(gpu) = device else { return Ok(512 << 20) };
    let memory = cuda_memory(gpu)?;
    Ok(((memory.free + memory.reserved - memory.allocated).max(0) / 2) as usize)
}

//! Bytes of files into the places of weights: several threads read, and what one has read goes to the
//! device while they read on.
//!
//! A single thread that reads and then copies reaches a fraction of either rate: the page cache gives one
//! thread a few gigabytes a second, and memory that is not page-locked goes to a GPU through the driver's own
//! buffers.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use pkv_gpu::{Event, HostBuffer};
use tch::{Device, Kind, Tensor};

/// Large enough that reads run at the disk's speed; all buffers together are small beside any model.
pub(super) const PIECE_BYTES: usize = 8 << 20;

/// Threads that read: more gain nothing where the page cache has the files.
const MOST_READERS: usize = 8;

/// Pieces whose copies may be queued on the device while others are read.
const QUEUED: usize = 2;

/// A weight in a file, and where it goes.
pub(super) struct Weight<'a> {
    pub file: &'a File,
    /// Of its first byte in the file.
    pub offset: u64,
    /// As it is stored.
    pub kind: Kind,
    /// Bytes of an element.
    pub width: usize,
    /// Contiguous, of one dimension.
    pub place: Tensor,
    /// For errors: what is being read.
    pub reading: String,
}

/// A part of a weight that is read at once.
struct Piece<'a> {
    file: &'a File,
    offset: u64,
    bytes: usize,
    weight: usize,
    /// Elements of the weight.
    first: usize,
    count: usize,
}

/// Fill the places of all weights, by pieces of at most `piece_bytes`.
///
/// # Errors
/// A file cannot be read, or memory for the buffers is lacking.
pub(super) fn fill(weights: &[Weight<'_>], piece_bytes: usize) -> Result<()> {
    let begun = Instant::now();
    let pieces: Vec<Piece> =
        weights.iter().enumerate().flat_map(|(n, w)| pieces(n, w, piece_bytes)).collect();
    let (bytes, largest) =
        (pieces.iter().map(|p| p.bytes).sum::<usize>(), pieces.iter().map(|p| p.bytes).max());
    let Some(largest) = largest else { return Ok(()) };
    let gpu = weights.iter().map(|weight| weight.place.device()).find(|device| device.is_cuda());
    let readers = (tch::get_num_threads().max(1) as usize).min(MOST_READERS).min(pieces.len());
    let (give_back, empty) = channel();
    for _ in 0..(readers + QUEUED).min(pieces.len()) {
        // f32 numbers, an even count of them: elements have up to eight bytes.
        let buffer = HostBuffer::new(largest.next_multiple_of(8) / 4, gpu.unwrap_or(Device::Cpu))?;
        give_back.send(buffer).expect("its other end is below");
    }
    let (next, empty) = (AtomicUsize::new(0), Mutex::new(empty));
    thread::scope(|scope| {
        let (tell, arrived) = channel();
        for _ in 0..readers {
            let (tell, next, empty, pieces) = (tell.clone(), &next, &empty, &pieces);
            scope.spawn(move || {
                while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let buffer = empty.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    // Both channels end where copying failed.
                    let Ok(mut buffer) = buffer else { return };
                    let read =
                        piece.file.read_exact_at(&mut buffer.as_mut_bytes()[..piece.bytes], piece.offset);
                    if tell.send((piece, read.map(|()| buffer))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(tell);
        // Gone with an error, so that the readers end.
        let (give_back, arrived) = (give_back, arrived);
        let mut queued: VecDeque<(Event, HostBuffer)> = VecDeque::new();
        for (piece, buffer) in &arrived {
            let weight = &weights[piece.weight];
            let copy = || {
                let (buffer, first, count) = (buffer?, piece.first as i64, piece.count as i64);
                buffer.copy_to(&weight.place.narrow(0, first, count), weight.kind)?;
                Ok::<_, anyhow::Error>((Event::now(weight.place.device())?, buffer))
            };
            queued.push_back(copy().with_context(|| weight.reading.clone())?);
            while let Some((copied, _)) = queued.front()
                && (queued.len() > QUEUED || copied.is_done()?)
            {
                let Some((copied, buffer)) = queued.pop_front() else { break };
                copied.synchronize()?;
                // When all is read, no one takes it.
                let _ = give_back.send(buffer);
            }
        }
        queued.iter().try_for_each(|(copied, _)| copied.synchronize())
    })?;
    let secs = begun.elapsed().as_secs_f64();
    tracing::debug!(bytes, pieces = pieces.len(), readers, secs, "weights read");
    Ok(())
}

/// The parts of weight `number`.
fn pieces<'a>(number: usize, weight: &Weight<'a>, piece_bytes: usize) -> Vec<Piece<'a>> {
    let (all, most) = (weight.place.numel(), (piece_bytes / weight.width).max(1));
    let piece = |first: usize| {
        let count = most.min(all - first);
        let (offset, bytes) = (weight.offset + (first * weight.width) as u64, count * weight.width);
        Piece { file: weight.file, offset, bytes, weight: number, first, count }
    };
    (0..all).step_by(most).map(piece).collect()
}

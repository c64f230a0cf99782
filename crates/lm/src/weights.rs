//! Safetensors checkpoints, streamed into tensors that already exist.
//!
//! A model allocates its parameters first and names the place of each weight; this module reads
//! every weight with `pread` through one staging buffer, so host memory stays at the buffer's size
//! whatever the checkpoint's. Which names a model has is `model`'s business.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use pkv_core::{Hinted, hinted};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// 64 MiB: large enough that reads run at the disk's speed, small beside any model.
const STAGING_BYTES: usize = 64 << 20;

/// Headers of real checkpoints are below 1 MiB; a larger one is damage.
const MAX_HEADER_BYTES: u64 = 100 << 20;

/// Where each weight goes: its name in the checkpoint and a contiguous view that receives it.
pub(crate) type Places = HashMap<String, Tensor>;

/// Fill `places` from the safetensors files in `folder`.
///
/// Weights are converted to the kind of their place. Names for which `ignored` holds may be in the
/// files without a place; any other surplus is refused, because it means that the configuration
/// describes another model.
///
/// # Errors
/// No weights in the folder; a file missing, truncated or with a damaged header; a weight missing,
/// surplus, of another shape, or of a type that is not floating point.
pub(crate) fn load(folder: &Path, places: Places, ignored: impl Fn(&str) -> bool) -> Result<()> {
    load_through(STAGING_BYTES, folder, places, ignored)
}

fn load_through(
    staging_bytes: usize,
    folder: &Path,
    mut places: Places,
    ignored: impl Fn(&str) -> bool,
) -> Result<()> {
    let shards = shards(folder)?;
    let largest = shards.iter().map(Shard::largest_tensor).max().unwrap_or(0);
    // At least one element of the widest type.
    let bytes = staging_bytes.min(largest).max(8);
    let mut staging = Staging::new(bytes);
    for shard in &shards {
        // In file order: one sequential pass over each file.
        for name in shard.header.offset_keys() {
            if !shard.owns(&name) {
                continue;
            }
            let info = shard.header.info(&name).expect("the name is from this header");
            match places.remove(&name) {
                Some(place) => shard
                    .read(info, &place, &mut staging)
                    .with_context(|| format!("reading weight `{name}` from `{}`", shard.path.display()))?,
                None if ignored(&name) => {}
                None => bail!(hinted(
                    format!(
                        "`{}` holds weight `{name}`, which config.json accounts for nowhere",
                        shard.path.display()
                    ),
                    "config.json and the weights are of different models, or the model has parts that are not supported"
                )),
            }
        }
    }
    if let Some(first) = places.keys().min() {
        bail!(hinted(
            format!(
                "the weights in `{}` are incomplete: `{first}` and {} more are missing",
                folder.display(),
                places.len() - 1
            ),
            "config.json and the weights are of different models, or a shard was left out; download them again"
        ));
    }
    Ok(())
}

/// The buffer that files are read into and weights are copied from.
struct Staging {
    bytes: Tensor,
}

impl Staging {
    fn new(len: usize) -> Self {
        Self { bytes: Tensor::empty([len as i64], (Kind::Uint8, Device::Cpu)) }
    }

    fn len(&self) -> usize {
        self.bytes.numel()
    }

    /// Read `len` bytes of `file` at `offset` to the start of the buffer.
    fn fill(&mut self, file: &File, offset: u64, len: usize) -> std::io::Result<()> {
        assert!(len <= self.len(), "callers read at most one buffer at a time");
        // SAFETY: a contiguous CPU tensor of at least `len` bytes that only `self` refers to; every
        // byte pattern is a valid u8, and the slice ends with this call.
        let buffer = unsafe { std::slice::from_raw_parts_mut(self.bytes.data_ptr().cast::<u8>(), len) };
        file.read_exact_at(buffer, offset)
    }
}

/// One safetensors file with its header read and checked against the file's length.
struct Shard {
    path: PathBuf,
    file: File,
    header: Metadata,
    data_start: u64,
    /// The names that the index gives to this file; `None` without an index: all.
    owned: Option<Vec<String>>,
}

impl Shard {
    fn open(path: PathBuf, owned: Option<Vec<String>>) -> Result<Self> {
        let reading = || format!("reading weights from `{}`", path.display());
        let file = File::open(&path).with_context(|| refetch(reading()))?;
        let found = file.metadata().with_context(reading)?.len();
        let damaged = |what: String| refetch(format!("`{}` is damaged: {what}", path.display()));

        let mut len = [0u8; 8];
        file.read_exact_at(&mut len, 0).with_context(|| damaged(format!("only {found} bytes long")))?;
        let header_bytes = u64::from_le_bytes(len);
        ensure!(
            header_bytes <= MAX_HEADER_BYTES.min(found.saturating_sub(8)),
            damaged(format!("its header claims {header_bytes} bytes, the file has {found}"))
        );
        let mut text = vec![0u8; header_bytes as usize];
        file.read_exact_at(&mut text, 8).with_context(reading)?;
        let header: Metadata = serde_json::from_slice(&text)
            .with_context(|| damaged("its header is no valid safetensors header".to_owned()))?;
        let data_start = 8 + header_bytes;
        let expected = data_start + header.data_len() as u64;
        ensure!(
            expected == found,
            damaged(format!("its header describes {expected} bytes, the file has {found}"))
        );
        Ok(Self { path, file, header, data_start, owned })
    }

    fn owns(&self, name: &str) -> bool {
        self.owned.as_ref().is_none_or(|names| names.binary_search_by(|n| n.as_str().cmp(name)).is_ok())
    }

    fn largest_tensor(&self) -> usize {
        let size = |info: &&TensorInfo| info.data_offsets.1 - info.data_offsets.0;
        self.header.tensors().values().map(size).max().unwrap_or(0)
    }

    fn read(&self, info: &TensorInfo, place: &Tensor, staging: &mut Staging) -> Result<()> {
        let (kind, width) = match info.dtype {
            Dtype::BF16 => (Kind::BFloat16, 2),
            Dtype::F16 => (Kind::Half, 2),
            Dtype::F32 => (Kind::Float, 4),
            Dtype::F64 => (Kind::Double, 8),
            other => bail!(hinted(
                format!("it is stored as {other:?}; quantized weights are not supported"),
                "use the checkpoint that this one was quantized from, in bf16, f16 or f32"
            )),
        };
        let shape: Vec<i64> = info.shape.iter().map(|n| *n as i64).collect();
        ensure!(
            shape == place.size(),
            hinted(
                format!("expected shape {:?} from config.json, found {shape:?}", place.size()),
                "config.json and the weights are of different models"
            )
        );
        let flat = place.view([-1]);
        let per_read = staging.len() / width;
        let mut done = 0;
        while done < flat.numel() {
            let n = per_read.min(flat.numel() - done);
            let offset = self.data_start + (info.data_offsets.0 + done * width) as u64;
            staging.fill(&self.file, offset, n * width)?;
            let source = staging.bytes.narrow(0, 0, (n * width) as i64).view_dtype(kind);
            flat.narrow(0, done as i64, n as i64).f_copy_(&source)?;
            done += n;
        }
        Ok(())
    }
}

/// The weights' files: `model.safetensors`, or those that the index names.
fn shards(folder: &Path) -> Result<Vec<Shard>> {
    let index_path = folder.join("model.safetensors.index.json");
    if !index_path.exists() {
        return Ok(vec![Shard::open(folder.join("model.safetensors"), None)?]);
    }
    let reading = || refetch(format!("reading the index of weights `{}`", index_path.display()));
    let text = std::fs::read_to_string(&index_path).with_context(reading)?;
    let json: Value = serde_json::from_str(&text).with_context(reading)?;
    let map = json
        .get("weight_map")
        .and_then(Value::as_object)
        .context("`weight_map` is missing")
        .with_context(reading)?;
    let mut by_file: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (weight, file) in map {
        let file =
            file.as_str().context("`weight_map` must map names to file names").with_context(reading)?;
        ensure!(
            !file.contains(['/', '\\']),
            refetch(format!("`{}` names `{file}`, which is no plain file name", index_path.display()))
        );
        by_file.entry(file).or_default().push(weight.clone());
    }
    by_file
        .into_iter()
        .map(|(file, mut names)| {
            names.sort();
            let shard = Shard::open(folder.join(file), Some(names))?;
            let absent = shard.owned.iter().flatten().find(|name| shard.header.info(name).is_none());
            ensure!(
                absent.is_none(),
                refetch(format!(
                    "`{}` lacks weight `{}`, which the index places there",
                    shard.path.display(),
                    absent.map_or("", String::as_str)
                ))
            );
            Ok(shard)
        })
        .collect()
}

fn refetch(message: String) -> Hinted {
    hinted(message, "download the model again: `proxykv-train fetch`; a local folder must hold whole files")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_larger_than_the_buffer_arrive_whole() {
        let _ = pkv_gpu::device(pkv_gpu::DeviceChoice::Cpu).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let cpu = |kind| (kind, Device::Cpu);
        let wide = Tensor::randn([7, 11], cpu(Kind::Float));
        let narrow = Tensor::randn([2, 3, 5], cpu(Kind::BFloat16));
        let one = Tensor::randn([1], cpu(Kind::Double));
        let named = [("wide", &wide), ("narrow", &narrow), ("one", &one)];
        Tensor::write_safetensors(&named, folder.path().join("model.safetensors")).unwrap();
        // 9 bytes: no whole number of f32 or bf16 elements, and a read of less than a row.
        for bytes in [9, 32, 1 << 20] {
            // The places are parts of larger tensors, as fused weights have them.
            let fused = Tensor::zeros([10, 11], cpu(Kind::Float));
            let places = Places::from([
                ("wide".to_owned(), fused.narrow(0, 2, 7)),
                ("narrow".to_owned(), Tensor::zeros([2, 3, 5], cpu(Kind::Float))),
                ("one".to_owned(), Tensor::zeros([1], cpu(Kind::Float))),
            ]);
            let kept: Places = places.iter().map(|(k, v)| (k.clone(), v.shallow_clone())).collect();
            load_through(bytes, folder.path(), places, |_| false).unwrap();
            for (name, expected) in named {
                assert!(kept[name].equal(&expected.to_kind(Kind::Float)), "{name} through {bytes} bytes");
            }
            assert_eq!(fused.narrow(0, 0, 2).abs().sum(Kind::Float).double_value(&[]), 0.0);
            assert_eq!(fused.narrow(0, 9, 1).abs().sum(Kind::Float).double_value(&[]), 0.0);
        }
    }
}

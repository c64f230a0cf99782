//! Named tensors to safetensors and back, bit for bit.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use pkv_files::{Published, WriteBudget, sha256_file, write_file};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use tch::{Device, Kind, Tensor};

/// Most bytes of a file of weights: a mapper of a thousand million numbers and its moments have half of it.
const MOST_BYTES: u64 = 32 << 30;

/// Tensors with their names; the order is the owner's.
pub type NamedTensors = Vec<(String, Tensor)>;

/// Write `tensors` to `path`, whole or not at all; the same tensors give the same bytes.
///
/// # Errors
/// The disk is full or fails, two tensors share a name, or a kind has no safetensors dtype.
pub fn write_tensors(path: &Path, tensors: &[(String, Tensor)], budget: &WriteBudget) -> Result<Published> {
    let context = || format!("cannot write tensors to `{}`", path.display());
    let data = encode(tensors).with_context(context)?;
    write_file(path, &data, budget)
}

/// Read all tensors of `path` to `device`, in the order of their names.
///
/// # Errors
/// The file cannot be read, is truncated, or is no safetensors file.
pub fn read_tensors(path: &Path, device: Device) -> Result<NamedTensors> {
    let context = || format!("cannot read tensors from `{}`", path.display());
    let data = pkv_core::read_at_most(path, MOST_BYTES).with_context(context)?;
    decode(&data, device).with_context(context)
}

/// The file `name` of `folder` is the one whose size and hash were written down: a file of its own folder and
/// of that size before it is read.
///
/// # Errors
/// It is not, or cannot be read.
pub(crate) fn check_file(folder: &Path, name: &str, bytes: u64, sha256: &str) -> Result<()> {
    let is_plain = Path::new(name).file_name().is_some_and(|file| file == name);
    ensure!(is_plain, "`{name}` is no name of a file in `{}`", folder.display());
    let path = folder.join(name);
    let found =
        pkv_core::check_regular(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
    ensure!(found == bytes, "`{name}` is damaged: expected {bytes} bytes, found {found}");
    let found = sha256_file(&path)?;
    ensure!(found == sha256, "`{name}` is damaged: expected SHA-256 {sha256}, found {found}");
    Ok(())
}

fn encode(tensors: &[(String, Tensor)]) -> Result<Vec<u8>> {
    let mut seen: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    seen.sort_unstable();
    if let Some(twice) = seen.windows(2).find(|w| w[0] == w[1]) {
        bail!("two tensors are named `{}`", twice[0]);
    }
    let owned = tensors
        .iter()
        .map(|(name, t)| {
            let dtype = dtype(t.kind()).with_context(|| format!("tensor `{name}`"))?;
            Ok((name, dtype, shape(t), bytes(t)))
        })
        .collect::<Result<Vec<_>>>()?;
    let views = owned
        .iter()
        .map(|(name, dtype, shape, data)| Ok((name, TensorView::new(*dtype, shape.clone(), data)?)))
        .collect::<Result<Vec<_>>>()?;
    // No metadata: its keys would come in the order of a hash map, which differs between runs.
    Ok(serialize(views, None)?)
}

fn decode(data: &[u8], device: Device) -> Result<NamedTensors> {
    let file = SafeTensors::deserialize(data).context("it is damaged or no safetensors file")?;
    let mut tensors = Vec::new();
    for (name, view) in file.tensors() {
        let kind = kind(view.dtype()).with_context(|| format!("tensor `{name}`"))?;
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        let tensor = Tensor::f_from_data_size(view.data(), &shape, kind)?.f_to_device(device)?;
        tensors.push((name, tensor));
    }
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(tensors)
}

fn shape(t: &Tensor) -> Vec<usize> {
    t.size().iter().map(|&n| n as usize).collect()
}

/// The numbers of `t`, row-major, on the host.
fn bytes(t: &Tensor) -> Vec<u8> {
    let t = t.detach().to_device(Device::Cpu).contiguous();
    let mut out = vec![0; t.numel() * t.kind().elt_size_in_bytes()];
    if !out.is_empty() {
        t.copy_data_u8(&mut out, t.numel());
    }
    out
}

/// libtorch kinds that we save, and their names in the file.
const KINDS: [(Kind, Dtype); 6] = [
    (Kind::Float, Dtype::F32),
    (Kind::Double, Dtype::F64),
    (Kind::Half, Dtype::F16),
    (Kind::BFloat16, Dtype::BF16),
    (Kind::Int64, Dtype::I64),
    (Kind::Bool, Dtype::BOOL),
];

fn dtype(kind: Kind) -> Result<Dtype> {
    let found = KINDS.iter().find(|(k, _)| *k == kind);
    found.map(|(_, d)| *d).with_context(|| format!("{kind:?} numbers are not saved"))
}

fn kind(dtype: Dtype) -> Result<Kind> {
    let found = KINDS.iter().find(|(_, d)| *d == dtype);
    found.map(|(k, _)| *k).with_context(|| format!("{dtype:?} numbers are not read"))
}

/// The tensors called `names`, in that order.
///
/// # Errors
/// One is missing.
pub(crate) fn pick<'a>(
    tensors: &NamedTensors,
    names: impl IntoIterator<Item = &'a str>,
) -> Result<NamedTensors> {
    names
        .into_iter()
        .map(|name| {
            let i = tensors.binary_search_by(|(n, _)| n.as_str().cmp(name)).ok();
            let found = i.with_context(|| format!("there is no tensor `{name}`"))?;
            Ok((name.to_owned(), tensors[found].1.shallow_clone()))
        })
        .collect()
}

/// Two lists that must be of one length.
pub(crate) fn same_count(what: &str, found: usize, expected: usize) -> Result<()> {
    ensure!(found == expected, "{found} {what} for {expected} parameters");
    Ok(())
}

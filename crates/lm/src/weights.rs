//! Safetensors checkpoints, streamed into tensors that already exist.
//!
//! A model allocates its parameters first and names the place of each weight; this module checks all of
//! them against the files, and `fill` reads them through a few buffers, so that host memory stays at the
//! buffers' size whatever the checkpoint's. The names of a model's weights come from `model`.

mod fill;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};
use pkv_core::{Hinted, hinted};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::Value;
use tch::{Kind, Tensor};

use self::fill::{PIECE_BYTES, Weight, fill};

/// Two weights are compared in pieces of this size.
const COMPARED_BYTES: usize = 4 << 20;

/// The output matrix of a language model.
pub(crate) const HEAD: &str = "lm_head.weight";
/// Its input matrix.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";

/// Of all weights but the output matrix.
const PREFIX: &str = "model.";

/// Parts that wrappers add to the names of weights, with the wrapper's name.
const WRAPPERS: [(&str, &str); 7] = [
    ("_orig_mod.", "torch.compile"),
    ("_fsdp_wrapped_module.", "FSDP"),
    ("_checkpoint_wrapped_module.", "activation checkpointing"),
    ("base_model.model.", "PEFT"),
    ("base_layer.", "PEFT"),
    ("modules_to_save.default.", "PEFT"),
    ("module.", "DataParallel or DeepSpeed"),
];

/// Parts of the names of weights that quantized checkpoints have, whatever wrote them.
const QUANTIZED: [&str; 10] = [
    "qweight",
    "qzeros",
    "g_idx",
    "scales",
    "absmax",
    "quant_state",
    "weight_scale",
    "weight_packed",
    "k_scale",
    "v_scale",
];

/// Headers of real checkpoints are below 1 MiB; a larger one is damage.
const MAX_HEADER_BYTES: u64 = 100 << 20;

/// Destination of each weight: its name in the checkpoint and a contiguous view that receives it.
pub(crate) type Places = HashMap<String, Tensor>;

/// The safetensors files of a model folder, headers read and checked.
pub(crate) struct Checkpoint {
    folder: PathBuf,
    shards: Vec<Shard>,
}

impl Checkpoint {
    /// Open `model.safetensors`, or without it the files that `model.safetensors.index.json` names: the order
    /// in which transformers looks (`modeling_utils._get_resolved_checkpoint_files`). Other files are never
    /// weights.
    ///
    /// # Errors
    /// No weights in the folder, or those of a decoder alone; a file missing, truncated or with a damaged
    /// header.
    pub fn open(folder: &Path) -> Result<Self> {
        let shards = shards(folder)?;
        let any = |test: &dyn Fn(&str) -> bool| {
            shards.iter().any(|shard| shard.header.tensors().keys().any(|name| test(name)))
        };
        let bare =
            any(&|name| PREFIX.to_owned() + name == EMBEDDING) && !any(&|name| name.starts_with(PREFIX));
        ensure!(
            !bare,
            hinted(
                format!(
                    "the weights in `{}` are those of a decoder without the class around it: their names lack `{PREFIX}`",
                    folder.display()
                ),
                "save the model with its output matrix: `AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)`"
            )
        );
        Ok(Self { folder: folder.to_owned(), shards })
    }

    pub fn holds(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// Whether two weights are stored as the same type, shape and bytes; `false` if one is absent.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn equal(&self, a: &str, b: &str) -> Result<bool> {
        match (self.find(a), self.find(b)) {
            (Some(a), Some(b)) => same(a, b),
            _ => Ok(false),
        }
    }

    /// Fill `places`.
    ///
    /// Weights are converted to the kind of their place. Names for which `ignored` holds may be in the
    /// files without a place; any other surplus is refused, because it means that the configuration
    /// describes another model.
    ///
    /// # Errors
    /// A weight missing, surplus, in two files, of another shape, or of a type that is not floating point.
    pub fn load(&self, places: Places, ignored: impl Fn(&str) -> bool) -> Result<()> {
        fill(&self.weights(places, ignored)?, PIECE_BYTES)
    }

    /// What fills `places`, in the order of the files: one sequential pass over each.
    fn weights(&self, mut places: Places, ignored: impl Fn(&str) -> bool) -> Result<Vec<Weight<'_>>> {
        for shard in &self.shards {
            shard.check_index(|name| places.contains_key(name))?;
        }
        let (mut weights, mut read) = (Vec::new(), HashSet::new());
        for shard in &self.shards {
            for name in shard.header.offset_keys() {
                if ignored(&name) && !places.contains_key(&name) {
                    continue;
                }
                if shard.is_elsewhere(&name) {
                    self.check_copy(shard, &name)?;
                    continue;
                }
                let Some(place) = places.remove(&name) else {
                    return Err(match read.contains(&name) {
                        true => refetch(format!(
                            "`{}` holds weight `{name}`, which another of the files holds too",
                            shard.path.display()
                        )),
                        false => surplus(shard, &name, &places),
                    }
                    .into());
                };
                let info = shard.header.info(&name).expect("the name is from this header");
                let reading = format!("reading weight `{name}` from `{}`", shard.path.display());
                weights.push(shard.weight(info, &place, &reading).with_context(|| reading)?);
                read.insert(name);
            }
        }
        let Some(first) = places.keys().min() else { return Ok(weights) };
        let hint = match places.len() == 1 && first == HEAD {
            true => {
                "if the embedding is the output matrix too, config.json must say `\"tie_word_embeddings\": true`"
            }
            false => {
                "config.json and the weights are of different models, or a shard was left out; download them again"
            }
        };
        let others = match places.len() - 1 {
            0 => "is missing".to_owned(),
            n => format!("and {n} more are missing"),
        };
        let folder = self.folder.display();
        bail!(hinted(format!("the weights in `{folder}` are incomplete: `{first}` {others}"), hint));
    }

    /// # Errors
    /// A weight in a file that is not the one which the index names differs from that in the right one: which
    /// is meant depends on who reads.
    fn check_copy(&self, shard: &Shard, name: &str) -> Result<()> {
        let (Some(right), Some(info)) = (self.find(name), shard.header.info(name)) else { return Ok(()) };
        ensure!(
            same(right, (shard, info))?,
            hinted(
                format!(
                    "`{}` holds another weight `{name}` than `{}`, where the index places it",
                    shard.path.display(),
                    right.0.path.display()
                ),
                "files of two checkpoints are mixed; download the model into an empty folder"
            )
        );
        Ok(())
    }

    /// The file that holds a weight, and where it lies in it.
    fn find(&self, name: &str) -> Option<(&Shard, &TensorInfo)> {
        let holders = self.shards.iter().filter(|shard| !shard.is_elsewhere(name));
        holders.filter_map(|shard| Some((shard, shard.header.info(name)?))).next()
    }
}

/// Whether two weights are stored as the same type, shape and bytes.
fn same((file_a, a): (&Shard, &TensorInfo), (file_b, b): (&Shard, &TensorInfo)) -> Result<bool> {
    if (a.dtype, &a.shape) != (b.dtype, &b.shape) {
        return Ok(false);
    }
    let mut buffers = [vec![0u8; COMPARED_BYTES], vec![0u8; COMPARED_BYTES]];
    let len = a.data_offsets.1 - a.data_offsets.0;
    for done in (0..len).step_by(COMPARED_BYTES) {
        let n = COMPARED_BYTES.min(len - done);
        for ((shard, info), buffer) in [(file_a, a), (file_b, b)].into_iter().zip(&mut buffers) {
            shard.bytes(info, done, &mut buffer[..n])?;
        }
        if buffers[0][..n] != buffers[1][..n] {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The error for a weight that the model has no place for.
fn surplus(shard: &Shard, name: &str, places: &Places) -> Hinted {
    let path = shard.path.display();
    let last = name.rsplit('.').next().unwrap_or_default();
    if QUANTIZED.iter().any(|part| last.starts_with(part)) {
        return quantized(format!("`{path}` holds weight `{name}`; quantized weights are not supported"));
    }
    let wrapper = WRAPPERS.iter().find(|(prefix, _)| {
        name.contains(prefix) && places.keys().any(|place| name.replace(prefix, "").ends_with(place.as_str()))
    });
    match wrapper {
        Some((prefix, by)) => hinted(
            format!("`{path}` holds weight `{name}`: it was saved from a model wrapped by {by}"),
            format!(
                "remove `{prefix}` from the weights' names, or save the wrapped model itself (`save_pretrained`)"
            ),
        ),
        None => hinted(
            format!("`{path}` holds weight `{name}`, which config.json accounts for nowhere"),
            "config.json and the weights are of different models, or the model has parts that are not supported",
        ),
    }
}

/// One safetensors file with its header read and checked against the file's length.
struct Shard {
    path: PathBuf,
    file: File,
    header: Metadata,
    data_start: u64,
    /// The file in which the index places each weight; empty without an index.
    index: Rc<HashMap<String, String>>,
}

impl Shard {
    fn open(path: PathBuf, index: Rc<HashMap<String, String>>) -> Result<Self> {
        let reading = || format!("reading weights from `{}`", path.display());
        pkv_core::check_regular(&path).with_context(|| refetch(reading()))?;
        let file = File::open(&path).with_context(|| refetch(reading()))?;
        let found = file.metadata().with_context(reading)?.len();
        let damaged = |what: String| refetch(format!("`{}` is damaged: {what}", path.display()));

        let mut len = [0u8; 8];
        file.read_exact_at(&mut len, 0).with_context(|| damaged(format!("only {found} bytes long")))?;
        let header_bytes = u64::from_le_bytes(len);
        let fits = header_bytes <= MAX_HEADER_BYTES.min(found.saturating_sub(8));
        if !fits {
            let mut head = vec![0; found.min(512) as usize];
            file.read_exact_at(&mut head, 0).with_context(reading)?;
            if let Some((what, hint)) = pkv_core::foreign(&head) {
                bail!(hinted(format!("`{}` is {what}", path.display()), hint));
            }
        }
        ensure!(fits, damaged(format!("its header claims {header_bytes} bytes, the file has {found}")));
        let mut text = vec![0u8; header_bytes as usize];
        file.read_exact_at(&mut text, 8).with_context(reading)?;
        let header: Metadata = serde_json::from_slice(&text).with_context(|| match odd_note(&text) {
            Some(note) => hinted(
                format!("`{}`: `__metadata__` of its header holds {note}; expected text", path.display()),
                "save the weights again with safetensors, every note in `metadata` as text",
            ),
            None => damaged("its header is no valid safetensors header".to_owned()),
        })?;
        let data_start = 8 + header_bytes;
        let expected = data_start + header.data_len() as u64;
        ensure!(
            expected == found,
            damaged(format!("its header describes {expected} bytes, the file has {found}"))
        );
        Ok(Self { path, file, header, data_start, index })
    }

    fn name(&self) -> &str {
        self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
    }

    /// Whether the index places this weight in another file.
    ///
    /// A weight that the index leaves out is read where it is, as transformers does.
    fn is_elsewhere(&self, name: &str) -> bool {
        self.index.get(name).is_some_and(|file| file != self.name())
    }

    /// # Errors
    /// A weight that is `needed` and that the index places here is not here. The index may list others that
    /// no file has, such as the output matrix of a tied model.
    fn check_index(&self, needed: impl Fn(&str) -> bool) -> Result<()> {
        let ours = self.index.iter().filter(|(_, file)| *file == self.name()).map(|(name, _)| name);
        let absent = ours.filter(|name| needed(name) && self.header.info(name).is_none()).min();
        ensure!(
            absent.is_none(),
            refetch(format!(
                "`{}` lacks weight `{}`, which the index places there",
                self.path.display(),
                absent.map_or("", String::as_str)
            ))
        );
        Ok(())
    }

    /// Bytes of a weight from `start` of its data on.
    fn bytes(&self, info: &TensorInfo, start: usize, into: &mut [u8]) -> Result<()> {
        let offset = self.data_start + (info.data_offsets.0 + start) as u64;
        let reading = || format!("reading weights from `{}`", self.path.display());
        self.file.read_exact_at(into, offset).with_context(reading)
    }

    /// # Errors
    /// It is no weight for that place.
    fn weight(&self, info: &TensorInfo, place: &Tensor, reading: &str) -> Result<Weight<'_>> {
        let (kind, width) = match info.dtype {
            Dtype::BF16 => (Kind::BFloat16, 2),
            Dtype::F16 => (Kind::Half, 2),
            Dtype::F32 => (Kind::Float, 4),
            Dtype::F64 => (Kind::Double, 8),
            other => {
                bail!(quantized(format!("it is stored as {other:?}; quantized weights are not supported")))
            }
        };
        let shape: Vec<i64> = info.shape.iter().map(|n| *n as i64).collect();
        ensure!(
            shape == place.size(),
            hinted(
                format!("expected shape {:?} from config.json, found {shape:?}", place.size()),
                "config.json and the weights are of different models"
            )
        );
        let offset = self.data_start + info.data_offsets.0 as u64;
        let (place, reading) = (place.view([-1]), reading.to_owned());
        Ok(Weight { file: &self.file, offset, kind, width, place, reading })
    }
}

/// What `__metadata__` of a header holds besides texts, if it is that which makes the header invalid.
fn odd_note(header: &[u8]) -> Option<String> {
    let json: Value = serde_json::from_slice(header).ok()?;
    match json.get("__metadata__")? {
        Value::Object(notes) => {
            notes.iter().find(|(_, note)| !note.is_string()).map(|(key, note)| format!("`{key}`: {note}"))
        }
        Value::Null => None,
        other => Some(other.to_string()),
    }
}

/// The weights' files: `model.safetensors`, or those that the index names.
fn shards(folder: &Path) -> Result<Vec<Shard>> {
    let whole = folder.join("model.safetensors");
    let index_path = folder.join("model.safetensors.index.json");
    let absent = |path: &Path| Ok::<_, anyhow::Error>(pkv_core::look_for(path)?.is_none());
    if !absent(&whole)? || absent(&index_path)? {
        return Ok(vec![Shard::open(whole, Rc::default())?]);
    }
    let reading = || refetch(format!("reading the index of weights `{}`", index_path.display()));
    let text = pkv_core::read_small_text(&index_path).with_context(reading)?;
    pkv_core::check_json(text.as_bytes(), &index_path)?;
    let json: Value = serde_json::from_str(&text).with_context(reading)?;
    let map = json
        .get("weight_map")
        .and_then(Value::as_object)
        .context("`weight_map` is missing")
        .with_context(reading)?;
    let mut index = HashMap::new();
    for (weight, file) in map {
        let file =
            file.as_str().context("`weight_map` must map names to file names").with_context(reading)?;
        ensure!(
            !file.contains(['/', '\\']),
            refetch(format!("`{}` names `{file}`, which is no plain file name", index_path.display()))
        );
        index.insert(weight.clone(), file.to_owned());
    }
    let index = Rc::new(index);
    let files: BTreeSet<&String> = index.values().collect();
    files.into_iter().map(|file| Shard::open(folder.join(file), Rc::clone(&index))).collect()
}

fn quantized(message: String) -> Hinted {
    hinted(message, "use the checkpoint that this one was quantized from, in bf16, f16 or f32")
}

fn refetch(message: String) -> Hinted {
    hinted(message, "download the model again: `proxykv-train fetch`; a local folder must hold whole files")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

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
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            fill(&checkpoint.weights(places, |_| false).unwrap(), bytes).unwrap();
            for (name, expected) in named {
                assert!(kept[name].equal(&expected.to_kind(Kind::Float)), "{name} through {bytes} bytes");
            }
            assert_eq!(fused.narrow(0, 0, 2).abs().sum(Kind::Float).double_value(&[]), 0.0);
            assert_eq!(fused.narrow(0, 9, 1).abs().sum(Kind::Float).double_value(&[]), 0.0);
        }
    }

    #[test]
    fn a_file_that_becomes_shorter_ends_the_readers_with_its_name() {
        let _ = pkv_gpu::device(pkv_gpu::DeviceChoice::Cpu).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let wide = Tensor::randn([300, 100], (Kind::Float, Device::Cpu));
        Tensor::write_safetensors(&[("wide", &wide)], &path).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let places = Places::from([("wide".to_owned(), wide.zeros_like())]);
        let weights = checkpoint.weights(places, |_| false).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(60_000).unwrap();
        let error = format!("{:#}", fill(&weights, 1000).unwrap_err());
        assert!(error.contains("reading weight `wide`") && error.contains("model.safetensors"), "{error}");
    }
}

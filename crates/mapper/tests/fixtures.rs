//! What the mapper's test files share: goldens by name, random tensors, comparisons that say how far.

use std::path::PathBuf;

use pkv_core::Seed;
use pkv_gpu::DeviceChoice;
use pkv_mapper::{Mapper, MapperDims, Standardization};
use pkv_recipe::MapperSection;
use rand::Rng;
use tch::{Device, Tensor};

pub use pkv_test_support::tensors::{difference as max_difference, relative};

pub type Named = Vec<(String, Tensor)>;

pub fn device() -> Device {
    let device = pkv_gpu::device(DeviceChoice::Auto).unwrap();
    pkv_gpu::set_tf32(false).unwrap();
    device
}

/// Tensors this small are faster without a thread pool, five times on a busy machine.
fn one_thread() {
    tch::set_num_threads(1);
}

/// One case of `goldens/`: its `[mapper]` and its tensors.
pub struct Golden {
    pub mapper: MapperSection,
    pub tensors: Named,
}

pub const CASES: [&str; 7] =
    ["hybrid-axial", "hybrid-axial-attention", "conv", "mlp", "linear", "two-positions", "one-position"];

impl Golden {
    pub fn read(name: &str) -> Self {
        one_thread();
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
        let cases = std::fs::read_to_string(folder.join("cases.json")).unwrap();
        let case = serde_json::from_str::<serde_json::Value>(&cases).unwrap()[name].take();
        let tensors = Tensor::read_safetensors(folder.join(format!("{name}.safetensors"))).unwrap();
        Self { mapper: serde_json::from_value(case["mapper"].clone()).unwrap(), tensors }
    }

    pub fn get(&self, name: &str) -> Tensor {
        let found = self.tensors.iter().find(|(n, _)| n == name);
        found.unwrap_or_else(|| panic!("the golden has no `{name}`")).1.shallow_clone()
    }

    /// The tensors whose names start with `prefix`, without it.
    pub fn under(&self, prefix: &str) -> Named {
        let strip = |(n, x): &(String, Tensor)| Some((n.strip_prefix(prefix)?.to_owned(), x.shallow_clone()));
        self.tensors.iter().filter_map(strip).collect()
    }

    /// A mapper with the golden's parameters.
    pub fn mapper(&self, device: Device) -> Mapper {
        let (heads, globals) = (self.get("input.heads").size(), self.get("input.globals").size());
        let dims = MapperDims {
            proxy_heads: heads[1] as usize,
            channels: heads[2] as usize,
            globals: globals[1] as usize,
            outputs: self.get("input.y").size()[1] as usize,
        };
        let stats = Standardization::from_buffers(&self.tensors).unwrap();
        let mapper = Mapper::new(&self.mapper, dims, stats, Seed(0), device).unwrap();
        let mut golden = self.under("param.");
        golden.retain(|(name, _)| !name.starts_with("loss."));
        assert_eq!(golden.len(), mapper.parameters().len(), "as many parameters as the golden has");
        mapper.load_parameters(&golden).unwrap();
        mapper
    }
}

/// Uniform in (-1.7, 1.7): deviation 1.
pub fn random(seed: u64, shape: &[i64]) -> Tensor {
    let mut rng = Seed(seed).stream("mapper-test", 0);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_: i64| rng.random_range(-1.7..1.7)).collect();
    Tensor::from_slice(&values).reshape(shape)
}

/// Small sizes of everything, and all parameters away from their zeros.
pub fn small(variant: &str, attention: &[usize], device: Device) -> Mapper {
    one_thread();
    let section: MapperSection = serde_json::from_value(serde_json::json!({
        "variant": variant, "head_width": 4, "width": 8, "dilations": [1, 2], "kernel": 5,
        "attention_blocks": attention, "attention_heads": 2, "attention_window": 6,
        "cross_width": 6, "cross_heads": 2,
    }))
    .unwrap();
    let dims = MapperDims { proxy_heads: 3, channels: 2, globals: 2, outputs: 5 };
    let mapper = Mapper::new(
        &section,
        dims,
        Standardization { label_mean: -3.0, label_std: 2.5, ..Standardization::identity(&dims) },
        Seed(5),
        device,
    )
    .unwrap();
    scatter(&mapper);
    mapper
}

/// Move every parameter off its start, so that no path through the network is silent.
pub fn scatter(mapper: &Mapper) {
    let named: Named = mapper
        .parameters()
        .iter()
        .enumerate()
        .map(|(i, (name, x))| {
            (name.clone(), x.detach() + random(900 + i as u64, &x.size()).to_device(x.device()) * 0.3)
        })
        .collect();
    mapper.load_parameters(&named).unwrap();
}

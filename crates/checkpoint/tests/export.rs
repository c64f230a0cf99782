//! The frozen mapper: bit-exact, whole or absent, with its card.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use pkv_checkpoint::{
    BUDGETS_FILE, CardTable, Contents, DataSource, EXPORT_FILES, Export, ExportConfig, Licences, ModelCard,
    ModelIdentity, Parity, StageCost, restore_mapper,
};
use pkv_core::{ModelShape, Seed, Source};
use pkv_files::WriteBudget;
use pkv_mapper::{Mapper, MapperDims, Standardization};
use pkv_prune::BudgetFit;
use pkv_recipe::{ExtractSection, LabelSection, LossSection, MapperSection, TrainSection, Variant};
use serde_json::{Value, json};
use tch::Tensor;
use tempfile::tempdir;

use crate::common::*;

const DIMS: MapperDims = MapperDims { proxy_heads: 3, channels: 8, globals: 4, outputs: 6 };

fn noise(name: &str, shape: &[i64]) -> Tensor {
    use rand::Rng;
    let mut rng = Seed(5).stream(name, 0);
    let n: i64 = shape.iter().product();
    Tensor::from_slice(&(0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect::<Vec<_>>()).reshape(shape)
}

fn stats() -> Standardization {
    Standardization {
        heads_mean_pc: noise("a", &[3, 8]),
        heads_std_pc: noise("b", &[3, 8]).abs() + 0.5,
        globals_mean_c: noise("c", &[4]),
        globals_std_c: noise("d", &[4]).abs() + 0.5,
        label_mean: -4.3,
        label_std: 2.1,
    }
}

/// Every parameter is moved, so that none could come back by being initialized alike.
fn mapper(section: &MapperSection) -> Mapper {
    let mapper = Mapper::new(section, DIMS, stats(), Seed(3), cpu()).unwrap();
    let moved: Vec<_> = mapper
        .parameters()
        .iter()
        .map(|(n, t)| (n.clone(), t.detach() + noise(n, &t.size()) * 0.1))
        .collect();
    mapper.load_parameters(&moved).unwrap();
    mapper
}

fn config(section: &MapperSection) -> ExportConfig {
    let model = |name: &str, layers| ModelIdentity {
        model: name.to_owned(),
        revision: "local:0123".to_owned(),
        dtype: "f32".to_owned(),
        shape: ModelShape {
            layers,
            kv_heads: 3,
            query_heads: 6,
            head_dim: 16,
            hidden: 96,
            intermediate: 256,
            vocab: 8192,
        },
        vocab_hash: "0123456789abcdef0123".to_owned(),
        template_hash: "fedc".to_owned(),
    };
    let hub =
        ModelIdentity { model: "owner/small".to_owned(), revision: "c0ffee".to_owned(), ..model("", 1) };
    ExportConfig {
        schema_version: pkv_checkpoint::EXPORT_VERSION,
        written_by: "0.1.0".to_owned(),
        name: "tiny".to_owned(),
        target: model("models/big|one", 2),
        proxy: Some(hub),
        dims: DIMS.into(),
        label: LabelSection::default(),
        extract: ExtractSection::default(),
        mapper: section.clone(),
        loss: LossSection::default(),
        train: TrainSection::default(),
        fingerprint: choices(),
        step: 1400,
        validation: Some(0.7123),
        seed: Seed(3),
        trained_tokens: Some(2048),
        files: Default::default(),
    }
}

fn card() -> ModelCard {
    ModelCard {
        data: vec![DataSource { name: "novels".into(), examples: 480, licence: "public domain".into() }],
        cost: vec![
            StageCost {
                stage: "label".into(),
                secs: 5400.0,
                device: "NVIDIA H200".into(),
                gpus: 1,
                tokens: Some(742_113),
            },
            StageCost {
                stage: "train".into(),
                secs: 90.0,
                device: "8 CPU threads".into(),
                gpus: 0,
                tokens: None,
            },
        ],
        results: vec![CardTable {
            caption: "Answers, percent, by share kept".into(),
            columns: vec!["method".into(), "0.05".into()],
            rows: vec![vec!["mapper".into(), "97.9".into()], vec!["random".into(), "0.4".into()]],
        }],
        limits: vec!["Trained on contexts up to 1,800 tokens.".into()],
        licences: Licences { mapper: "apache-2.0".into(), target: "MIT".into(), proxy: String::new() },
    }
}

fn contents<'a>(
    config: &'a ExportConfig,
    mapper: &'a Mapper,
    card: &'a ModelCard,
    parity: &'a Parity,
) -> Contents<'a> {
    Contents { config, mapper, tensors: &[], budgets: None, card, parity }
}

fn put(folder: &Path, config: &ExportConfig, mapper: &Mapper, parity: &Parity) -> anyhow::Result<()> {
    Export::write(folder, contents(config, mapper, &card(), parity))
}

fn write(folder: &Path, section: &MapperSection) -> Mapper {
    let mapper = mapper(section);
    let parity = Parity::of(&mapper, noise("heads", &[3, 8, 50]), noise("globals", &[4, 50]));
    put(folder, &config(section), &mapper, &parity).unwrap();
    mapper
}

#[test]
fn every_variant_comes_back_bit_for_bit() {
    for variant in [Variant::HybridAxial, Variant::Conv, Variant::Mlp, Variant::Linear] {
        let section = MapperSection { variant, width: 32, ..MapperSection::default() };
        let dir = tempdir().unwrap();
        let folder = dir.path().join("export");
        let written = write(&folder, &section);
        assert_eq!(names(&folder), ["README.md", "config.json", "model.safetensors", "parity.safetensors"]);

        let export = Export::read(&folder).unwrap();
        let mut expected = config(&section);
        expected.files = export.config().files.clone();
        assert_eq!(export.config(), &expected);
        let read = export.mapper(cpu()).unwrap();
        same_named(read.parameters(), written.parameters());
        same_named(&read.buffers(), &written.buffers());

        let parity = export.parity().unwrap();
        assert_eq!(parity.scores_ot.size(), [6, 50]);
        let again = Parity::of(&read, parity.heads_pct.shallow_clone(), parity.globals_ct.shallow_clone());
        same_tensors(&[again.scores_ot], &[parity.scores_ot]);
    }
}

#[test]
fn the_card_says_what_a_stranger_must_know() {
    let text = card().render(&config(&MapperSection::default()));
    for expected in [
        "---\nlicense: apache-2.0\nlibrary_name: proxykv-train\nbase_model:\n- \"owner/small\"\ntags:\n- kv-cache\n",
        "1.500 GPU-hours (1.525 hours on the clock) in all.",
        "| label | 1.500 | 1.500 | NVIDIA H200 | 742113 |",
        "| train | 0.025 | 0.000 | 8 CPU threads | - |",
        "| target | `models/big\\|one` | `local:0123` | 2 layers x 3 KV heads of 16 | `0123456789ab` |",
        "KVzip preset original, scoring chunks of 2000 tokens",
        "width 3 and blend 0.5",
        "`max_all`, `mean_all`, `max_window`",
        "| novels | 480 | public domain |",
        "Step 1400 of 1500",
        "71.2% mean recall",
        "| mapper | 97.9 |",
        "- Trained on contexts up to 1,800 tokens.",
        "Mapper: apache-2.0. Target: MIT. Proxy: not stated.",
        "schema version 3",
    ] {
        assert!(text.contains(expected), "`{expected}` is missing in:\n{text}");
    }
    let bare = ModelCard::default().render(&config(&MapperSection::default()));
    assert!(bare.contains("Not evaluated") && bare.starts_with("---\nlicense: unknown\n"), "{bare}");
    assert!(bare.contains("## Cost\n\nNot recorded."), "{bare}");
    let mut own = card();
    own.licences.mapper = "ACME Research Licence".into();
    let text = own.render(&config(&MapperSection::default()));
    assert!(text.contains("license: other\nlicense_name: acme-research-licence\n"), "{text}");
}

#[test]
fn a_sound_export_gives_its_own_scores_and_has_a_card() {
    let dir = tempdir().unwrap();
    let folder = dir.path().join("export");
    let section = MapperSection { width: 32, ..MapperSection::default() };
    write(&folder, &section);
    assert_eq!(names(&folder), EXPORT_FILES);
    Export::read(&folder).unwrap().check().unwrap();

    let unsound = |expected: &str| {
        let (said, hint) = text_and_hint(&Export::read(&folder).unwrap().check().expect_err(expected));
        assert!(said.contains("is not sound") && said.contains(expected), "{said}");
        assert!(hint.contains("proxykv-train export"), "{hint}");
    };
    let card = fs::read(folder.join("README.md")).unwrap();
    fs::write(folder.join("README.md"), "# A card without front matter\n").unwrap();
    unsound("cannot be indexed");
    fs::remove_file(folder.join("README.md")).unwrap();
    unsound("cannot read");
    fs::write(folder.join("README.md"), card).unwrap();

    // Whole files with right hashes, of two exports: only the scores tell.
    let mapper = mapper(&section);
    let mut parity = Parity::of(&mapper, noise("heads", &[3, 8, 50]), noise("globals", &[4, 50]));
    parity.scores_ot = parity.scores_ot.roll(1, 1);
    put(&folder, &config(&section), &mapper, &parity).unwrap();
    unsound("scores are off");
    parity.scores_ot = parity.scores_ot.full_like(f64::NAN);
    put(&folder, &config(&section), &mapper, &parity).unwrap();
    unsound("scores are off");
}

#[test]
fn damage_is_named() {
    let dir = tempdir().unwrap();
    let folder = dir.path().join("export");
    let section = MapperSection { variant: Variant::Linear, ..MapperSection::default() };
    write(&folder, &section);
    let good = files(&folder);
    // A misspelled folder is not damaged.
    let (said, hint) = text_and_hint(&Export::read(&dir.path().join("exprot")).expect_err("no folder"));
    assert!(said.contains("there is no such folder"), "{said}");
    assert!(hint.contains(&format!("there is `{}`; ", folder.display())), "{hint}");
    // A folder of something else is not a damaged one.
    let (said, hint) = text_and_hint(&Export::read(dir.path()).expect_err("no export"));
    assert!(said.contains("it has none of an export's files") && hint.contains("name an export"), "{said}");
    let fails = |file: &str, data: Option<Vec<u8>>, expected: &str| {
        match data {
            Some(data) => fs::write(folder.join(file), data).unwrap(),
            None => fs::remove_file(folder.join(file)).unwrap(),
        }
        let (said, hint) = text_and_hint(&Export::read(&folder).expect_err(expected));
        assert!(said.contains("cannot read export") && said.contains(expected), "{said}");
        assert!(hint.contains("proxykv-train export"), "{hint}");
        fs::write(folder.join(file), &good[file]).unwrap();
    };
    let mut flipped = good["model.safetensors"].clone();
    *flipped.last_mut().unwrap() ^= 1;
    fails("model.safetensors", Some(flipped), "`model.safetensors` is damaged");
    fails("parity.safetensors", Some(vec![1, 2, 3]), "`parity.safetensors` is damaged");
    fails("model.safetensors", None, "model.safetensors");
    fails("config.json", None, "config.json");
    let text = String::from_utf8(good["config.json"].clone()).unwrap();
    let newer = text.replace("\"schema_version\": 3", "\"schema_version\": 4");
    fails("config.json", Some(newer.into_bytes()), "expected export version 2 or 3, found 4");
    fs::write(folder.join("config.json"), r#"{"model_type": "llama", "hidden_size": 64}"#).unwrap();
    let e = Export::read(&folder).expect_err("a model");
    assert!(format!("{e:#}").contains("is a language model, not a mapper"), "{e:#}");
    fs::write(folder.join("config.json"), &good["config.json"]).unwrap();
    // What asks for more memory than the file of weights could fill, for a panic, or for a file elsewhere.
    let edited = |change: &dyn Fn(&mut Value)| {
        let mut config: Value = serde_json::from_str(&text).unwrap();
        pkv_core::unseal(&mut config).unwrap();
        change(&mut config);
        Some(config.to_string().into_bytes())
    };
    let elsewhere =
        |name: &str| edited(&|c| c["files"][name] = json!({"bytes": 1, "sha256": "0".repeat(64)}));
    for (config, expected) in [
        (edited(&|c| c["mapper"]["cross_heads"] = json!(0)), "`mapper.cross_heads` is 0"),
        (
            edited(&|c| c["mapper"]["dilations"] = json!(vec![1; 100_000])),
            "`mapper.dilations` has 100000 entries",
        ),
        (edited(&|c| c["mapper"]["width"] = json!(1_000_000_000)), "`mapper.width` is 1000000000; at most"),
        (edited(&|c| c["dims"]["outputs"] = json!(1u64 << 40)), "a size above"),
        (edited(&|c| c["dims"]["outputs"] = json!(1u64 << 30)), "ask for at least"),
        (edited(&|c| c["mapper"]["variant"] = json!("hybrid-axial")), "ask for at least"),
        (elsewhere("/dev/zero"), "`/dev/zero` is no name of a file in"),
        (elsewhere("../config.json"), "`../config.json` is no name of a file in"),
        (Some("[".repeat(100_000).into_bytes()), "recursion limit"),
    ] {
        fails("config.json", config, expected);
    }
    let weights = folder.join("model.safetensors");
    fs::remove_file(&weights).unwrap();
    symlink("/dev/zero", &weights).unwrap();
    let (said, _) = text_and_hint(&Export::read(&folder).unwrap_err());
    assert!(said.contains("a device, pipe or socket"), "{said}");
    fs::remove_file(&weights).unwrap();
    fs::write(&weights, &good["model.safetensors"]).unwrap();
    Export::read(&folder).unwrap();
}

#[test]
fn head_budgets_lie_beside_what_older_readers_know() {
    let dir = tempdir().unwrap();
    let folder = dir.path().join("export");
    let section = MapperSection { variant: Variant::Linear, ..MapperSection::default() };
    let mut fit = BudgetFit::new(6);
    fit.add(&noise("budgets", &[6, 40])).unwrap();
    let budgets = fit.finish().unwrap();
    let write = |name: &str| {
        let mapper = mapper(&section);
        let parity = Parity::of(&mapper, noise(name, &[3, 8, 50]), noise("globals", &[4, 50]));
        let (config, card) = (&config(&section), &card());
        let contents = contents(config, &mapper, card, &parity);
        Export::write(&folder, Contents { budgets: Some(&budgets), ..contents }).unwrap();
    };
    write("heads");
    let export = Export::read(&folder).unwrap();
    assert_eq!(export.budgets(), Some(&budgets));
    // Older readers refuse keys that they do not know, and fetch the files alone that they know.
    assert_eq!(export.config().files.keys().collect::<Vec<_>>(), ["model.safetensors", "parity.safetensors"]);
    assert_eq!(names(&folder).len(), EXPORT_FILES.len() + 1);

    let path = folder.join(BUDGETS_FILE);
    let text = fs::read_to_string(&path).unwrap();
    let refused = |text: &str, expected: &str| {
        fs::write(&path, text).unwrap();
        let (said, hint) = text_and_hint(&Export::read(&folder).expect_err(expected));
        assert!(said.contains("budgets.json") && said.contains(expected), "{expected}: {said}");
        assert!(hint.contains("proxykv-train export"), "{hint}");
    };
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let share = json["shares"][3][1][2].as_u64().unwrap();
    refused(&text.replacen(&share.to_string(), &(share + 1).to_string(), 1), "is damaged");
    refused(&text[..text.len() / 2], "EOF");
    refused(&text.replace("\"schema_version\":1", "\"schema_version\":9"), "expected version 1, found 9");
    let weights = export.config().files["model.safetensors"].sha256.clone();
    refused(&text.replace(&weights, &"0".repeat(64)), "is damaged");
    // Whole, but of another export: its weights and its hash are others.
    let other = MapperSection { variant: Variant::Mlp, width: 32, ..MapperSection::default() };
    self::write(&folder, &other);
    refused(&text, "belongs to other weights");

    fs::remove_file(&path).unwrap();
    assert!(Export::read(&folder).unwrap().budgets().is_none(), "older exports have none");
}

#[test]
fn weights_of_another_mapper_do_not_fit() {
    let section = MapperSection { width: 32, ..MapperSection::default() };
    let tensors: Vec<_> = {
        let m = mapper(&section);
        m.parameters().iter().map(|(n, t)| (n.clone(), t.shallow_clone())).chain(m.buffers()).collect()
    };
    restore_mapper(&section, DIMS, &tensors, cpu()).unwrap();
    let wider = MapperSection { width: 64, ..section };
    assert!(restore_mapper(&wider, DIMS, &tensors, cpu()).is_err());
    let fewer = MapperDims { outputs: 5, ..DIMS };
    assert!(restore_mapper(&wider, fewer, &tensors, cpu()).is_err());
}

#[test]
fn a_full_disk_leaves_the_export_that_was_there() {
    let dir = tempdir().unwrap();
    let folder = dir.path().join("export");
    let section = MapperSection { variant: Variant::Linear, ..MapperSection::default() };
    let first = write(&folder, &section);
    let before = files(&folder);
    let size: u64 = before.values().map(|f| f.len() as u64).sum();
    let parity = Parity::of(&first, noise("other", &[3, 8, 50]), noise("globals", &[4, 50]));
    for budget in (0..size).step_by(613) {
        let (config, card) = (&config(&section), &card());
        let contents = contents(config, &first, card, &parity);
        let result = Export::write_within(&folder, contents, &WriteBudget::bytes(budget));
        let (said, hint) = text_and_hint(&result.unwrap_err());
        assert!(said.starts_with("cannot write export") && hint.contains("free some space"), "{said} {hint}");
        assert_eq!(files(&folder), before);
        assert_eq!(names(dir.path()), ["export"]);
    }
    // A second export takes the place of the first.
    put(&folder, &config(&section), &first, &parity).unwrap();
    assert_ne!(files(&folder)["parity.safetensors"], before["parity.safetensors"]);
    assert_eq!(names(dir.path()), ["export"]);
}

#[test]
fn a_mapper_of_the_target_alone_names_no_proxy() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("export");
    let section = MapperSection::default();
    let mapper = mapper(&section);
    let parity = Parity::of(&mapper, noise("heads", &[3, 8, 50]), noise("globals", &[4, 50]));
    let alone = |proxy: Option<ModelIdentity>| {
        let extract = ExtractSection { from: vec![Source::Target], ..ExtractSection::default() };
        ExportConfig { proxy, extract, ..config(&section) }
    };
    let card_of = |config: &ExportConfig| {
        put(&folder, config, &mapper, &parity).unwrap();
        fs::read_to_string(folder.join("README.md")).unwrap()
    };
    let text = card_of(&alone(None));
    for part in ["from its own prefill", "## Model\n", "For this model alone", "Target: MIT. The data"] {
        assert!(text.contains(part), "`{part}` is not in\n{text}");
    }
    assert!(!text.to_lowercase().replace("proxykv", "").contains("proxy"), "{text}");
    let written = fs::read_to_string(folder.join("config.json")).unwrap();
    assert!(!written.contains("\"proxy\""), "{written}");
    assert_eq!(Export::read(&folder).unwrap().config().read_proxy(), None);
    // Earlier versions named one all the same.
    card_of(&alone(config(&section).proxy));
    let old = Export::read(&folder).unwrap();
    assert!(old.config().proxy.is_some() && old.config().read_proxy().is_none());
    // One that reads a proxy must name it.
    card_of(&ExportConfig { proxy: None, ..config(&section) });
    let refused = format!("{:#}", Export::read(&folder).unwrap_err());
    assert!(refused.contains("reads features of a proxy, and it names none"), "{refused}");
}

#[test]
fn markup_in_names_and_licences_is_text_in_the_card() {
    let hostile = "<script>alert(1)</script>\u{1b}[2J\u{9b}`</code>![x](http://127.0.0.1/x)\n# Title";
    let mut config = config(&MapperSection::default());
    let proxy = config.proxy.as_mut().unwrap();
    for name in [&mut config.name, &mut config.target.model, &mut proxy.revision] {
        *name = hostile.to_owned();
    }
    let mut card = card();
    card.data.push(DataSource { name: hostile.to_owned(), examples: 1, licence: hostile.to_owned() });
    card.licences = Licences { mapper: hostile.into(), target: hostile.into(), proxy: hostile.into() };
    let text = card.render(&config);
    assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
    assert!(!text.contains("\n# Title"), "{text}");
    // Code is shown as it is; elsewhere no tag and no link are left.
    let prose: String = text.replace("\\`", "").split('`').step_by(2).collect();
    assert!(!prose.contains("<script") && !prose.contains("![x]("), "{prose}");
    assert!(prose.contains("&lt;script>"), "{prose}");
}

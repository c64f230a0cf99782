//! Every recipe and manifest in the project loads, and recipes state shapes that fit together.

use std::fs;
use std::path::{Path, PathBuf};

use pkv_recipe::{SourceFormat, load, load_manifest};
use pkv_test_support::files::root;

/// TOML files of a folder, lock files left out.
fn files(folder: &str) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(root().join(folder))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| {
            p.extension().is_some_and(|x| x == "toml") && !p.to_string_lossy().ends_with(".lock.toml")
        })
        .collect();
    files.sort();
    files
}

#[test]
fn every_ablation_changes_one_section_of_its_base() {
    let ablations = files("recipes/ablations");
    assert!(ablations.len() > 20);
    let sections = |path: &Path| {
        let recipe = load(path, &[]).unwrap_or_else(|e| panic!("{e:#}"));
        (recipe.name.clone(), toml::Table::try_from(&recipe).unwrap())
    };
    for path in ablations {
        let own: toml::Table = fs::read_to_string(&path).unwrap().parse().unwrap();
        let (_, base) = sections(&path.with_file_name(own["base"].as_str().unwrap()));
        let (name, all) = sections(&path);
        let short = path.file_stem().unwrap().to_string_lossy().into_owned();
        assert_eq!(name, format!("ablation-{short}"));
        let changed: Vec<String> = all
            .into_iter()
            .filter(|(key, value)| key != "name" && base.get(key) != Some(value))
            .map(|(key, _)| key)
            .collect();
        // Many more contexts want more steps too; those of the learning curve change nothing but how many of
        // them are used.
        let expected = if short == "data-10000" { 2 } else { 1 };
        assert_eq!(changed.len(), expected, "{short} changes {changed:?}");
    }
}

#[test]
fn every_recipe_loads_and_names_a_manifest_that_loads() {
    let recipes = files("recipes");
    for needed in [
        "llama-3.1-8b--llama-3.2-1b",
        "qwen2.5-7b--qwen2.5-0.5b",
        "qwen2.5-14b--qwen2.5-1.5b",
        "qwen3-8b--qwen3-0.6b",
        "qwen3-14b--qwen3-0.6b",
        "qwen3-32b--qwen3-1.7b",
        "granite-3.1-8b--granite-3.1-2b",
        "tiny-llama",
        "demo-nano",
    ] {
        assert!(
            recipes.iter().any(|r| r.ends_with(format!("{needed}.toml"))),
            "there is no recipe `{needed}`"
        );
    }
    for path in recipes {
        let recipe = load(&path, &[]).unwrap_or_else(|e| panic!("{e:#}"));
        assert_eq!(
            Some(recipe.name.as_str()),
            path.file_stem().and_then(|s| s.to_str()),
            "name and file name differ"
        );
        let manifest = load_manifest(&root().join(&recipe.data.manifest)).unwrap_or_else(|e| panic!("{e:#}"));
        for source in &manifest.sources {
            assert!(
                !source.licence.is_empty(),
                "{}: source `{}` states no licence",
                path.display(),
                source.name
            );
        }
        // A proxy is the smaller of two models of one family; vocabularies differ by padding at most.
        if let Some(proxy) = &recipe.proxy {
            let (target, proxy) = (&recipe.target.shape, &proxy.shape);
            assert!(proxy.matrix_parameters() < target.matrix_parameters() / 2, "{}", path.display());
            assert!(proxy.vocab.abs_diff(target.vocab) <= 128, "{}", path.display());
        }
        // Resolved recipes are written into run folders and must come back the same.
        let dir = tempfile::tempdir().unwrap();
        let copy = dir.path().join("resolved.toml");
        fs::write(&copy, recipe.to_toml()).unwrap();
        let mut again = load(&copy, &[]).unwrap_or_else(|e| panic!("{e:#}"));
        again.path = recipe.path.clone();
        assert_eq!(again, recipe);
    }
}

#[test]
fn shapes_of_the_real_pairs_give_the_published_sizes() {
    // Parameters without embeddings and head, in billions, as the models' cards state them or as follows
    // from their totals: rounded, but far apart.
    for (recipe, target, proxy) in [
        ("llama-3.1-8b--llama-3.2-1b", 6.98, 0.97),
        ("qwen2.5-7b--qwen2.5-0.5b", 6.53, 0.36),
        ("qwen2.5-14b--qwen2.5-1.5b", 13.1, 1.31),
        ("qwen3-8b--qwen3-0.6b", 6.95, 0.44),
        ("qwen3-14b--qwen3-1.7b", 13.2, 1.4),
        ("qwen3-32b--qwen3-0.6b", 31.2, 0.44),
        ("granite-3.1-8b--granite-3.1-2b", 7.9, 2.4),
    ] {
        let recipe = load(&root().join(format!("recipes/{recipe}.toml")), &[]).unwrap();
        let of_proxy = recipe.proxy.as_ref().unwrap().shape;
        for (shape, published) in [(recipe.target.shape, target), (of_proxy, proxy)] {
            let billions = shape.matrix_parameters() as f64 / 1e9;
            assert!(
                (billions / published - 1.0).abs() < 0.03,
                "{}: {billions} against {published}",
                recipe.name
            );
        }
    }
}

#[test]
fn every_manifest_loads_and_shipped_text_is_there() {
    let manifests = files("data-manifests");
    assert!(manifests.len() >= 3);
    for path in manifests {
        let manifest = load_manifest(&path).unwrap_or_else(|e| panic!("{e:#}"));
        assert!(!manifest.description.is_empty());
        for source in manifest.sources.iter().filter(|s| s.files.iter().any(|f| f.starts_with("demo/"))) {
            assert_eq!(source.format, SourceFormat::Jsonl);
            for file in &source.files {
                let bytes = fs::metadata(manifest.folder.join(file)).unwrap().len();
                assert!((500_000..1_500_000).contains(&bytes), "{file} has {bytes} bytes");
            }
        }
    }
}

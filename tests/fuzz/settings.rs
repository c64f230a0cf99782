//! Recipe, manifest and lock file.

use std::fs;

use pkv_hub::Lock;
use pkv_recipe::plan::{Machine, Plan};

use crate::folder;
use crate::harness::Target;
use crate::sandbox::{Sandbox, root};

#[test]
fn recipes() {
    let dir = folder("recipe");
    let s = Sandbox::new();
    fs::copy(s.path("recipe.toml"), dir.join("recipe.toml")).unwrap();
    fs::copy(root().join("recipes/tiny-llama.toml"), dir.join("base.toml")).unwrap();
    fs::write(dir.join("based.toml"), "base = \"base.toml\"\nname = \"x\"\n[train]\nlr_cuts = [[9, 0.5]]\n")
        .unwrap();
    Target {
        name: "recipe",
        folder: &dir,
        files: &["recipe.toml", "base.toml", "based.toml"],
        repair: None,
        read: &|dir| {
            for name in ["recipe.toml", "based.toml"] {
                let recipe = pkv_recipe::load(&dir.join(name), &[])?;
                // What is accepted can be added up.
                Plan::new(&recipe, Machine::cpu(2), &pkv_eval::work(&recipe));
            }
            Ok(())
        },
    }
    .fuzz();
}

#[test]
fn manifests() {
    let dir = folder("manifest");
    fs::copy(root().join("data-manifests/long-documents.toml"), dir.join("manifest.toml")).unwrap();
    fs::copy(root().join("data-manifests/demo.toml"), dir.join("local.toml")).unwrap();
    let pin = "version = 1\n[datasets.\"a/b\"]\nasked = \"main\"\ncommit = \"0123456789abcdef0123456789abcdef01234567\"\n\
               [datasets.\"a/b\".files.\"x.jsonl\"]\nbytes = 3\nsha256 = \"00\"\n";
    fs::write(dir.join("local.lock.toml"), pin).unwrap();
    Target {
        name: "manifest",
        folder: &dir,
        files: &["manifest.toml", "local.toml", "local.lock.toml"],
        repair: None,
        read: &|dir| {
            for name in ["manifest.toml", "local.toml"] {
                pkv_recipe::load_manifest(&dir.join(name))?;
                Lock::beside(&dir.join(name))?;
            }
            Ok(())
        },
    }
    .fuzz();
}
